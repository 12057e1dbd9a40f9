// All cosines of an image, and what needs as large a table at once: selection by coverage, and by dropping duplicates.
// Definitions: vtc/ops/selection.py, cosines, cover_select and distinct_select.
#pragma once

#include <numeric>

#include "match.h"
#include "select.h"

namespace vtc {

// The columns that a mask [n] marks, or all of them.
inline std::vector<int64_t> marked(const bool* mask, int64_t n) {
  std::vector<int64_t> real;
  for (int64_t i = 0; i < n; ++i)
    if (mask == nullptr || mask[i]) real.push_back(i);
  return real;
}

// All dot products of unit's rows `real`, each pair computed once: of row real[i] with real[j] at [place(i), place(j)] of
// table, which is `stride` wide.
template <class P>
inline void all_pairs(const float* unit, const std::vector<int64_t>& real, int64_t d, int64_t stride, const P& place,
                      float* table) {
  const int64_t n = int64_t(real.size());
  std::vector<const float*> rows(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = unit + real[i] * d;
  const Columns columns(rows.data(), n, d);
  const int64_t blocks = (n + ROWS - 1) / ROWS, half = (blocks + 1) / 2;
  const auto some = [&](int64_t first, int64_t last) {
    float tile[ROWS * NR];
    for (int64_t block = first; block < last; ++block) {
      const int64_t i0 = block * ROWS, m = std::min<int64_t>(ROWS, n - i0);
      for (int64_t j0 = i0 / NR * NR; j0 < n; j0 += NR) {
        dots(rows.data() + i0, int(m), columns.panel(j0 / NR), d, tile);
        for (int64_t i = i0; i < i0 + m; ++i)
          for (int64_t j = std::max(j0, i); j < std::min(n, j0 + NR); ++j) {
            const float c = same(tile[(i - i0) * NR + j - j0]);
            table[place(i) * stride + place(j)] = table[place(j) * stride + place(i)] = c;
          }
      }
    }
  };
  const auto both = [&](int64_t first, int64_t last) {  // the first blocks have the most pairs: even parts, even work
    some(first, last);
    some(std::max(blocks - last, half), blocks - first);
  };
  VTC_PARALLEL(0, half, 1, both);
}

template <class V>
VTC_INLINE void uncovered_body(const float* gain, const float* cover, int64_t n, float* out) {
  typename V::F sum = {}, zero = {};
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    typename V::F c, have;
    load(c, gain + i);
    load(have, cover + i);
    c -= have;
    sum += c > zero ? c : zero;
  }
  float total = 0;
  for (int l = 0; l < V::lanes; ++l) total += sum[l];
  for (; i < n; ++i) total += std::max(0.0f, gain[i] - cover[i]);
  *out = total;
}
VTC_KERNEL(uncovered, (const float* gain, const float* cover, int64_t n, float* out), (gain, cover, n, out))

// Each pick covers the most of what is not covered, times its weight [n] (null: 1). gains [n, items]: how much each token
// covers of each item; those that `wanted` [items] leaves out need not be covered. A gain only shrinks, so one that was
// computed earlier is an upper bound. order [most], of which `count` are filled, -1 behind.
inline void coverage(const float* gains, int64_t n, int64_t items, const float* weight, int64_t count, int64_t most,
                     const bool* mask, const bool* wanted, int64_t* order) {
  const std::vector<int64_t> real = marked(mask, n), columns = marked(wanted, items);
  const int64_t m = int64_t(real.size()), width = int64_t(columns.size());
  std::vector<float> packed, cover(width, 0.0f);
  std::vector<const float*> rows(m);
  if (width < items) packed.resize(m * width);
  for (int64_t i = 0; i < m; ++i) {
    rows[i] = gains + real[i] * items;
    if (width == items) continue;
    float* to = packed.data() + i * width;
    for (int64_t k = 0; k < width; ++k) to[k] = rows[i][columns[k]];
    rows[i] = to;
  }
  std::vector<Entry> entries(m);
  std::vector<int64_t> seen(m, 0);
  const auto gain = [&](int64_t i) {
    float sum;
    uncovered(rows[i], cover.data(), width, &sum);
    return ranked(weight == nullptr ? sum : weight[real[i]] * sum);
  };
  const auto first = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) entries[i] = {gain(i), i};
  };
  VTC_PARALLEL(0, m, 64, first);
  Queue queue(std::less<Entry>(), std::move(entries));
  for (int64_t k = 0; k < most; ++k) {
    if (k >= count) {
      order[k] = -1;
      continue;
    }
    while (seen[queue.top().token] < k) {
      Entry top = queue.top();
      queue.pop();
      seen[top.token] = k;
      top.bound = gain(top.token);
      queue.push(top);
    }
    const int64_t pick = queue.top().token;
    queue.pop();
    order[k] = real[pick];
    for (int64_t i = 0; i < width; ++i) cover[i] = std::max(cover[i], rows[pick][i]);
  }
}

