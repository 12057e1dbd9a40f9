// The weighted mean of every slot's members and its gradient. Definition: vtc/ops/definitions.py, merge.
#pragma once

#include "tiles.h"

namespace vtc {

constexpr int64_t SLICE = 256;  // channels at a time: with few images, threads share an image's channels

// x [n, c] of one image, any of three types, channels [first, last); out [slots, c]. Members are added in their order.
template <class T>
void merge_slice(const T* x, const int64_t* group, const float* weight, int64_t n, int64_t c, int64_t slots, int64_t first,
                 int64_t last, T* out) {
  const int64_t width = last - first;
  std::vector<float> total(slots * width, 0.0f), count(slots, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    if (group[i] < 0) continue;
    const float w = weight == nullptr ? 1.0f : weight[i];
    float* sum = total.data() + group[i] * width;
    const T* row = x + i * c + first;
    for (int64_t k = 0; k < width; ++k) sum[k] += w * float(row[k]);
    count[group[i]] += w;
  }
  for (int64_t s = 0; s < slots; ++s) {
    const float each = std::max(count[s], 1e-12f);
    for (int64_t k = 0; k < width; ++k) out[s * c + first + k] = T(total[s * width + k] / each);
  }
}

// grad [slots, c] -> out [n, c]: every member gets its share of its slot's.
template <class T>
void merge_back(const T* grad, const int64_t* group, const float* weight, int64_t n, int64_t c, int64_t slots, T* out) {
  std::vector<float> count(slots, 0.0f);
  for (int64_t i = 0; i < n; ++i)
    if (group[i] >= 0) count[group[i]] += weight == nullptr ? 1.0f : weight[i];
  for (int64_t i = 0; i < n; ++i) {
    const float share = group[i] < 0 ? 0.0f : (weight == nullptr ? 1.0f : weight[i]) / std::max(count[group[i]], 1e-12f);
    const T* row = grad + std::max<int64_t>(0, group[i]) * c;
    for (int64_t k = 0; k < c; ++k) out[i * c + k] = group[i] < 0 ? T(0.0f) : T(share * float(row[k]));
  }
}

}  // namespace vtc
