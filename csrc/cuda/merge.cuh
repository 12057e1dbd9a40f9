// Weighted means of the members of every slot, without atomics, and their derivative in x.
// Definition: vtc/ops/definitions.py, merge.
//
// Floor of both: read x (or the gradient), write the other, B (N + slots) C width-of-T bytes; a multiply-add per value.
// On top, every block reads the groups of its image: B slots N bytes from L2. Unmeasured.
#pragma once

#include "common.cuh"

namespace vtc_cuda {

constexpr int MERGE_THREADS = 256, MERGE_SLOTS = MERGE_THREADS / LANES, MERGE_LIST = 1024, MERGE_WIDE = 4;

// x [B, n, c], group [B, n] (-1 = dropped), weight [B, n] or nullptr -> out [B, slots, c]. Grid: (slots / 8, B).
// A block looks for the members of 8 slots, in ascending order; then a warp adds up each slot. A block with more than
// MERGE_LIST members does without the list: its warps go through all tokens.
template <typename T>
__global__ void __launch_bounds__(MERGE_THREADS) merge_kernel(
    const T* x, const int64* group, const float* weight, T* out, int n, int c, int slots) {
  __shared__ int list[MERGE_LIST], before[MERGE_SLOTS + 1];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const int64 image = blockIdx.y;
  const int64* groups = group + image * n;
  const int64 slot0 = int64(blockIdx.x) * MERGE_SLOTS;
  // First pass: every thread counts the members in its own stretch of tokens; second: it lists them behind the others'.
  const int stretch = (n + MERGE_THREADS - 1) / MERGE_THREADS;
  const int first = int(lower(n, int64(threadIdx.x) * stretch)), last = int(lower(n, int64(first) + stretch));
  int count = 0;
  for (int i = first; i < last; ++i) count += groups[i] >= slot0 && groups[i] < slot0 + MERGE_SLOTS;
  // How many members threads of lower number found: within the warp, then over the warps.
  int place = 0, all = count;
  for (int step = 1; step < LANES; step *= 2) {
    const int other = __float_as_int(__shfl_xor_sync(ALL, __int_as_float(all), step));
    if (lane & step) place += other;
    all += other;
  }
  if (lane == 0) before[warp + 1] = all;
  if (threadIdx.x == 0) before[0] = 0;
  __syncthreads();
  int members = 0;
  for (int w = 0; w < MERGE_SLOTS; ++w) {
    if (w < warp) place += before[w + 1];
    members += before[w + 1];
  }
  const bool listed = members <= MERGE_LIST;
  if (listed)
    for (int i = first; i < last; ++i)
      if (groups[i] >= slot0 && groups[i] < slot0 + MERGE_SLOTS) list[place++] = i;
  __syncthreads();

  const int64 slot = slot0 + warp;
  if (slot >= slots) return;
  const int64 rows = listed ? members : n;
  T* to = out + (image * slots + slot) * c;
  for (int at = lane; at < c; at += LANES * MERGE_WIDE) {
    float sum[MERGE_WIDE] = {}, size = 0.0f;
    for (int e = 0; e < rows; ++e) {
      const int i = listed ? list[e] : e;
      if (groups[i] != slot) continue;
      const float w = weight == nullptr ? 1.0f : weight[image * n + i];
      const T* row = x + (image * n + i) * c;
      size += w;
#pragma unroll
      for (int k = 0; k < MERGE_WIDE; ++k)
        if (at + k * LANES < c) sum[k] += w * to_float(row[at + k * LANES]);
    }
    size = higher(size, 1e-12f);
#pragma unroll
    for (int k = 0; k < MERGE_WIDE; ++k)
      if (at + k * LANES < c) store(to + at + k * LANES, sum[k] / size);
  }
}

// grad [B, slots, c] -> out [B, n, c], grad of a token's slot times its share of the slot. Grid: (n / 8, B).
// A warp per token, which adds up its slot's weights; 32 partial sums in a fixed order.
template <typename T>
__global__ void __launch_bounds__(MERGE_THREADS) merge_backward_kernel(
    const T* grad, const int64* group, const float* weight, T* out, int n, int c, int slots) {
  const int lane = threadIdx.x % LANES;
  const int64 image = blockIdx.y, token = int64(blockIdx.x) * MERGE_SLOTS + threadIdx.x / LANES;
  if (token >= n) return;
  const int64* groups = group + image * n;
  const float* weights = weight == nullptr ? nullptr : weight + image * n;
  const int64 slot = groups[token];
  const bool dropped = slot < 0 || slot >= slots;
  float size = 0.0f;
  if (!dropped)
    for (int i = lane; i < n; i += LANES)
      if (groups[i] == slot) size += weights == nullptr ? 1.0f : weights[i];
  size = higher(sum_lanes(size), 1e-12f);
  const float share = (weights == nullptr ? 1.0f : weights[token]) / size;
  for (int at = lane; at < c; at += LANES) {
    const float g = dropped ? 0.0f : to_float(grad[(image * slots + slot) * c + at]);
    store(out + (image * n + token) * c + at, dropped ? 0.0f : g * share);
  }
}

// x [B, n, c], at [B, m] (-1 = zeros) -> out [B, m, c], the rows x[at]. Grid: (m / 8, B); a warp per row.
template <typename T>
__global__ void __launch_bounds__(MERGE_THREADS) rows_kernel(const T* x, const int64* at, T* out, int n, int c, int m) {
  const int lane = threadIdx.x % LANES;
  const int64 image = blockIdx.y, row = int64(blockIdx.x) * MERGE_SLOTS + threadIdx.x / LANES;
  if (row >= m) return;
  const int64 token = at[image * m + row];
  const bool there = token >= 0 && token < n;
  for (int k = lane; k < c; k += LANES)
    store(out + (image * m + row) * c + k, there ? to_float(x[(image * n + token) * c + k]) : 0.0f);
}

#ifndef __CUDACC_RTC__
template <typename T>
void launch_rows(cudaStream_t stream, const T* x, const int64* at, T* out, int batch, int n, int c, int m) {
  if (batch == 0 || m == 0 || c == 0) return;
  VTC_LAUNCH(rows_kernel<T>, dim3(blocks(m, MERGE_SLOTS), batch), MERGE_THREADS, 0, stream, x, at, out, n, c, m);
}

template <typename T>
void launch_merge(cudaStream_t stream, const T* x, const int64* group, const float* weight, T* out, int batch, int n,
                  int c, int slots) {
  if (batch == 0 || slots == 0 || c == 0) return;
  VTC_LAUNCH(merge_kernel<T>, dim3(blocks(slots, MERGE_SLOTS), batch), MERGE_THREADS, 0, stream, x, group, weight, out,
             n, c, slots);
}

template <typename T>
void launch_merge_backward(cudaStream_t stream, const T* grad, const int64* group, const float* weight, T* out,
                           int batch, int n, int c, int slots) {
  if (batch == 0 || n == 0 || c == 0) return;
  VTC_LAUNCH(merge_backward_kernel<T>, dim3(blocks(n, MERGE_SLOTS), batch), MERGE_THREADS, 0, stream, grad, group,
             weight, out, n, c, slots);
}
#endif

}  // namespace vtc_cuda
