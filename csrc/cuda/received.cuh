// What every key receives of softmax(q k^T scale), summed over the queries, mean over the heads.
// Definition: vtc/scores/attention.py, attention_received.
//
// Floor: 4 B H M N D operations, the products being computed twice so that no M x N map exists, and
// B (H M + Hk N) D width-of-T bytes. Unmeasured.
#pragma once

#include "tile.cuh"

namespace vtc_cuda {

// query [B, H, m, d], key [B, Hk, n, d], mask [B, n] or nullptr -> peak_of, total [B, H, m]: the highest logit of each
// query, and the sum of exp(logit - peak); the two halves of its log-sum-exp. Grid: (query tiles, H, B).
template <typename T, int R>
__global__ void __launch_bounds__(THREADS) received_sum_kernel(
    const T* query, const T* key, const bool* mask, float* peak_of, float* total, int m, int n, int d, int shared_by,
    float scale) {
  __shared__ Stage<R> stage;
  const int row0 = blockIdx.x * SIDE * R;
  const int64 image = blockIdx.z, heads = gridDim.y, head = image * heads + blockIdx.y;
  const T* queries = query + head * m * d;
  const T* keys = key + (image * (heads / shared_by) + blockIdx.y / shared_by) * n * d;
  float top[R], sum[R];
  for (int r = 0; r < R; ++r) {
    top[r] = LOWEST;
    sum[r] = 0.0f;
  }
  for (int column0 = 0; column0 < n; column0 += COLUMNS) {
    float s[R][SPAN];
    auto row = [=](int i) { return row0 + i < m ? queries + int64(row0 + i) * d : nullptr; };
    auto column = [=](int j) { return column0 + j < n ? keys + int64(column0 + j) * d : nullptr; };
    tile<R, false, T>(stage, row, column, d, s);
    for (int c = 0; c < SPAN; ++c) {
      const int j = column0 + tile_column(c);
      if (j >= n || (mask != nullptr && !mask[image * n + j])) continue;
      for (int r = 0; r < R; ++r) {
        const float logit = s[r][c] * scale;
        if (logit > top[r]) {
          sum[r] *= expf(top[r] - logit);
          top[r] = logit;
        }
        sum[r] += expf(logit - top[r]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const int i = row0 + tile_row<R>(r);
    const float all = max_lanes(top[r], SIDE);
    const float part = sum_lanes(sum[r] * expf(top[r] - all), SIDE);
    if (threadIdx.x % SIDE == 0 && i < m) {
      peak_of[head * m + i] = all;
      total[head * m + i] = part;
    }
  }
}

// -> part [B, H, n], the sums over the queries of each head. With as many queries as keys a query of padding does not
// count; with fewer all count. Grid: (key tiles, H, B).
template <typename T, int R>
__global__ void __launch_bounds__(THREADS) received_columns_kernel(
    const T* query, const T* key, const bool* mask, const float* peak_of, const float* total, float* part, int m, int n,
    int d, int shared_by, float scale) {
  __shared__ Stage<R> stage;
  const int row0 = blockIdx.x * SIDE * R;
  const int64 image = blockIdx.z, heads = gridDim.y, head = image * heads + blockIdx.y;
  const T* queries = query + head * m * d;
  const T* keys = key + (image * (heads / shared_by) + blockIdx.y / shared_by) * n * d;
  const bool* real = mask == nullptr ? nullptr : mask + image * n;
  float sum[R];
  for (int r = 0; r < R; ++r) sum[r] = 0.0f;
  for (int column0 = 0; column0 < m; column0 += COLUMNS) {
    float s[R][SPAN];
    auto row = [=](int i) { return row0 + i < n ? keys + int64(row0 + i) * d : nullptr; };
    auto column = [=](int j) { return column0 + j < m ? queries + int64(column0 + j) * d : nullptr; };
    tile<R, false, T>(stage, row, column, d, s);
    for (int r = 0; r < R; ++r) {
      float more = 0.0f;
      for (int c = 0; c < SPAN; ++c) {
        const int j = column0 + tile_column(c);
        if (j >= m || (real != nullptr && m == n && !real[j]) || !(total[head * m + j] > 0.0f)) continue;
        more += expf(s[r][c] * scale - peak_of[head * m + j]) / total[head * m + j];
      }
      sum[r] += more;
    }
  }
  for (int r = 0; r < R; ++r) {
    const int i = row0 + tile_row<R>(r);
    const float all = sum_lanes(sum[r], SIDE);
    if (threadIdx.x % SIDE == 0 && i < n) part[head * n + i] = real == nullptr || real[i] ? all : 0.0f;
  }
}

// part [B, H, n] -> out [B, n], the mean over the heads. Grid: (n / 256, B).
__global__ void __launch_bounds__(THREADS) received_mean_kernel(const float* part, float* out, int n, int heads) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  const int64 image = blockIdx.y;
  if (i >= n) return;
  float sum = 0.0f;
  for (int h = 0; h < heads; ++h) sum += part[(image * heads + h) * n + i];
  out[image * n + i] = sum / float(heads);
}

#ifndef __CUDACC_RTC__
inline int64 received_state(int64 heads, int64 m, int64 n) { return heads * (2 * m + n); }  // floats per image

template <typename T>
void launch_received(cudaStream_t stream, const T* query, const T* key, const bool* mask, float* state, float* out,
                     int batch, int heads, int key_heads, int m, int n, int d, double scale) {
  if (batch == 0 || n == 0) return;
  float *peak_of = state, *total = peak_of + int64(batch) * heads * m, *part = total + int64(batch) * heads * m;
  const int shared_by = heads / key_heads;
  const bool many = many_tiles(lower(m, n), int64(batch) * heads);
  auto sum_of = many ? received_sum_kernel<T, 4> : received_sum_kernel<T, 1>;
  auto columns_of = many ? received_columns_kernel<T, 4> : received_columns_kernel<T, 1>;
  const int rows = SIDE * (many ? 4 : 1);
  if (m > 0)
    VTC_LAUNCH(sum_of, dim3(blocks(m, rows), heads, batch), THREADS, 0, stream, query, key, mask, peak_of, total, m, n,
               d, shared_by, float(scale));
  VTC_LAUNCH(columns_of, dim3(blocks(n, rows), heads, batch), THREADS, 0, stream, query, key, mask, peak_of, total,
             part, m, n, d, shared_by, float(scale));
  VTC_LAUNCH(received_mean_kernel, dim3(blocks(n, THREADS), batch), THREADS, 0, stream, part, out, n, heads);
}
#endif

}  // namespace vtc_cuda
