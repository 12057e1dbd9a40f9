// One round of pairwise merging: unit vectors, energies, two sets, partners, the best pairs, slots and sizes. Definition:
// vtc/ops/definitions.py, pair_round.
#pragma once

#include <cmath>
#include <numeric>

#include "energy.h"
#include "match.h"

namespace vtc {

struct Round {
  int64_t r, prefix;
  bool sorted;  // by energy; otherwise the tokens are taken as they stand
  Form form;
  double margin;
  float alpha;
  bool half, protect;
};

// One image's tokens, of one head or several: value k of head h of token i lies at x[i * token + h * head + k].
struct Heads {
  const float* x;
  int64_t count, token, head;
};

// -> unit [n, d], the mean over heads, normalised; a zero vector stays zero.
inline void normalize(const Heads& from, int64_t n, int64_t d, float* unit) {
  const auto some = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float* x = from.x + i * from.token;
      float* y = unit + i * d;
      std::copy(x, x + d, y);
      for (int64_t h = 1; h < from.count; ++h)
        for (int64_t k = 0; k < d; ++k) y[k] += x[h * from.head + k];
      if (from.count > 1)
        for (int64_t k = 0; k < d; ++k) y[k] /= float(from.count);
      const float norm = std::max(std::sqrt(dot(y, y, d)), 1e-12f);
      for (int64_t k = 0; k < d; ++k) y[k] /= norm;
    }
  };
  VTC_PARALLEL(0, n, 64, some);
}

// The two sets of n tokens, ascending.
inline void sides(const float* unit, int64_t n, int64_t d, const Round& how, std::vector<int64_t>& a, std::vector<int64_t>& b) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (!how.sorted) {
    for (const int64_t i : order) ((i + how.prefix) % 2 ? b : a).push_back(i);
    return;
  }
  std::vector<float> high(n);
  energy(unit, n, d, nullptr, how.form, how.margin, how.alpha, high.data());
  std::stable_sort(order.begin(), order.end(), [&](int64_t p, int64_t q) { return higher(high[p], high[q]); });
  if (how.half || how.protect) order.resize(std::min(n, 2 * how.r));
  for (int64_t rank = 0; rank < int64_t(order.size()); ++rank)
    ((how.half ? rank < how.r : rank % 2 == 0) ? a : b).push_back(order[rank]);
  std::sort(a.begin(), a.end());
  std::sort(b.begin(), b.end());
}

// One image: metric of n tokens of d values, weight [n] or null, prefix included -> group [n], size [n - r], source [r]
// (counted behind the prefix), score [r].
inline void pair_round(const Heads& metric, const float* weight, int64_t n, int64_t d, const Round& how, int64_t* group,
                       float* size, int64_t* source, float* score) {
  const int64_t inside = n - how.prefix;
  std::vector<char> joined(n, 0);
  std::vector<int64_t> target(how.r);
  if (how.r > 0) {
    std::vector<float> unit(inside * d), best;
    std::vector<int64_t> a, b, at;
    normalize({metric.x + how.prefix * metric.token, metric.count, metric.token, metric.head}, inside, d, unit.data());
    sides(unit.data(), inside, d, how, a, b);
    std::vector<const float*> rows, columns;
    for (const int64_t i : a) rows.push_back(unit.data() + i * d);
    for (const int64_t i : b) columns.push_back(unit.data() + i * d);
    best.resize(a.size());
    at.resize(a.size());
    const Columns packed(columns.data(), int64_t(b.size()), d);
    const auto part = [&](int64_t from, int64_t to) {
      match_rows(rows.data(), from * ROWS, std::min(int64_t(a.size()), to * ROWS), packed, nullptr, best.data(), at.data());
    };
    VTC_PARALLEL(0, (int64_t(a.size()) + ROWS - 1) / ROWS, 1, part);
    std::vector<int64_t> order(a.size());
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + how.r, order.end(), [&](int64_t p, int64_t q) {
      return before(best[p], p, best[q], q);
    });
    for (int64_t k = 0; k < how.r; ++k) {
      source[k] = a[order[k]];
      target[k] = b[at[order[k]]];
      score[k] = best[order[k]];
      joined[how.prefix + source[k]] = 1;
    }
  }
  int64_t slot = 0;
  for (int64_t i = 0; i < n; ++i)
    if (!joined[i]) group[i] = slot++;
  for (int64_t k = 0; k < how.r; ++k) group[how.prefix + source[k]] = group[how.prefix + target[k]];
  std::fill(size, size + slot, 0.0f);
  for (int64_t i = 0; i < n; ++i) size[group[i]] += weight == nullptr ? 1.0f : weight[i];
}

}  // namespace vtc
