// Density peaks among nearest neighbours. Definition: vtc/ops/selection.py, dpc_knn.
//
// Squared distances are |a|^2 + |b|^2 - 2ab of tokens without their mean, in double every 128 channels; where that
// cancels, the tokens being near, the sum of squared differences. They exist once for up to 4,096 tokens, each pair
// computed once; beyond, a tile at a time and twice.
#pragma once

#include <cmath>
#include <numeric>

#include "tiles.h"

namespace vtc {

constexpr int64_t WHOLE = 4096;
constexpr int64_t MR = 24;     // rows at a time
constexpr int64_t PART = 128;  // channels whose sum is a float
constexpr float NEAR = -1.0f;

// out [m, NR] = own + theirs - 2 dot, or NEAR where too little of it is left to be exact
template <class V>
VTC_INLINE void squares_body(const float* const* rows, int m, const float* packed, int64_t width, const double* own,
                             const double* theirs, float* out) {
  double total[MR * NR] = {};
  const float* at[MR];
  for (int64_t k = 0; k < width; k += PART) {
    for (int i = 0; i < m; ++i) at[i] = rows[i] + k;
    tile_body<V>(at, m, packed + k * NR, std::min(PART, width - k), out);
    for (int i = 0; i < m * NR; ++i) total[i] += double(out[i]);
  }
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < NR; ++j) {
      const double all = own[i] + theirs[j], squared = all - 2.0 * total[i * NR + j];
      out[i * NR + j] = squared > 0.0625 * all ? float(squared) : NEAR;
    }
}
VTC_KERNEL(squares,
           (const float* const* rows, int m, const float* packed, int64_t width, const double* own, const double* theirs,
            float* out),
           (rows, m, packed, width, own, theirs, out))

// The largest of n values >= 0 of those with weight 1, not 0.
template <class V>
VTC_INLINE void largest_body(const float* x, const float* weight, int64_t n, float* out) {
  typename V::F most = {}, v, w;
  int64_t j = 0;
  for (; j + V::lanes <= n; j += V::lanes) {
    load(v, x + j);
    load(w, weight + j);
    v = v * w;
    most = v > most ? v : most;
  }
  float all = 0.0f;
  for (int l = 0; l < V::lanes; ++l) all = std::max(all, most[l]);
  for (; j < n; ++j) all = std::max(all, x[j] * weight[j]);
  *out = all;
}
VTC_KERNEL(largest, (const float* x, const float* weight, int64_t n, float* out), (x, weight, n, out))

// The smallest x of tokens denser than number `mine`; of equally dense ones the first counts as denser.
template <class V>
VTC_INLINE void denser_body(const float* x, const float* rho, int64_t mine, int64_t n, float* out) {
  using F = typename V::F;
  const float infinity = std::numeric_limits<float>::infinity(), own = rho[mine];
  F least = F{} + infinity, v, r;
  float all = infinity;
  int64_t j = 0;
  for (; j + V::lanes <= mine; j += V::lanes) {
    load(v, x + j);
    load(r, rho + j);
    v = r >= own ? v : F{} + infinity;
    least = v < least ? v : least;
  }
  for (const int64_t border = std::min(n, (mine / V::lanes + 1) * V::lanes); j < border; ++j)
    if ((rho[j] > own || (rho[j] == own && j < mine)) && x[j] < all) all = x[j];
  for (; j + V::lanes <= n; j += V::lanes) {
    load(v, x + j);
    load(r, rho + j);
    v = r > own ? v : F{} + infinity;
    least = v < least ? v : least;
  }
  for (; j < n; ++j)
    if (rho[j] > own && x[j] < all) all = x[j];
  for (int l = 0; l < V::lanes; ++l) all = std::min(all, least[l]);
  *out = all;
}
VTC_KERNEL(denser, (const float* x, const float* rho, int64_t mine, int64_t n, float* out), (x, rho, mine, n, out))

// Squared distances of the tokens x [n, d] of one image.
struct Distances {
  const float* x;
  int64_t n, d;
  std::vector<float> middle;  // x without its mean, about: distances stay, products shrink
  std::vector<double> norm, norm_middle;
  std::vector<const float*> rows;
  std::vector<int64_t> all;
  std::vector<float> whole;
  Columns columns;

