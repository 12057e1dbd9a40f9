// K of N tokens, one after the other, in one launch: MMR, SADS, max-min; and the greedy MAP of a DPP.
// Definition: vtc/ops/selection.py, greedy_select and dpp_select.
//
// One block per image holds the whole loop: a pick is one row of cosines, a pass over the scores, and a reduction in
// which each warp finishes by itself: two __syncthreads per pick where the cosines are given.
// Floor of greedy_select: K dependent steps, each a row of 4 N bytes and a reduction; without `table` each reads all of
// unit, 2 N D operations by one block. Floor of dpp_select: B N K^2 operations, 2 B N K^2 bytes. Unmeasured.
#pragma once

#include "common.cuh"

namespace vtc_cuda {

enum Kind { MMR = 0, SADS = 1, MAX_MIN = 2 };
// Part of a token's own kernel value that rounding leaves over when the picked tokens span it.
constexpr float SPANNED = 1e-5f;
// Up to here the state of an image, 5 bytes a token, lies in shared memory.
constexpr int SHARED_TOKENS = 9600;

__device__ __forceinline__ float cosine(float product) { return product > SAME ? 1.0f : product; }

__device__ __forceinline__ float greedy_score(int kind, float own, float closest, float balance, float other) {
  // rounded as torch rounds it: a fused multiply-add would break ties
  if (kind == MMR) return __fsub_rn(__fmul_rn(balance, own), __fmul_rn(other, closest));
  if (kind == SADS) return __fmul_rn(own, __fsub_rn(1.0f, closest));
  return -closest;
}

// unit [B, n, d]; table [B, n, n] of their products, or nullptr: computed as needed; importance [B, n]: for MAX_MIN the
// highest cosine of each token to another; each [B]; mask [B, n] or nullptr; state: `greedy_state(n)` floats per image
// -> order [B, most], -1 behind the picks. other = 1 - balance; step: picks that do not see each other. Grid: B.
template <typename T>
__global__ void __launch_bounds__(1024) greedy_kernel(
    const T* unit, const float* table, const float* importance, const int64* each, const bool* mask, float* state,
    int64* order, int n, int d, int most, int kind, float balance, float other, int step) {
  VTC_DYNAMIC_SHARED(shared);
  __shared__ Room room;
  const int64 image = blockIdx.x;
  const int thread = threadIdx.x, threads = blockDim.x, warps = threads / LANES;
  // the highest cosine to a picked token; behind it, whether the token is taken
  float* closest = n <= SHARED_TOKENS ? shared : state + image * (n + (n + 3) / 4);
  unsigned char* taken = reinterpret_cast<unsigned char*>(closest + n);
  const float* own = importance + image * n;
  const T* rows = unit + image * n * d;
  int64* picks = order + image * most;
  for (int i = thread; i < n; i += threads) {
    closest[i] = -1.0f;
    taken[i] = mask != nullptr && !mask[image * n + i];
  }
  for (int p = thread; p < most; p += threads) picks[p] = -1;
  __syncthreads();
  const int64 count = lower(each[image], most);
  for (int done = 0; done < count; ++done) {
    const bool round = done > 0 && done % step == 0;  // the picks of the last `step` turns become visible
    if (round && table == nullptr) {
      for (int p = done - step; p < done; ++p)
        for (int i = thread / LANES; i < n; i += warps) {
          const float now = cosine(dot_lanes(rows + picks[p] * d, rows + int64(i) * d, d));
          if (thread % LANES == 0) closest[i] = peak(closest[i], now);
        }
      __syncthreads();
    }
    float best = -infinity();
    int at = n;
    for (int i = thread; i < n; i += threads) {
      if (round && table != nullptr)
        for (int p = done - step; p < done; ++p)
          closest[i] = peak(closest[i], cosine(table[(image * n + picks[p]) * n + i]));
      if (taken[i]) continue;
      const float begin = kind == MAX_MIN ? -cosine(own[i]) : own[i];
      const float score = clean(done < step ? begin : greedy_score(kind, own[i], closest[i], balance, other));
      if (better(score, i, best, at)) {
        best = score;
        at = i;
      }
    }
    best_block(best, at, room);
    if (at >= n) break;  // no token left; every thread sees it
    if (thread == 0) {
      picks[done] = at;
      taken[at] = 1;
    }
    __syncthreads();
  }
}

// unit, table, each, mask as above; relevance [B, n]; factor [B, most, n]: room for the Cholesky rows; left:
// `dpp_state(n)` floats per image -> order [B, most], -1 behind the picks. Grid: B.
template <typename T>
__global__ void __launch_bounds__(1024) dpp_kernel(
    const T* unit, const float* table, const float* relevance, const int64* each, const bool* mask, float* factor,
    float* left, int64* order, int n, int d, int most) {
  __shared__ Room room;
  const int64 image = blockIdx.x;
  const int thread = threadIdx.x, threads = blockDim.x, warps = threads / LANES;
  const T* rows = unit + image * n * d;
  const float* weight = relevance + image * n;
  float* rest = left + image * ((9 * int64(n) + 3) / 4);
  float* own = rest + n;
  unsigned char* taken = reinterpret_cast<unsigned char*>(own + n);
  float* chain = factor + image * most * n;
  int64* picks = order + image * most;
  for (int i = thread / LANES; i < n; i += warps) {
    const float square = rintf(dot_lanes(rows + int64(i) * d, rows + int64(i) * d, d));
    if (thread % LANES == 0) {
      rest[i] = own[i] = weight[i] * weight[i] * square;
      taken[i] = mask != nullptr && !mask[image * n + i];
    }
  }
  for (int p = thread; p < most; p += threads) picks[p] = -1;
  __syncthreads();
  const int64 count = lower(each[image], most);
  for (int done = 0; done < count; ++done) {
    float best = -infinity();
    int at = n;
    for (int i = thread; i < n; i += threads) {
      if (!(rest[i] > SPANNED * own[i])) rest[i] = 0.0f;
      const float score = clean(rest[i]);
      if (!taken[i] && better(score, i, best, at)) {
        best = score;
        at = i;
      }
    }
    best_block(best, at, room);
    if (at >= n) break;
    if (thread == 0) {
      picks[done] = at;
      taken[at] = 1;
    }
    __syncthreads();
    // the new row of the factor: L's row of the pick, less what the rows so far explain, over the root of the pivot
    float* row = chain + int64(done) * n;
    if (table == nullptr) {
      for (int i = thread / LANES; i < n; i += warps) {
        const float product = dot_lanes(rows + int64(at) * d, rows + int64(i) * d, d);
        if (thread % LANES == 0) row[i] = product;
      }
      __syncthreads();
    }
    const float pivot = rest[at];
    for (int i = thread; i < n; i += threads) {
      float explained = 0.0f;
      for (int p = 0; p < done; ++p) explained += chain[int64(p) * n + at] * chain[int64(p) * n + i];
      const float product = cosine(table == nullptr ? row[i] : table[(image * n + at) * n + i]);
      const float value = weight[at] * product * weight[i] - explained;
      row[i] = pivot > 0.0f ? value * rsqrtf(pivot) : 0.0f;
    }
    __syncthreads();  // `rest` of the pick has been read by all
    for (int i = thread; i < n; i += threads) rest[i] -= row[i] * row[i];
    __syncthreads();
  }
}

#ifndef __CUDACC_RTC__
// Room that the caller allocates, in floats per image.
inline int64 greedy_state(int64 n) { return n <= SHARED_TOKENS ? 0 : n + (n + 3) / 4; }
inline int64 dpp_state(int64 n) { return (9 * n + 3) / 4; }

template <typename T>
void launch_greedy(cudaStream_t stream, const T* unit, const float* table, const float* importance, const int64* each,
                   const bool* mask, float* state, int64* order, int batch, int n, int d, int most, int kind,
                   double balance, int step) {
  if (batch == 0 || most == 0 || n == 0) return;
  const size_t shared = n <= SHARED_TOKENS ? size_t(5) * n : 0;
  VTC_LAUNCH(greedy_kernel<T>, dim3(batch), CROWD, shared, stream, unit, table, importance, each, mask, state, order, n,
             d, most, kind, float(balance), float(1.0 - balance), step);
}

template <typename T>
void launch_dpp(cudaStream_t stream, const T* unit, const float* table, const float* relevance, const int64* each,
                const bool* mask, float* factor, float* left, int64* order, int batch, int n, int d, int most) {
  if (batch == 0 || most == 0 || n == 0) return;
  VTC_LAUNCH(dpp_kernel<T>, dim3(batch), CROWD, 0, stream, unit, table, relevance, each, mask, factor, left, order, n,
             d, most);
}
#endif

}  // namespace vtc_cuda