constexpr int64_t NEIGHBOURS = 32;  // of a token, that are sorted
constexpr int64_t PER_ROUND = 8;    // duplicates dropped at a time

// Of the chosen tokens, every second one against the others, the PER_ROUND most similar to one of these are dropped, until
// `count` are left; chosen [n] is changed.
inline void distinct(const float* unit, int64_t n, int64_t d, int64_t count, bool* chosen) {
  const std::vector<int64_t> real = marked(chosen, n);
  const int64_t m = int64_t(real.size());
  if (count <= 0) std::fill(chosen, chosen + n, false);
  if (count <= 0 || m <= count) return;
  std::vector<float> table(m * m);
  all_pairs(unit, real, d, m, [](int64_t i) { return i; }, table.data());
  const int64_t near = std::min(NEIGHBOURS, m - 1);
  std::vector<int32_t> neighbours(m * near);
  const auto sorted = [&](int64_t from, int64_t to) {
    std::vector<int32_t> others(m - 1);
    for (int64_t i = from; i < to; ++i) {
      const float* row = table.data() + i * m;
      for (int32_t j = 0, at = 0; j < m; ++j)
        if (j != i) others[at++] = j;
      std::partial_sort(others.begin(), others.begin() + near, others.end(), [&](int32_t p, int32_t q) {
        return before(row[p], p, row[q], q);
      });
      std::copy(others.begin(), others.begin() + near, neighbours.begin() + i * near);
    }
  };
  VTC_PARALLEL(0, m, 16, sorted);
  std::vector<int64_t> left(m), sources, targets;
  std::iota(left.begin(), left.end(), 0);
  std::vector<char> side(m);  // 1: a target of this round
  std::vector<std::pair<float, int64_t>> best;
  while (int64_t(left.size()) > count) {
    const int64_t size = int64_t(left.size()), drop = std::min({PER_ROUND, size / 2, size - count});
    if (drop == 0) break;
    sources.clear(), targets.clear(), best.clear();
    for (int64_t k = 0; k < size; ++k) (k % 2 ? targets : sources).push_back(left[k]), side[left[k]] = k % 2;
    for (const int64_t i : sources) {
      const float* row = table.data() + i * m;
      float high = -std::numeric_limits<float>::infinity();
      bool found = false;
      for (int64_t k = 0; k < near && !found; ++k) {
        const int64_t j = neighbours[i * near + k];
        found = side[j] == 1;
        if (found) high = row[j];
      }
      for (int64_t k = 0; k < int64_t(targets.size()) && !found; ++k) high = std::max(high, row[targets[k]]);
      best.push_back({high, i});
    }
    std::partial_sort(best.begin(), best.begin() + drop, best.end(), [](const auto& p, const auto& q) {
      return before(p.first, p.second, q.first, q.second);
    });
    for (int64_t k = 0; k < drop; ++k) {
      chosen[real[best[k].second]] = false;
      side[best[k].second] = 2;
    }
    left.erase(std::remove_if(left.begin(), left.end(), [&](int64_t i) { return side[i] == 2; }), left.end());
  }
}

}  // namespace vtc
