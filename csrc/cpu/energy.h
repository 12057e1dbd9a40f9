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

// Tokens [first, last) of one image: unit [n, d], packed columns, mask [n] or null -> out [n].
template <class V>
VTC_INLINE void energy_rows_body(const float* unit, const Columns& columns, const bool* mask, int64_t first, int64_t last,
                                 int64_t n, int64_t d, Form form, float margin, float alpha, float* out) {
  using F = typename V::F;
  constexpr int L = V::lanes;
  const float sigma = 1.0f - margin;
  float tile[ROWS * NR], sums[ROWS * NR], weight[NR];
  int64_t real = 0;
  for (int64_t j = 0; j < n; ++j) real += mask == nullptr || mask[j];
  for (int64_t i0 = first; i0 < last; i0 += ROWS) {
    const int m = int(std::min(ROWS, last - i0));
    const float* rows[ROWS];
    float itself[ROWS];
    for (int i = 0; i < m; ++i) {
      rows[i] = unit + (i0 + i) * d;
      itself[i] = form == Form::nearest ? -2.0f : std::nearbyint(dot(rows[i], rows[i], d));
    }
    std::fill(sums, sums + ROWS * NR, form == Form::nearest ? -2.0f : 0.0f);
    for (int64_t p = 0; p < columns.panels(); ++p) {
      const int64_t j0 = p * NR, count = std::min(NR, n - j0);
      tile_body<V, false>(rows, m, columns.panel(p), d, tile);
      for (int64_t j = 0; j < NR; ++j) weight[j] = j < count && (mask == nullptr || mask[j0 + j]) ? 1.0f : 0.0f;
      for (int i = 0; i < m; ++i)
        if (i0 + i >= j0 && i0 + i < j0 + count) tile[i * NR + i0 + i - j0] = itself[i];
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < NR; j += L) {  // lane by lane, in an order that never changes
          F s, sum, w;
          load(s, tile + i * NR + j);
          load(sum, sums + i * NR + j);
          load(w, weight + j);
          if (form == Form::nearest) {
            s = w > F{} ? s : F{} - 2.0f;
            sum = s > sum ? s : sum;
          } else sum += w * value<V>(s, form, margin, alpha, sigma);
          store(sums + i * NR + j, sum);
        }
    }
    for (int i = 0; i < m; ++i) {
      float* mine = sums + i * NR;
      for (int64_t step = NR / 2; step; step /= 2)
        for (int64_t j = 0; j < step; ++j)
          mine[j] = form == Form::nearest ? std::max(mine[j], mine[j + step]) : mine[j] + mine[j + step];
      const float all = form == Form::nearest ? mine[0] : mine[0] / float(std::max<int64_t>(1, real));
      out[i0 + i] = mask == nullptr || mask[i0 + i] ? all : -std::numeric_limits<float>::infinity();
    }
  }
}
VTC_KERNEL(energy_rows,
           (const float* unit, const Columns& columns, const bool* mask, int64_t first, int64_t last, int64_t n, int64_t d,
            Form form, float margin, float alpha, float* out),
           (unit, columns, mask, first, last, n, d, form, margin, alpha, out))

}  // namespace vtc