  Distances(const float* x_, int64_t n_, int64_t d_)
      : x(x_), n(n_), d(d_), middle(x_, x_ + n_ * d_), norm(n_), norm_middle(n_), all(n_), columns(0, 0) {
    std::vector<float> mean(d, 0.0f), low(x, x + d), high(x, x + d);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < d; ++k) {
        const float v = x[i * d + k];
        mean[k] += v;
        low[k] = v < low[k] ? v : low[k];
        high[k] = v > high[k] ? v : high[k];
      }
    for (int64_t k = 0; k < d; ++k) {  // rounded to a part of the range: what was on a grid stays on it, and ties stay ties
      const float span = high[k] - low[k], grid = span > 0.0f && std::isfinite(span) ? std::exp2(std::floor(std::log2(span))) : 1.0f;
      mean[k] = std::isfinite(mean[k]) && std::isfinite(span) ? grid * std::nearbyint(mean[k] / float(n) / grid) : 0.0f;
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < d; ++k) middle[i * d + k] -= mean[k];
    rows = pointers(middle.data(), n, d);
    columns = Columns(rows.data(), n, d);
    std::iota(all.begin(), all.end(), int64_t(0));
    for (int64_t i = 0; i < n; ++i) {
      norm[i] = apart<false>(x + i * d, x + i * d);
      norm_middle[i] = apart<false>(rows[i], rows[i]);
    }
    if (n > WHOLE) return;
    whole.resize(n * n);
    const auto fill = [&](int64_t a, int64_t b) {
      float out[MR * NR];
      for (int64_t i0 = a * MR; i0 < std::min(n, b * MR); i0 += MR) {
        const int64_t m = std::min(MR, n - i0);
        for (int64_t p = i0 / NR; p < columns.panels(); ++p) {
          const int64_t j0 = p * NR, count = std::min(NR, n - j0), first = std::max<int64_t>(0, i0 - j0);
          block(i0, int(m), columns.panel(p), all.data() + j0, count, out);
          for (int64_t i = 0; i < m; ++i) std::copy(out + i * NR + first, out + i * NR + count, &whole[(i0 + i) * n + j0 + first]);
          for (int64_t j = std::max<int64_t>(0, i0 + m - j0); j < count; ++j)
            for (int64_t i = 0; i < m; ++i) whole[(j0 + j) * n + i0 + i] = out[i * NR + j];
        }
      }
    };
    // the first rows have the most pairs: halves from both ends, so that even parts are even work
    const int64_t blocks = (n + MR - 1) / MR;
    const auto both = [&](int64_t a, int64_t b) {
      fill(a, b);
      fill(std::max(blocks - b, (blocks + 1) / 2), blocks - a);
    };
    VTC_PARALLEL(0, (blocks + 1) / 2, 1, both);
  }

  // The dot product of two tokens or their squared distance, in double every PART channels.
  template <bool DIFFERENCE>
  double apart(const float* a, const float* b) const {
    double sum = 0.0;
    for (int64_t k = 0; k < d; k += PART) {
      const int64_t part = std::min(PART, d - k);
      sum += double(DIFFERENCE ? gap(a + k, b + k, part) : dot(a + k, b + k, part));
    }
    return sum;
  }

  // out [m, NR]: rows i0 .. i0 + m against a panel, which packs the tokens at[0 .. count)
  void block(int64_t i0, int m, const float* panel, const int64_t* at, int64_t count, float* out) const {
    double theirs[NR] = {};
    for (int64_t j = 0; j < count; ++j) theirs[j] = norm_middle[at[j]];
    squares(rows.data() + i0, m, panel, d, norm_middle.data() + i0, theirs, out);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < count; ++j) {
        float& v = out[i * NR + j];
        if (v == NEAR) v = at[j] == i0 + i ? 0.0f : float(apart<true>(x + (i0 + i) * d, x + at[j] * d));
        if (v <= 1e-12 * (norm[i0 + i] + norm[at[j]])) v = 0.0f;
      }
  }

  // The distances of rows i0 .. i0 + m to all; the start of row i0 + i is returned in `at`.
  void fetch(int64_t i0, int m, std::vector<float>& buffer, const float** at) const {
    for (int i = 0; i < m && !whole.empty(); ++i) at[i] = whole.data() + (i0 + i) * n;
    if (!whole.empty()) return;
    buffer.resize(MR * n);
    float out[MR * NR];
    for (int64_t p = 0; p < columns.panels(); ++p) {
      const int64_t j0 = p * NR, count = std::min(NR, n - j0);
      block(i0, m, columns.panel(p), all.data() + j0, count, out);
      for (int i = 0; i < m; ++i) std::copy(out + i * NR, out + i * NR + count, buffer.data() + i * n + j0);
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
  std::vector<float> rho(n, -infinity), score(n), widest_of(n, 0.0f), weight(n);
  for (int64_t i = 0; i < n; ++i) weight[i] = real(i) ? 1.0f : 0.0f;
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
        for (int64_t j = 0; j < n; ++j) {
          const float v = at[i][j];
          if (v < least[looked - 1] && real(j)) {
            int64_t place = looked - 1;
            for (; place > 0 && least[place - 1] > v; --place) least[place] = least[place - 1];
            least[place] = v;
          }
        }
        float total = 0.0f;
        for (float v : least) total += v / float(d);
        rho[i0 + i] = -total / float(near);
        largest(at[i], weight.data(), n, &widest_of[i0 + i]);
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
        float least;
        denser(at[i], rho.data(), mine, n, &least);
        score[mine] = rho[mine] + std::log(std::sqrt((std::isinf(least) ? widest : least) / float(d)));
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
  for (int64_t c = 0; c < count; ++c) rows[c] = distances.rows[centres[c]];
  const bool known = !distances.whole.empty();
  const Columns places(rows.data(), known ? 0 : count, d);
  const auto join = [&](int64_t a, int64_t b) { for (int64_t i0 = a * MR; i0 < std::min(n, b * MR); i0 += MR) {
    const int m = int(std::min<int64_t>(MR, n - i0));
    for (int64_t c0 = 0; c0 < count; c0 += NR) {
      float out[MR * NR];
      const int64_t some = std::min(NR, count - c0);
      if (!known) distances.block(i0, m, places.panel(c0 / NR), centres.data() + c0, some, out);
      for (int i = 0; i < m; ++i)
        for (int64_t c = c0; c < c0 + some; ++c) {
          const float v = known ? distances.whole[(i0 + i) * n + centres[c]] : out[i * NR + c - c0];
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
    } else {
      distance[i] = std::sqrt(distance[i] / float(d));
    }
}

}  // namespace vtc
