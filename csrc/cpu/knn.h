// Density peaks among nearest neighbours. Definition: vtc/ops/selection.py, dpc_knn.
//
// Squared distances are |a|^2 + |b|^2 - 2ab of tokens without their mean, in double every 128 channels; where that
// cancels, the tokens being near, the sum of squared differences. They exist once for up to 4,096 tokens, each pair
// computed once; beyond, a tile at a time and twice.
#pragma once

#include <cmath>
#include <memory>
#include <numeric>

#include "tiles.h"

namespace vtc {

constexpr int64_t WHOLE = 4096;
constexpr int64_t MR = 24;     // rows at a time
constexpr int64_t PART = 128;  // channels whose sum is a float
constexpr float NEAR = -1.0f;

// Bit j of out[b] says whether x[32 b + j] <= most, for b < blocks.
template <class V>
VTC_INLINE void below_body(const float* x, float most, int64_t blocks, uint32_t* out) {
  constexpr int L = V::lanes;
  typename V::F v, bound = typename V::F{} + most;
  typename V::I bit;
  for (int l = 0; l < L; ++l) bit[l] = 1 << l;
  for (int64_t b = 0; b < blocks; ++b) {
    typename V::I found = {};
    for (int s = 0; s < 32 / L; ++s) {
      load(v, x + 32 * b + s * L);
      found |= (v <= bound) & (bit << (s * L));
    }
    out[b] = 0;
    for (int l = 0; l < L; ++l) out[b] |= uint32_t(found[l]);
  }
}
VTC_KERNEL(below, (const float* x, float most, int64_t blocks, uint32_t* out), (x, most, blocks, out))

// out [m, NR] = own + theirs - 2 dot; NEAR where too little of it is left to be exact, 0 where it is nothing beside the
// tokens' own norms, `from` and `to`
template <class V>
VTC_INLINE void squares_body(const float* const* rows, int m, const float* packed, int64_t width, const double* own,
                             const double* theirs, const double* from, const double* to, float* out) {
  double total[MR * NR];
  const float* at[MR];
  const bool parts = width > PART;  // else the one float is the sum
  if (parts) std::fill(total, total + m * NR, 0.0);
  else tile_body<V>(rows, m, packed, width, out);
  for (int64_t k = 0; k < width && parts; k += PART) {
    for (int i = 0; i < m; ++i) at[i] = rows[i] + k;
    tile_body<V>(at, m, packed + k * NR, std::min(PART, width - k), out);
    for (int i = 0; i < m * NR; ++i) total[i] += double(out[i]);
  }
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < NR; ++j) {
      const double all = own[i] + theirs[j], dot = parts ? total[i * NR + j] : double(out[i * NR + j]);
      const double squared = all - 2.0 * dot;
      const float v = float(squared), some = v <= 1e-12 * (from[i] + to[j]) ? 0.0f : v;
      out[i * NR + j] = squared > 0.0625 * all ? some : NEAR;
    }
}
VTC_KERNEL(squares,
           (const float* const* rows, int m, const float* packed, int64_t width, const double* own, const double* theirs,
            const double* from, const double* to, float* out),
           (rows, m, packed, width, own, theirs, from, to, out))

// out[c] = the squared distance of a and b[c], added up as `dot` does, in double every PART channels; eight at a time,
// because one alone would wait for its own sums
template <class V>
VTC_INLINE void gaps_body(const float* a, const float* const* b, int count, int64_t width, float* out) {
  constexpr int L = V::lanes, G = 8;
  for (int c0 = 0; c0 < count; c0 += G) {
    const float* at[G];
    double total[G] = {};
    for (int g = 0; g < G; ++g) at[g] = b[std::min(c0 + g, count - 1)];
    for (int64_t k0 = 0; k0 < width; k0 += PART) {
      const int64_t end = std::min(width, k0 + PART), even = end - (end - k0) % (4 * L);
      float sum[G][L], part[G] = {};
      for (int s = 0; s < 4; ++s) {
        typename V::F here[G], x, y;
        for (int g = 0; g < G; ++g) here[g] = typename V::F{};
        for (int64_t k = k0 + s * L; k < even; k += 4 * L) {
          load(x, a + k);
          for (int g = 0; g < G; ++g) {
            load(y, at[g] + k);
            y = x - y;
            here[g] += y * y;
          }
        }
        for (int g = 0; g < G; ++g) {
          if (s > 0) load(y, sum[g]);
          store(sum[g], s > 0 ? y + here[g] : here[g]);
        }
      }
      for (int l = 0; l < L; ++l)
        for (int g = 0; g < G; ++g) part[g] += sum[g][l];
      for (int g = 0; g < G; ++g) {
        for (int64_t k = even; k < end; ++k) part[g] += (a[k] - at[g][k]) * (a[k] - at[g][k]);
        total[g] += double(part[g]);
      }
    }
    for (int g = 0; g < std::min(G, count - c0); ++g) out[c0 + g] = float(total[g]);
  }
}
VTC_KERNEL(gaps, (const float* a, const float* const* b, int count, int64_t width, float* out),
           (a, b, count, width, out))

