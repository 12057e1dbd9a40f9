// Greedy selections, lazily. A score only falls while tokens are picked, so one that was computed earlier is an upper
// bound: the token with the highest bound is brought up to date, and picked if it still has the highest. The picks are
// those of the full computation, for a part of the dot products. Definitions: vtc/ops/selection.py.
#pragma once

#include <cmath>
#include <queue>

#include "tiles.h"

namespace vtc {

enum class Kind { mmr, sads, max_min };

struct Entry {
  float bound;
  int64_t token;
  bool operator<(const Entry& other) const {  // the top of the queue: the highest bound, then the lowest token
    return bound < other.bound || (bound == other.bound && token > other.token);
  }
};

// As torch.nan_to_num of the definition: a NaN is the lowest there is, infinities are finite.
inline float ranked(float score) {
  const float most = std::numeric_limits<float>::max();
  return std::isnan(score) ? -most : std::min(std::max(score, -most), most);
}

constexpr int64_t FEW = 2;        // candidates that are brought up to date together
constexpr int64_t MANY = 96;      // and when NR picks are new
constexpr int64_t SHARE = 24;     // of them, what a thread takes at a time
constexpr int64_t SEPARATE = 8;   // up to as many products one by one cost less than NR in a tile
using Queue = std::priority_queue<Entry>;

// All that is left in the queue has to be looked at anew.
inline void forget(Queue& queue) {
  std::vector<Entry> rest;
  for (; !queue.empty(); queue.pop()) rest.push_back({std::numeric_limits<float>::infinity(), queue.top().token});
  queue = Queue(std::less<Entry>(), std::move(rest));
}

// Up to `most` entries from the top of the queue that are not up to date.
template <class Fresh>
void take_stale(Queue& queue, std::vector<Entry>& panel, int64_t most, Fresh fresh) {
  for (panel.clear(); !queue.empty() && int64_t(panel.size()) < most && !fresh(queue.top().token); queue.pop())
    panel.push_back(queue.top());
}

// first: the score of the picks of the first round; importance: null for max_min. `step` picks a round, which do not see
// each other. order [most], of which `count` are filled, -1 behind.
inline void greedy(const float* unit, int64_t n, int64_t d, const float* first, const float* importance, Kind kind,
                   float balance, int64_t step, int64_t count, int64_t most, const bool* mask, int64_t* order) {
  std::vector<float> closest(n, -1.0f);  // the highest cosine to the first `seen` picks
  std::vector<int64_t> seen(n, 0), picks;
  std::vector<Entry> start, panel;
  bool falls = balance >= 0.0f && balance <= 1.0f;
  for (int64_t i = 0; i < n; ++i) {
    if (mask != nullptr && !mask[i]) continue;
    start.push_back({ranked(first[i]), i});
    falls = falls && (kind != Kind::sads || importance[i] >= 0.0f);
  }
  Queue queue(std::less<Entry>(), std::move(start));
  Columns picked(count, d);
  const auto pack = [&](int64_t p) {
    const float* rows[NR];
    for (int64_t j = 0; j < NR; ++j) rows[j] = unit + picks[p * NR + j] * d;
    picked.pack(p, rows);
  };
  auto score = [&](int64_t i) {
    const float m = closest[i];
    if (kind == Kind::mmr) return ranked(balance * importance[i] - (1.0f - balance) * m);
    if (kind == Kind::sads) return ranked(importance[i] * (1.0f - m));
    return ranked(-m);
  };
  for (int64_t known = 0, packed = 0; int64_t(picks.size()) < count;) {
    if (!picks.empty() && int64_t(picks.size()) % step == 0) {
      if (known == 0 || !falls) forget(queue);  // the first round went by other scores
      known = int64_t(picks.size());
    }
    auto fresh = [&](int64_t i) { return seen[i] == known; };
    // Candidates [first, last) of the panel meet the picks they have not seen: NR together where these are packed and
    // mostly new, else one by one.
    const auto update = [&](int64_t first, int64_t last) {
      float tile[ROWS * NR];
      const float* rows[ROWS];
      int64_t from = known, behind[ROWS];
      for (int64_t p = first; p < last; ++p) from = std::min(from, seen[panel[p].token]);
      for (int64_t t0 = from / NR * NR; t0 < known; t0 += NR) {
        const int64_t t1 = std::min(known, t0 + NR);
        int m = 0;
        for (int64_t p = first; p < last; ++p) {
          const int64_t i = panel[p].token, unseen = t1 - std::max(t0, seen[i]);
          if (t1 <= packed && unseen > SEPARATE) {
            rows[m] = unit + i * d;
            behind[m++] = i;
          } else {
            for (int64_t t = t1 - unseen; t < t1; ++t)
              closest[i] = std::max(closest[i], same(dot(unit + i * d, unit + picks[t] * d, d)));
          }
        }
        if (m > 0) dots(rows, m, picked.panel(t0 / NR), d, tile);
        for (int r = 0; r < m; ++r)
          for (int64_t t = std::max(t0, seen[behind[r]]); t < t1; ++t)
            closest[behind[r]] = std::max(closest[behind[r]], same(tile[r * NR + t - t0]));
      }
      for (int64_t p = first; p < last; ++p) {
        seen[panel[p].token] = known;
        panel[p].bound = score(panel[p].token);
      }
    };
    // Once in NR picks many candidates meet the new ones together, while these are near, in all threads; in between a few
    // at a time in one, because waiting for one another so often would cost more.
    if (known - packed >= NR) {
      for (; packed + NR <= known; packed += NR) pack(packed / NR);
      take_stale(queue, panel, MANY, fresh);
      const auto some = [&](int64_t first, int64_t last) {
        for (int64_t at = first; at < last; ++at)
          update(at * SHARE, std::min(int64_t(panel.size()), at * SHARE + SHARE));
      };
      VTC_PARALLEL(0, (int64_t(panel.size()) + SHARE - 1) / SHARE, 1, some);
      for (const Entry& e : panel) queue.push(e);
    }
    while (!fresh(queue.top().token)) {
      take_stale(queue, panel, FEW, fresh);
      update(0, int64_t(panel.size()));
      for (const Entry& e : panel) queue.push(e);
    }
    picks.push_back(queue.top().token);
    queue.pop();
  }
  for (int64_t k = 0; k < most; ++k) order[k] = k < count ? picks[k] : -1;
}

constexpr float SPANNED = 1e-5f;

// The most likely set of a determinantal point process with kernel r_i cos_ij r_j. A token's row of the Cholesky factor
// is extended only when its bound comes to the top.
inline void dpp(const float* unit, int64_t n, int64_t d, const float* relevance, int64_t count, int64_t most,
                const bool* mask, int64_t* order) {
  std::vector<float> own(n), left(n);
  std::vector<std::vector<float>> factor(n);
  std::vector<float> pivot;  // of every pick, when it was picked
  std::vector<int64_t> picks;
  std::vector<Entry> start, panel;
  for (int64_t i = 0; i < n; ++i) {
    if (mask != nullptr && !mask[i]) continue;
    own[i] = relevance[i] * relevance[i] * std::nearbyint(dot(unit + i * d, unit + i * d, d));
    left[i] = own[i] > SPANNED * own[i] ? own[i] : 0.0f;
    start.push_back({ranked(left[i]), i});
  }
  Queue queue(std::less<Entry>(), std::move(start));
  while (int64_t(picks.size()) < count) {
    const int64_t known = int64_t(picks.size());
    auto fresh = [&](int64_t i) { return int64_t(factor[i].size()) == known; };
    while (!fresh(queue.top().token)) {
      take_stale(queue, panel, FEW, fresh);
      for (Entry& e : panel) {
        const int64_t i = e.token;
        std::vector<float>& row = factor[i];
        row.reserve(known);
        for (int64_t t = int64_t(row.size()); t < known; ++t) {
          const int64_t j = picks[t];
          float entry = 0.0f;
          if (pivot[t] > 0.0f) {
            const float c = same(dot(unit + i * d, unit + j * d, d));
            entry = (relevance[j] * c * relevance[i] - dot(row.data(), factor[j].data(), t)) / std::sqrt(pivot[t]);
          }
          row.push_back(entry);
          left[i] -= entry * entry;
          left[i] = left[i] > SPANNED * own[i] ? left[i] : 0.0f;
        }
        e.bound = ranked(left[i]);
      }
      for (const Entry& e : panel) queue.push(e);
    }
    pivot.push_back(left[queue.top().token]);
    picks.push_back(queue.top().token);
    queue.pop();
  }
  for (int64_t k = 0; k < most; ++k) order[k] = k < count ? picks[k] : -1;
}

}  // namespace vtc
