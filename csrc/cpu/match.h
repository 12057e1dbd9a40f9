// The best partner of every source token, no N x N matrix in memory. Definition: vtc/ops/definitions.py, best_partner.
#pragma once

#include <utility>

#include "tiles.h"

namespace vtc {

// Sources [first, last) of one image against its packed targets; target_valid [targets.count] or null.
// best: the highest score, -inf without a target; at: its number among the targets, the lowest of equals.
template <class V>
VTC_INLINE void match_rows_body(const float* const* sources, int64_t first, int64_t last, const Columns& targets,
                                const bool* target_valid, float* best, int64_t* at) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr int L = V::lanes;
  const float none = -std::numeric_limits<float>::infinity();
  float tile[ROWS * NR], top[ROWS * NR];
  int32_t where[ROWS * NR];
  I lane;
  for (int l = 0; l < L; ++l) lane[l] = l;
  for (int64_t i0 = first; i0 < last; i0 += ROWS) {
    const int m = int(std::min(ROWS, last - i0));
    std::fill(top, top + m * NR, none);
    std::fill(where, where + m * NR, 0);
    for (int64_t p = 0; p < targets.panels(); ++p) {
      const int64_t j0 = p * NR, count = std::min(NR, targets.count - j0);
      tile_body<V>(sources + i0, m, targets.panel(p), targets.width, tile);
      if (count < NR || target_valid != nullptr)
        for (int64_t j = 0; j < NR; ++j)
          if (j >= count || (target_valid != nullptr && !target_valid[j0 + j]))
            for (int i = 0; i < m; ++i) tile[i * NR + j] = none;
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < NR; j += L) {  // lane by lane; a strict comparison keeps the earlier of equals
          F s, high;
          I place;
          load(s, tile + i * NR + j);
          load(high, top + i * NR + j);
          std::memcpy(&place, where + i * NR + j, sizeof place);
          const I more = s > high;
          place = more ? lane + int32_t(j0 + j) : place;
          high = more ? s : high;
          store(top + i * NR + j, high);
          std::memcpy(where + i * NR + j, &place, sizeof place);
        }
    }
    for (int i = 0; i < m; ++i) {
      float* high = top + i * NR;
      int32_t* place = where + i * NR;
      for (int step = NR / 2; step; step /= 2)
        for (int j = 0; j < step; ++j) {
          const bool other = high[j + step] > high[j] || (high[j + step] == high[j] && place[j + step] < place[j]);
          high[j] = other ? high[j + step] : high[j];
          place[j] = other ? place[j + step] : place[j];
        }
      best[i0 + i] = high[0];
      at[i0 + i] = place[0];
    }
  }
}
VTC_KERNEL(match_rows,
           (const float* const* sources, int64_t first, int64_t last, const Columns& targets, const bool* target_valid,
            float* best, int64_t* at),
           (sources, first, last, targets, target_valid, best, at))

// Whether p comes before q where the highest comes first; a NaN is the highest there is, as torch sorts it.
inline bool higher(float p, float q) {
  const bool wild = p != p, other = q != q;
  return wild != other ? wild : p > q;
}

// The same of the p_at-th and the q_at-th: of equals the first.
inline bool before(float p, int64_t p_at, float q, int64_t q_at) {
  return higher(p, q) || (!higher(q, p) && p_at < q_at);
}

// The `most` best pairs of one image, of which `each` exist: sources a, their partners b[at], scores best [n]. Best
// first, of equals the first; what is not valid or -inf is no pair.
inline void top_pairs(const float* best, const int64_t* at, const int64_t* a, const int64_t* b, const bool* valid, int64_t n,
                      int64_t each, int64_t most, int64_t* source, int64_t* target, float* score) {
  const float none = -std::numeric_limits<float>::infinity();
  std::vector<std::pair<float, int64_t>> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = {valid == nullptr || valid[i] ? best[i] : none, i};
  const int64_t count = std::max<int64_t>(0, std::min(each, most));
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [](const auto& p, const auto& q) {
    return before(p.first, p.second, q.first, q.second);
  });
  for (int64_t k = 0; k < most; ++k) {
    const bool there = k < count && order[k].first != none;
    source[k] = there ? a[order[k].second] : -1;
    target[k] = there ? b[at[order[k].second]] : -1;
    score[k] = there ? order[k].first : none;
  }
}

}  // namespace vtc