// Of x [n] >= 0, where `beyond` is 0 and not infinity: the largest, and a bound of the k smallest, which is the k-th of
// the smallest of 16 parts; infinity for k > 16.
template <class V>
VTC_INLINE void bounds_body(const float* x, const float* beyond, int64_t n, int64_t k, float* largest, float* bound) {
  constexpr int L = V::lanes, S = 16 / L;
  using F = typename V::F;
  const F infinity = F{} + std::numeric_limits<float>::infinity();
  F most[S] = {}, least[S], v, w, kth = infinity;
  for (int s = 0; s < S; ++s) least[s] = infinity;
  int64_t j = 0;
  for (; j + S * L <= n; j += S * L)
    for (int s = 0; s < S; ++s) {
      load(v, x + j + s * L);
      load(w, beyond + j + s * L);
      const F high = v - w, low = v + w;
      most[s] = high > most[s] ? high : most[s];
      least[s] = low < least[s] ? low : least[s];
    }
  float smallest[16], all = 0.0f, first = infinity[0];
  for (int s = 0; s < S; ++s) store(smallest + s * L, least[s]);
  for (int s = 0; s < S; ++s) {
    typename V::I count = {};
    for (int p = 0; p < 16; ++p) count -= F{} + smallest[p] <= least[s];
    kth = (count >= int32_t(std::min<int64_t>(k, 17))) & (least[s] < kth) ? least[s] : kth;
    for (int l = 0; l < L; ++l) all = std::max(all, most[s][l]);
  }
  for (int l = 0; l < L; ++l) first = std::min(first, kth[l]);
  for (; j < n; ++j) all = std::max(all, x[j] - beyond[j]);
  *largest = all;
  *bound = first;
}
VTC_KERNEL(bounds, (const float* x, const float* beyond, int64_t n, int64_t k, float* largest, float* bound),
           (x, beyond, n, k, largest, bound))

// Where x is less than `least` it takes its place, and `number` that of `which`.
template <class V>
VTC_INLINE void nearer_body(const float* x, int32_t number, int64_t n, float* least, int32_t* which) {
  typename V::F v, have;
  typename V::I who;
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    load(v, x + i);
    load(have, least + i);
    load(who, which + i);
    store(which + i, v < have ? typename V::I{} + number : who);
    store(least + i, v < have ? v : have);
  }
  for (; i < n; ++i)
    if (x[i] < least[i]) {
      least[i] = x[i];
      which[i] = number;
    }
}
VTC_KERNEL(nearer, (const float* x, int32_t number, int64_t n, float* least, int32_t* which),
           (x, number, n, least, which))

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

// to [j, i] = from [i, j], in squares of four that are turned in registers
inline void turn(const float* from, int64_t m, int64_t count, float* to, int64_t stride) {
  typedef float Four __attribute__((vector_size(16)));
  for (int64_t i = 0; i < m; i += 4)
    for (int64_t j = 0; j < count; j += 4) {
      if (i + 4 > m || j + 4 > count) {
        for (int64_t q = j; q < std::min(count, j + 4); ++q)
          for (int64_t p = i; p < std::min(m, i + 4); ++p) to[q * stride + p] = from[p * NR + q];
        continue;
      }
      Four a, b, c, e;
      load(a, from + i * NR + j);
      load(b, from + (i + 1) * NR + j);
      load(c, from + (i + 2) * NR + j);
      load(e, from + (i + 3) * NR + j);
      for (int q = 0; q < 4; ++q) store(to + (j + q) * stride + i, Four{a[q], b[q], c[q], e[q]});
    }
}

