// Density peaks among nearest neighbours. Definition: vtc/ops/selection.py, dpc_knn.
//
// Distances are sums of squared differences, which do not cancel where two tokens are near. They exist once for up to
// 4,096 tokens, each pair computed once; beyond, a tile at a time and twice.
#pragma once

#include <cmath>
#include <numeric>

#include "tiles.h"

namespace vtc {

constexpr int64_t WHOLE = 4096;
constexpr int64_t MR = 12;  // rows at a time

// Sums of squared differences, 128 channels at a time and these in double: nearly as exact as all in double.
inline void squares(const float* const* rows, int m, const float* packed, int64_t width, float* out) {
  constexpr int64_t part = 128;
  float some[MR * NR];
  double total[MR * NR] = {};
  const float* at[MR];
  for (int64_t k = 0; k < width; k += part) {
    for (int i = 0; i < m; ++i) at[i] = rows[i] + k;
    gaps(at, m, packed + k * NR, std::min(part, width - k), some);
    for (int i = 0; i < m * NR; ++i) total[i] += double(some[i]);
  }
  for (int i = 0; i < m * NR; ++i) out[i] = float(total[i]);
}

struct Distances {
  const float* x;
  int64_t n, d;
  std::vector<const float*> rows;
  std::vector<float> norm, whole;
  Columns columns;

  Distances(const float* x_, int64_t n_, int64_t d_)
      : x(x_), n(n_), d(d_), rows(pointers(x_, n_, d_)), norm(n_), columns(rows.data(), n_, d_) {
    for (int64_t i = 0; i < n; ++i) norm[i] = dot(rows[i], rows[i], d);
    if (n > WHOLE) return;
    whole.resize(n * n);
    const auto fill = [&](int64_t a, int64_t b) { for (int64_t i0 = a * MR; i0 < std::min(n, b * MR); i0 += MR) {
      const int m = int(std::min<int64_t>(MR, n - i0));
      float out[MR * NR];
      for (int64_t p = i0 / NR; p < columns.panels(); ++p) {
        const int64_t j0 = p * NR, count = std::min(NR, n - j0);
        block(i0, m, p, out);
        for (int i = 0; i < m; ++i)
          for (int64_t j = std::max<int64_t>(0, i0 - j0); j < count; ++j) {
            whole[(i0 + i) * n + j0 + j] = out[i * NR + j];
            if (j0 + j >= i0 + m) whole[(j0 + j) * n + i0 + i] = out[i * NR + j];
          }
      }
    } };
    // the first rows have the most pairs: halves from both ends, so that even parts are even work
    const int64_t blocks = (n + MR - 1) / MR;
    const auto both = [&](int64_t a, int64_t b) {
      fill(a, b);
      fill(std::max(blocks - b, (blocks + 1) / 2), blocks - a);
    };
    VTC_PARALLEL(0, (blocks + 1) / 2, 1, both);
  }

  float apart(float squared, int64_t i, float other) const {
    const float total = norm[i] + other;
    return squared <= 1e-12f * total ? 0.0f : std::sqrt(squared / float(d));
  }

  void block(int64_t i0, int m, int64_t p, float* out) const {
    squares(rows.data() + i0, m, columns.panel(p), d, out);
    const int64_t j0 = p * NR, count = std::min(NR, n - j0);
    for (int i = 0; i < m; ++i)
      for (int64_t j = 0; j < count; ++j) out[i * NR + j] = apart(out[i * NR + j], i0 + i, norm[j0 + j]);
  }

