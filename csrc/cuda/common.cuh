// What the kernels share. The same source is compiled by nvcc (csrc/cuda.cu), by NVRTC (vtc/ops/cupy.py) and, under
// shim.h, by g++ (csrc/cuda/host_test.cpp); so no library but the half types, and nothing that needs one of the three.
//
// No kernel adds floats atomically: every sum has one order, and two runs give the same bits.
#pragma once

#ifdef VTC_SHIM
#include "shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define VTC_DYNAMIC_SHARED(name) extern __shared__ float name[]
#define VTC_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  kernel<<<grid, threads, shared, stream>>>(__VA_ARGS__)
#endif

namespace vtc_cuda {

using int64 = long long;
constexpr unsigned ALL = 0xffffffffu;
constexpr int LANES = 32;
constexpr float LOWEST = -3.402823466e38f;
// A copy of a token has cosine 1 but for rounding (vtc/ops/selection.py).
constexpr float SAME = float(1.0 - 1e-6);

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(__half* to, float x) { *to = __float2half(x); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }

__device__ __forceinline__ float higher(float a, float b) { return a > b ? a : b; }
// As torch.maximum: NaN wins.
__device__ __forceinline__ float peak(float a, float b) { return a != a || !(b > a || b != b) ? a : b; }
__host__ __device__ inline int64 lower(int64 a, int64 b) { return a < b ? a : b; }

// Scores as every selection compares them: NaN and -inf are the lowest there is, but above tokens already taken.
__device__ __forceinline__ float clean(float score) {
  return score >= LOWEST ? (score > -LOWEST ? -LOWEST : score) : LOWEST;
}

// Whether p, the p_at-th, comes before q: the higher score, of equals the first; a NaN is the highest, as torch sorts it.
__device__ __forceinline__ bool before(float p, int p_at, float q, int q_at) {
  const bool wild = p != p, other = q != q;
  return wild != other ? wild : p > q || (!(q > p) && p_at < q_at);
}

// Sums over groups of `lanes` neighbouring threads (a power of 2), the same in each of them.
__device__ __forceinline__ float sum_lanes(float x, int lanes = LANES) {
  for (int step = lanes / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

__device__ __forceinline__ float max_lanes(float x, int lanes = LANES) {
  for (int step = lanes / 2; step; step /= 2) x = peak(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

// The best of (score, index): the highest score, of equals the lowest index. An index travels as the bits of a float.
__device__ __forceinline__ bool better(float score, int index, float than, int than_index) {
  return score > than || (score == than && index < than_index);
}

__device__ __forceinline__ void best_lanes(float& score, int& index, int lanes = LANES) {
  for (int step = lanes / 2; step; step /= 2) {
    const float other = __shfl_xor_sync(ALL, score, step);
    const int at = __float_as_int(__shfl_xor_sync(ALL, __int_as_float(index), step));
    if (better(other, at, score, index)) {
      score = other;
      index = at;
    }
  }
}

// The same over a block; `room` is shared memory that nobody else writes before the next __syncthreads but one.
struct Room {
  float score[LANES];
  int index[LANES];
};

__device__ __forceinline__ void best_block(float& score, int& index, Room& room) {
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
  best_lanes(score, index);
  if (lane == 0) {
    room.score[warp] = score;
    room.index[warp] = index;
  }
  __syncthreads();
  score = lane < warps ? room.score[lane] : -infinity();
  index = lane < warps ? room.index[lane] : 0x7fffffff;
  best_lanes(score, index);
}

// Dot product of two rows by a warp, the same value in every lane.
template <typename T>
__device__ __forceinline__ float dot_lanes(const T* a, const T* b, int width) {
  float sum = 0.0f;
  for (int k = threadIdx.x % LANES; k < width; k += LANES) sum += to_float(a[k]) * to_float(b[k]);
  return sum_lanes(sum);
}

#ifndef __CUDACC_RTC__
// Threads of the kernels that give a block to an image; few fibers under the shim.
#ifdef VTC_SHIM
constexpr int CROWD = 64;
#else
constexpr int CROWD = 1024;
#endif
inline unsigned blocks(int64 items, int64 each) { return unsigned((items + each - 1) / each); }
#endif

}  // namespace vtc_cuda
