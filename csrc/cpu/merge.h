// The weighted mean of every slot's members and its gradient. Definition: vtc/ops/definitions.py, merge.
#pragma once

#include "tiles.h"

namespace vtc {

constexpr int64_t SLICE = 256;  // channels at a time: with few images, threads share an image's channels

// The members of every slot, slot by slot, in their order; those of slot s: from[s] .. from[s + 1]. group [n], -1 = none.
struct Members {
  std::vector<int64_t> from, token;
  Members(const int64_t* group, int64_t n, int64_t slots) : from(slots + 2, 0), token(n) {
    for (int64_t i = 0; i < n; ++i)
      if (group[i] >= 0) ++from[group[i] + 2];
    for (int64_t s = 2; s < slots + 2; ++s) from[s] += from[s - 1];
    for (int64_t i = 0; i < n; ++i)
      if (group[i] >= 0) token[from[group[i] + 1]++] = i;
  }
};

// x [n, c] of one image, channels [first, first + width); out [slots, c].
template <class V, class T>
VTC_INLINE void merge_slice_body(const T* x, const Members& members, const float* weight, int64_t slots, int64_t c,
                                 int64_t first, int64_t width, T* out) {
  float sum[SLICE];
  for (int64_t s = 0; s < slots; ++s) {
    float count = 0.0f;
    for (int64_t k = 0; k < width; ++k) sum[k] = 0.0f;
    for (int64_t at = members.from[s]; at < members.from[s + 1]; ++at) {
      const int64_t i = members.token[at];
      const float w = weight == nullptr ? 1.0f : weight[i];
      const T* row = x + i * c + first;
      for (int64_t k = 0; k < width; ++k) sum[k] += w * float(row[k]);
      count += w;
    }
    count = std::max(count, 1e-12f);
    T* to = out + s * c + first;
    for (int64_t k = 0; k < width; ++k) to[k] = T(sum[k] / count);
  }
}
#define VTC_MERGE(T)                                                                                                \
  VTC_KERNEL(merge_slice,                                                                                           \
             (const T* x, const Members& members, const float* weight, int64_t slots, int64_t c, int64_t first,     \
              int64_t width, T* out),                                                                               \
             (x, members, weight, slots, c, first, width, out))
VTC_MERGE(float)

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

// The rows x[at] of one image, bytes wide each; at [m], -1 = zeros.
inline void take_rows(const char* x, const int64_t* at, int64_t m, int64_t bytes, char* out) {
  for (int64_t i = 0; i < m && bytes > 0; ++i) {  // of no bytes, x may be null
    if (at[i] < 0) std::memset(out + i * bytes, 0, bytes);
    else std::memcpy(out + i * bytes, x + at[i] * bytes, bytes);
  }
}

}  // namespace vtc