  // buffer [MR, n] = distances of rows i0 .. i0 + m; the start of row i0 + i is returned in `at`.
  void fetch(int64_t i0, int m, std::vector<float>& buffer, const float** at) const {
    if (!whole.empty()) {
      for (int i = 0; i < m; ++i) at[i] = whole.data() + (i0 + i) * n;
      return;
    }
    buffer.resize(MR * n);
    float out[MR * NR];
    for (int64_t p = 0; p < columns.panels(); ++p) {
      block(i0, m, p, out);
      for (int i = 0; i < m; ++i) std::memcpy(buffer.data() + i * n + p * NR, out + i * NR, 4 * std::min(NR, n - p * NR));
    }
    for (int i = 0; i < m; ++i) at[i] = buffer.data() + i * n;
  }
};

// One image: x [n, d]; order [most], target [n], distance [n].
inline void dpc_knn(const float* x, int64_t n, int64_t d, int64_t count, int64_t most, int64_t neighbors,
                    const bool* mask, int64_t* order, int64_t* target, float* distance) {
  const float infinity = std::numeric_limits<float>::infinity();
  auto real = [&](int64_t i) { return mask == nullptr || mask[i]; };
  std::fill(order, order + most, int64_t(-1));
  std::fill(target, target + n, int64_t(-1));
  std::fill(distance, distance + n, infinity);
  if (count <= 0) return;
  const Distances distances(x, n, d);
  const int64_t near = count >= neighbors ? neighbors : std::min<int64_t>(3, std::max<int64_t>(1, count / 2));
  const int64_t looked = std::min(near, std::min(neighbors, n));
  std::vector<float> rho(n, -infinity), score(n), widest_of(n, 0.0f);
  const int64_t blocks = (n + MR - 1) / MR;
  const auto densities = [&](int64_t a, int64_t b) {
    std::vector<float> buffer, least(looked);
    const float* at[MR];
    for (int64_t i0 = a * MR; i0 < std::min(n, b * MR); i0 += MR) {
      const int m = int(std::min<int64_t>(MR, n - i0));
      distances.fetch(i0, m, buffer, at);
      for (int i = 0; i < m; ++i) {
        if (!real(i0 + i)) continue;
        std::fill(least.begin(), least.end(), infinity);
        float widest = 0.0f;
        for (int64_t j = 0; j < n; ++j) {
          const float v = at[i][j];
          if (!real(j)) continue;
          widest = std::max(widest, v);
          if (v < least[looked - 1]) {
            int64_t place = looked - 1;
            for (; place > 0 && least[place - 1] > v; --place) least[place] = least[place - 1];
            least[place] = v;
          }
        }
        float total = 0.0f;
        for (float v : least) total += v * v;
        rho[i0 + i] = -total / float(near);
        widest_of[i0 + i] = widest;
      }
    }
  };
  VTC_PARALLEL(0, blocks, 1, densities);
  const float widest = *std::max_element(widest_of.begin(), widest_of.end());
  const auto parents = [&](int64_t a, int64_t b) {
    std::vector<float> buffer;
    const float* at[MR];
    for (int64_t i0 = a * MR; i0 < std::min(n, b * MR); i0 += MR) {
      const int m = int(std::min<int64_t>(MR, n - i0));
      distances.fetch(i0, m, buffer, at);
      for (int i = 0; i < m; ++i) {
        const int64_t mine = i0 + i;
        float least = infinity;
        for (int64_t j = 0; j < n; ++j) {
          const bool denser = rho[j] > rho[mine] || (rho[j] == rho[mine] && j < mine);
          least = denser && at[i][j] < least ? at[i][j] : least;
        }
        score[mine] = rho[mine] + std::log(std::isinf(least) ? widest : least);
        if (std::isnan(score[mine])) score[mine] = std::numeric_limits<float>::lowest();
        score[mine] = std::max(score[mine], std::numeric_limits<float>::lowest());
      }
    }
  };
  VTC_PARALLEL(0, blocks, 1, parents);
  std::vector<int64_t> by(n);
  std::iota(by.begin(), by.end(), int64_t(0));
  by.erase(std::remove_if(by.begin(), by.end(), [&](int64_t i) { return !real(i); }), by.end());
  count = std::min<int64_t>(count, int64_t(by.size()));
  std::partial_sort(by.begin(), by.begin() + count, by.end(),
                    [&](int64_t a, int64_t b) { return score[a] > score[b] || (score[a] == score[b] && a < b); });
  std::copy(by.begin(), by.begin() + count, order);
  std::vector<int64_t> centres(by.begin(), by.begin() + count);
  std::sort(centres.begin(), centres.end());
  std::vector<const float*> rows(count);
  for (int64_t c = 0; c < count; ++c) rows[c] = x + centres[c] * d;
  const bool known = !distances.whole.empty();
  const Columns places(rows.data(), known ? 0 : count, d);
  const auto join = [&](int64_t a, int64_t b) { for (int64_t i0 = a * MR; i0 < std::min(n, b * MR); i0 += MR) {
    const int m = int(std::min<int64_t>(MR, n - i0));
    for (int64_t c0 = 0; c0 < count; c0 += NR) {
      float out[MR * NR];
      if (!known) squares(distances.rows.data() + i0, m, places.panel(c0 / NR), d, out);
      for (int i = 0; i < m; ++i)
        for (int64_t c = c0; c < std::min(count, c0 + NR); ++c) {
          const float v = known ? distances.whole[(i0 + i) * n + centres[c]]
                                : distances.apart(out[i * NR + c - c0], i0 + i, distances.norm[centres[c]]);
          if (v < distance[i0 + i]) {
            distance[i0 + i] = v;
            target[i0 + i] = centres[c];
          }
        }
    }
  } };
  VTC_PARALLEL(0, blocks, 4, join);
  for (int64_t c : centres) target[c] = c;  // also one that lies on another
  for (int64_t i = 0; i < n; ++i)
    if (!real(i)) {
      target[i] = -1;
      distance[i] = infinity;
    }
}

}  // namespace vtc
