// Scores shifted and scaled to [0, 1] by the lowest and the highest real one. Definition: vtc/ops/definitions.py, minmax.
#pragma once

#include <limits>

namespace vtc {

// scores [n] -> out [n]
inline void minmax(const float* scores, int64_t n, const bool* mask, float eps, float floor, float* out) {
  float low = std::numeric_limits<float>::infinity(), high = -low;
  for (int64_t i = 0; i < n; ++i) {
    if (mask != nullptr && !mask[i]) continue;
    const float s = scores[i];
    if (!(s >= low)) low = low != low ? low : s;  // a NaN stays
    if (!(s <= high)) high = high != high ? high : s;
  }
  const float span = high - low + eps;
  for (int64_t i = 0; i < n; ++i) out[i] = (scores[i] - low + floor) / span;
}

}  // namespace vtc
