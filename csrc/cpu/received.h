// What every key receives of softmax(q k^T scale), summed over the queries. Definition: vtc/ops/definitions.py,
// attention_received.
#pragma once

#include "energy.h"

namespace vtc {

// One head of one image: queries [m, d], packed keys; key_real, query_real [n], [m] or null; sum [n] grows by the shares.
// The logits of ROWS queries exist at a time.
template <class V>
VTC_INLINE void received_head_body(const float* queries, int64_t m, const Columns& keys, const bool* key_real,
                                   const bool* query_real, float scale, float* sum) {
  using F = typename V::F;
  constexpr int L = V::lanes;
  const int64_t d = keys.width, panels = keys.panels();
  const float lowest = std::numeric_limits<float>::lowest();
  std::vector<float> logits(panels * ROWS * NR), real(panels * NR), total(panels * NR, 0.0f);
  for (int64_t j = 0; j < panels * NR; ++j) real[j] = j < keys.count && (key_real == nullptr || key_real[j]) ? 1.0f : 0.0f;
  for (int64_t i0 = 0; i0 < m; i0 += ROWS) {
    const int rows = int(std::min(ROWS, m - i0));
    const float* at[ROWS];
    for (int i = 0; i < rows; ++i) at[i] = queries + (i0 + i) * d;
    for (int64_t p = 0; p < panels; ++p) tile_body<V>(at, rows, keys.panel(p), d, logits.data() + p * ROWS * NR);
    for (int i = 0; i < rows; ++i) {
      if (query_real != nullptr && !query_real[i0 + i]) continue;
      F peaks = F{} + lowest, sums = F{};
      F v, w;
      float* const mine = logits.data() + i * NR;  // of panel p: from p * ROWS * NR on
      for (int64_t j = 0; j < panels * NR; j += L) {
        float* s = mine + j / NR * ROWS * NR + j % NR;
        load(v, s);
        load(w, real.data() + j);
        v = w > F{} ? v * scale : F{} + lowest;
        store(s, v);
        peaks = v > peaks ? v : peaks;
      }
      float peak = lowest, all = 0.0f;
      for (int l = 0; l < L; ++l) peak = std::max(peak, peaks[l]);
      for (int64_t j = 0; j < panels * NR; j += L) {
        float* s = mine + j / NR * ROWS * NR + j % NR;
        load(v, s);
        load(w, real.data() + j);
        v = exponential<V>(v - peak) * w;
        store(s, v);
        sums += v;
      }
      for (int l = 0; l < L; ++l) all += sums[l];
      if (all == 0.0f) continue;  // no real key
      for (int64_t j = 0; j < panels * NR; j += L) {
        load(v, mine + j / NR * ROWS * NR + j % NR);
        load(w, total.data() + j);
        store(total.data() + j, w + v * (1.0f / all));
      }
    }
  }
  std::copy(total.begin(), total.begin() + keys.count, sum);
}
VTC_KERNEL(received_head,
           (const float* queries, int64_t m, const Columns& keys, const bool* key_real, const bool* query_real, float scale,
            float* sum),
           (queries, m, keys, key_real, query_real, scale, sum))

}  // namespace vtc