// Squared distances of the tokens x [n, d] of one image.
struct Distances {
  const float* x;
  int64_t n, d;
  std::vector<float> middle;  // x without its mean, about: distances stay, products shrink
  std::vector<double> norm, norm_middle;
  std::vector<const float*> rows;
  std::vector<int64_t> all;
  std::unique_ptr<float[]> whole;  // [n, n] or null
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
      norm[i] = squared(x + i * d);
      norm_middle[i] = squared(rows[i]);
    }
    if (n > WHOLE) return;
    whole.reset(new float[n * n]);  // not filled: every place is written
    const auto fill = [&](int64_t a, int64_t b) {
      float out[MR * NR];
      for (int64_t i0 = a * MR; i0 < std::min(n, b * MR); i0 += MR) {
        const int64_t m = std::min(MR, n - i0);
        for (int64_t p = i0 / NR; p < columns.panels(); ++p) {
          const int64_t j0 = p * NR, count = std::min(NR, n - j0), first = std::max<int64_t>(0, i0 - j0);
          block(i0, int(m), columns.panel(p), all.data() + j0, count, out);
          for (int64_t i = 0; i < m; ++i) {
            float* to = &whole[(i0 + i) * n + j0];
            if (first == 0 && count == NR) std::memcpy(to, out + i * NR, NR * sizeof(float));  // a few moves, no call
            else std::copy(out + i * NR + first, out + i * NR + count, to + first);
          }
          const int64_t later = std::max<int64_t>(0, i0 + m - j0);
          if (later < count) turn(out + later, m, count - later, &whole[(j0 + later) * n + i0], n);
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

  // The squared norm of a token, in double every PART channels.
  double squared(const float* a) const {
    double sum = 0.0;
    for (int64_t k = 0; k < d; k += PART) sum += double(dot(a + k, a + k, std::min(PART, d - k)));
    return sum;
  }

  // out [m, NR]: rows i0 .. i0 + m against a panel, which packs the tokens at[0 .. count)
  void block(int64_t i0, int m, const float* panel, const int64_t* at, int64_t count, float* out) const {
    double theirs[NR] = {}, to[NR] = {};
    for (int64_t j = 0; j < count; ++j) {
      theirs[j] = norm_middle[at[j]];
      to[j] = norm[at[j]];
    }
    squares(rows.data() + i0, m, panel, d, norm_middle.data() + i0, theirs, norm.data() + i0, to, out);
    uint32_t near[MR];
    below(out, NEAR, m, near);
    for (int64_t i = 0; i < m; ++i) {
      int some = 0, column[NR];
      const float* beside[NR];
      float found[NR];
      for (; near[i] != 0; near[i] &= near[i] - 1) {
        const int j = __builtin_ctz(near[i]);
        if (j >= count) break;
        out[i * NR + j] = 0.0f;
        if (at[j] == i0 + i) continue;
        column[some] = j;
        beside[some++] = x + at[j] * d;
      }
      if (some > 0) gaps(x + (i0 + i) * d, beside, some, d, found);
      for (int c = 0; c < some; ++c)
        if (!(found[c] <= 1e-12 * (norm[i0 + i] + to[column[c]]))) out[i * NR + column[c]] = found[c];
    }
  }

  // The distances of rows i0 .. i0 + m to all; the start of row i0 + i is returned in `at`.
  void fetch(int64_t i0, int m, std::vector<float>& buffer, const float** at) const {
    for (int i = 0; i < m && whole; ++i) at[i] = whole.get() + (i0 + i) * n;
    if (whole) return;
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
  std::vector<float> rho(n, -infinity), score(n), widest_of(n, 0.0f), beyond(n);
  for (int64_t i = 0; i < n; ++i) beyond[i] = real(i) ? 0.0f : infinity;
  const int64_t blocks = (n + MR - 1) / MR;
  const auto densities = [&](int64_t a, int64_t b) {
    std::vector<float> buffer, least(looked);
    std::vector<uint32_t> bits(n / 32);
    const float* at[MR];
    for (int64_t i0 = a * MR; i0 < std::min(n, b * MR); i0 += MR) {
      const int m = int(std::min<int64_t>(MR, n - i0));
      distances.fetch(i0, m, buffer, at);
      for (int i = 0; i < m; ++i) {
        if (!real(i0 + i)) continue;
        float bound;
        bounds(at[i], beyond.data(), n, looked, &widest_of[i0 + i], &bound);
        std::fill(least.begin(), least.end(), infinity);
        const auto insert = [&](int64_t j) {
          const float v = at[i][j];
          if (!(v < least[looked - 1] && real(j))) return;
          int64_t place = looked - 1;
          for (; place > 0 && least[place - 1] > v; --place) least[place] = least[place - 1];
          least[place] = v;
        };
        below(at[i], bound, n / 32, bits.data());
        for (int64_t b = 0; b < n / 32; ++b)
          for (; bits[b] != 0; bits[b] &= bits[b] - 1) insert(32 * b + __builtin_ctz(bits[b]));
        for (int64_t j = n / 32 * 32; j < n; ++j) insert(j);
        float total = 0.0f;
        for (float v : least) total += v / float(d);
        rho[i0 + i] = -total / float(near);
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
  const bool known = distances.whole != nullptr;
  const Columns places(rows.data(), known ? 0 : count, d);
  const auto join = [&](int64_t a, int64_t b) {
    const int64_t start = a * MR, end = std::min(n, b * MR);
    std::vector<int32_t> which(end - start, -1);
    for (int64_t c = 0; c < count && known; ++c)  // a row of the centre is a column of it
      nearer(&distances.whole[centres[c] * n + start], int32_t(c), end - start, distance + start, which.data());
    for (int64_t i = start; i < end && known; ++i)
      if (which[i - start] >= 0) target[i] = centres[which[i - start]];
    for (int64_t i0 = start; i0 < end && !known; i0 += MR) {
      const int m = int(std::min<int64_t>(MR, n - i0));
      for (int64_t c0 = 0; c0 < count; c0 += NR) {
        float out[MR * NR];
        const int64_t some = std::min(NR, count - c0);
        distances.block(i0, m, places.panel(c0 / NR), centres.data() + c0, some, out);
        for (int i = 0; i < m; ++i)
          for (int64_t c = c0; c < c0 + some; ++c)
            if (const float v = out[i * NR + c - c0]; v < distance[i0 + i]) {
              distance[i0 + i] = v;
              target[i0 + i] = centres[c];
            }
      }
    }
  };
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
