// Products of rows with rows, a tile at a time: what `energy`, `match`, `dpc_knn` and `received` are made of.
//
// A block of 256 threads computes (16 R) x 64 sums over the width, staged through shared memory 16 columns at a time;
// every thread holds R x 4 of them. R = 4 reads shared memory least; R = 1 is for launches that would not fill the GPU.
// The sum of (i, j) is added up in the order of (j, i): the tile is symmetric to the last bit.
// Plain fp32 FMA: its ceiling is 67 TFLOP/s on an H100 (data sheet); what it reaches is unmeasured.
#pragma once

#include "common.cuh"

namespace vtc_cuda {

constexpr int SIDE = 16, SPAN = 4, COLUMNS = SIDE * SPAN, DEPTH = 16, THREADS = SIDE * SIDE;

template <int R>
struct alignas(16) Stage {
  float left[DEPTH][SIDE * R + 4], right[DEPTH][COLUMNS + 4];
};

// This thread's places in the tile: rows row(r) and columns column(c), r < R, c < 4.
template <int R>
__device__ __forceinline__ int tile_row(int r) { return int(threadIdx.x) / SIDE * R + r; }
__device__ __forceinline__ int tile_column(int c) { return int(threadIdx.x) % SIDE * SPAN + c; }

// sum[r][c] = dot product (or, APART, squared distance) of left(row) and right(column), which give the start of a row
// of `width` values, or nullptr where there is none. All threads of the block must come here together.
template <int R, bool APART, typename T, typename Left, typename Right>
__device__ void tile(Stage<R>& stage, Left left, Right right, int width, float (&sum)[R][SPAN]) {
  const int k = threadIdx.x % DEPTH, at = threadIdx.x / DEPTH;
  const T *rows[R], *columns[SPAN];
#pragma unroll
  for (int r = 0; r < R; ++r) rows[r] = left(at + SIDE * r);
#pragma unroll
  for (int c = 0; c < SPAN; ++c) columns[c] = right(at + SIDE * c);
#pragma unroll
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < SPAN; ++c) sum[r][c] = 0.0f;
  for (int start = 0; start < width; start += DEPTH) {
    const bool inside = start + k < width;
#pragma unroll
    for (int r = 0; r < R; ++r)
      stage.left[k][at + SIDE * r] = inside && rows[r] != nullptr ? to_float(rows[r][start + k]) : 0.0f;
#pragma unroll
    for (int c = 0; c < SPAN; ++c)
      stage.right[k][at + SIDE * c] = inside && columns[c] != nullptr ? to_float(columns[c][start + k]) : 0.0f;
    __syncthreads();
    float part[R][SPAN] = {};  // sums of sums: the rounding error of a long row grows with width / 16
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float a = stage.left[i][tile_row<R>(r)];
#pragma unroll
        for (int c = 0; c < SPAN; ++c) {
          const float b = stage.right[i][tile_column(c)];
          part[r][c] += APART ? (a - b) * (a - b) : a * b;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < SPAN; ++c) sum[r][c] += part[r][c];
    __syncthreads();
  }
}

#ifndef __CUDACC_RTC__
// Whether tiles of 64 rows make enough blocks for a large GPU: 132 SMs, two blocks each. vtc/ops/cupy.py asks the same.
// The shim says yes early, so that small tests see both sizes.
inline bool many_tiles(int64 rows, int64 images) {
#ifdef VTC_SHIM
  return blocks(rows, SIDE * 4) * images >= 3;
#else
  return blocks(rows, SIDE * 4) * images >= 264;
#endif
}
#endif

}  // namespace vtc_cuda
