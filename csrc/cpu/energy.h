// PiToMe's energy of every token, the similarities a tile at a time. Definition: vtc/ops/definitions.py, energy.
#pragma once

#include <cmath>

#include "tiles.h"

namespace vtc {

enum class Form { elu, paper, gaussian, nearest };

// exp(x), relative error below 3e-7: 2^n, n = round(x / ln 2), times a polynomial of the rest. Below -87 it is tiny.
template <class V>
VTC_INLINE typename V::F exponential(typename V::F x) {
  using F = typename V::F;
  using I = typename V::I;
  const F least = F{} - 87.0f, round = F{} + 12582912.0f;
  x = x < least ? least : x;
  const F n = (x * 1.44269504088896341f + round) - round;
  const F rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  const I power = (__builtin_convertvector(n, I) + 127) << 23;
  return y * (F)power;
}

template <class V>
VTC_INLINE typename V::F value(typename V::F s, Form form, float margin, float alpha, float sigma) {
  using F = typename V::F;
  const F zero = F{};
  if (form == Form::gaussian) {
    const F z = (1.0f - s) / sigma;
    return exponential<V>(-0.5f * z * z) / (sigma * 2.5066282746310002f);
  }
  const F d = s - margin, low = alpha * (exponential<V>(d < zero ? d : zero) - 1.0f);
  if (form == Form::elu) return d > zero ? d : low;
  return s >= margin + zero ? s : low;
}

// Every pair is computed once, for both its tokens: rows [block * ROWS, ...) of one image against the tokens from there
// on. unit [n, d], packed columns, mask [n] or null. own [ROWS]: what the rows get from themselves and later tokens;
// others [n]: what these tokens get from the rows. Sums (for `nearest` the largest) are double, so that copies of a token,
// whose values are added in other orders, have equal ones.
template <class V>
VTC_INLINE void energy_block_body(const float* unit, const Columns& columns, const bool* mask, int64_t block, Form form,
                                  double margin, float alpha, double* own, double* others) {
  using D = typename V::D;
  using F = typename V::F;
  using I = typename V::I;
  constexpr int L = V::lanes;
  const int64_t n = columns.count, d = columns.width, i0 = block * ROWS;
  const int m = int(std::min(ROWS, n - i0));
  const bool nearest = form == Form::nearest;
  const float sigma = float(1.0 - margin), edge = float(margin);  // of the rounded margin, sigma would lose its last digits
  const double nothing = nearest ? -2.0 : 0.0;
  float tile[ROWS * NR], weight[NR];
  double sums[ROWS * L];
  const float* rows[ROWS];
  for (int i = 0; i < m; ++i) rows[i] = unit + (i0 + i) * d;
  std::fill(sums, sums + ROWS * L, nothing);
  I lane;
  for (int l = 0; l < L; ++l) lane[l] = l;
  for (int64_t p = i0 / NR; p < columns.panels(); ++p) {
    const int64_t j0 = p * NR;
    const bool border = j0 < i0 + m;  // holds pairs of a token with itself, and with earlier ones
    tile_body<V>(rows, m, columns.panel(p), d, tile);
    for (int64_t j = 0; j < NR; ++j) weight[j] = j0 + j < n && (mask == nullptr || mask[j0 + j]) ? 1.0f : 0.0f;
    for (int64_t i = 0; i < m && border; ++i) {
      const int64_t self = i0 + i - j0;  // its own column: it counts for the row alone, those before it for nobody
      if (self >= 0 && self < NR) tile[i * NR + self] = std::nearbyint(dot(rows[i], rows[i], d));
    }
    const bool plain = !border && mask == nullptr && j0 + NR <= n;
    D column[NR / L] = {};
    F top[NR / L];
    for (F& t : top) t = F{} - 2.0f;
    for (int i = 0; i < m; ++i) {  // lane by lane, in an order that never changes
      D sum;
      load(sum, sums + i * L);
      F most = __builtin_convertvector(sum, F);
      const F there = F{} + (mask == nullptr || mask[i0 + i] ? 1.0f : 0.0f);
      for (int j = 0; j < NR; j += L) {
        F s, mine, theirs = there;
        load(s, tile + i * NR + j);
        load(mine, weight + j);
        if (border) {
          const I past = lane + int32_t(j0 + j - i0 - i);  // columns past the row's own
          theirs = past > 0 ? theirs : F{};
          mine = past > (nearest ? 0 : -1) ? mine : F{};
        }
        if (nearest) {
          const F a = mine > F{} ? s : F{} - 2.0f, b = theirs > F{} ? s : F{} - 2.0f;
          most = a > most ? a : most;
          top[j / L] = b > top[j / L] ? b : top[j / L];
        } else {
          s = value<V>(s, form, edge, alpha, sigma);
          const D v = __builtin_convertvector(plain ? s : mine * s, D);
          sum += v;
          column[j / L] += plain ? v : __builtin_convertvector(theirs * s, D);
        }
      }
      if (nearest) sum = __builtin_convertvector(most, D);
      store(sums + i * L, sum);
    }
    for (int j = 0; j < NR; j += L) {
      if (nearest) column[j / L] = __builtin_convertvector(top[j / L], D);
      for (int64_t l = 0; l < std::min<int64_t>(L, n - j0 - j); ++l) others[j0 + j + l] = column[j / L][l];
    }
  }
  for (int i = 0; i < m; ++i) {
    double* mine = sums + i * L;
    for (int step = L / 2; step; step /= 2)
      for (int l = 0; l < step; ++l) mine[l] = nearest ? std::max(mine[l], mine[l + step]) : mine[l] + mine[l + step];
    own[i] = mine[0];
  }
}
VTC_KERNEL(energy_block,
           (const float* unit, const Columns& columns, const bool* mask, int64_t block, Form form, double margin, float alpha,
            double* own, double* others),
           (unit, columns, mask, block, form, margin, alpha, own, others))

// One image: unit [n, d] -> out [n]. The parts of all blocks are added in their order, whoever computed them.
inline void energy(const float* unit, int64_t n, int64_t d, const bool* mask, Form form, double margin, float alpha,
                   float* out) {
  const Columns columns(pointers(unit, n, d).data(), n, d);
  const int64_t blocks = (n + ROWS - 1) / ROWS, half = (blocks + 1) / 2;
  std::vector<double> own(blocks * ROWS), others(blocks * n);
  const auto some = [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      energy_block(unit, columns, mask, b, form, margin, alpha, own.data() + b * ROWS, others.data() + b * n);
  };
  const auto both = [&](int64_t first, int64_t last) {  // the first blocks have the most pairs: even parts, even work
    some(first, last);
    some(std::max(blocks - last, half), blocks - first);
  };
  VTC_PARALLEL(0, half, 1, both);
  const int64_t real = mask == nullptr ? n : std::count(mask, mask + n, true);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = b * ROWS; i < n; ++i)
      own[i] = form == Form::nearest ? std::max(own[i], others[b * n + i]) : own[i] + others[b * n + i];
  for (int64_t i = 0; i < n; ++i) {
    out[i] = float(form == Form::nearest ? own[i] : own[i] / double(std::max<int64_t>(1, real)));
    if (mask != nullptr && !mask[i]) out[i] = -std::numeric_limits<float>::infinity();
  }
}

}  // namespace vtc
