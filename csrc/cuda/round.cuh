// One round of pairwise merging: unit vectors, energies, two sets, partners, the best pairs, slots and sizes. Definition:
// vtc/ops/definitions.py, pair_round. Six launches, seven with energies; at N = 577, D = 64, B = 1 each is far below the
// time of a launch. Unmeasured.
#pragma once

#include "tile.cuh"
#ifndef __CUDACC_RTC__
#include "energy.cuh"
#include "match.cuh"
#endif

namespace vtc_cuda {

// x [B, n, d], the first `prefix` tokens aside -> unit [B, p, d], p = n - prefix. Grid: (p / 8, B); a warp per token.
template <typename T>
__global__ void __launch_bounds__(THREADS) units_kernel(const T* x, float* unit, int n, int d, int prefix) {
  const int lane = threadIdx.x % LANES, p = n - prefix;
  const int64 image = blockIdx.y, token = int64(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  if (token >= p) return;
  const T* row = x + (image * n + prefix + token) * d;
  const float norm = higher(sqrtf(dot_lanes(row, row, d)), 1e-12f);
  for (int k = lane; k < d; k += LANES) unit[(image * p + token) * d + k] = to_float(row[k]) / norm;
}

// high [B, p], or nullptr: the tokens are taken as they stand -> side [B, p], 1 = a, 2 = b, 0 = neither. A token's rank is
// the number of tokens before it: p^2 comparisons, the energies in shared memory. Grid: (p / 256, B).
__global__ void __launch_bounds__(THREADS) sides_kernel(
    const float* high, int64* side, int p, int r, int prefix, int half, int some) {
  __shared__ float others[THREADS];
  const int64 image = blockIdx.y;
  const int i = blockIdx.x * THREADS + threadIdx.x;
  int rank = i + prefix;
  if (high != nullptr) {
    const float mine = i < p ? high[image * p + i] : 0.0f;
    rank = 0;
    for (int j0 = 0; j0 < p; j0 += THREADS) {
      __syncthreads();
      if (j0 + int(threadIdx.x) < p) others[threadIdx.x] = high[image * p + j0 + threadIdx.x];
      __syncthreads();
      for (int j = 0; j < THREADS && j0 + j < p; ++j) rank += before(others[j], j0 + j, mine, i);
    }
  }
  if (i >= p) return;
  const bool first = half ? rank < r : rank % 2 == 0;
  side[image * p + i] = some && rank >= 2 * r ? 0 : first ? 1 : 2;
}

// side [B, p] -> a [B, na], b [B, nb], ascending. Grid: (p / 256, B).
__global__ void __launch_bounds__(THREADS) lists_kernel(const int64* side, int64* a, int64* b, int p, int na, int nb) {
  __shared__ int others[THREADS];
  const int64 image = blockIdx.y;
  const int i = blockIdx.x * THREADS + threadIdx.x;
  const int mine = i < p ? int(side[image * p + i]) : 0;
  int place = 0;
  for (int j0 = 0; j0 < p && j0 <= int(blockIdx.x) * THREADS; j0 += THREADS) {
    __syncthreads();
    if (j0 + int(threadIdx.x) < p) others[threadIdx.x] = int(side[image * p + j0 + threadIdx.x]);
    __syncthreads();
    for (int j = 0; j < THREADS && j0 + j < i; ++j) place += others[j] == mine;
  }
  if (mine == 1 && place < na) a[image * na + place] = i;
  if (mine == 2 && place < nb) b[image * nb + place] = i;
}

// source, target [B, r], counted behind the prefix; weight [B, n] or nullptr -> group [B, n], size [B, n - r]. Grid: B.
__global__ void __launch_bounds__(THREADS) slots_kernel(
    const int64* source, const int64* target, const float* weight, int64* group, float* size, int n, int r, int prefix) {
  __shared__ int counts[THREADS];
  const int64 image = blockIdx.x;
  const int64 *from = source + image * r, *to = target + image * r;
  const float* weights = weight == nullptr ? nullptr : weight + image * n;
  int64* groups = group + image * n;
  float* sizes = size + image * (n - r);
  auto weight_of = [=](int64 i) { return weights == nullptr ? 1.0f : weights[i]; };
  for (int i = threadIdx.x; i < n; i += THREADS) groups[i] = 0;
  __syncthreads();
  for (int k = threadIdx.x; k < r; k += THREADS) groups[prefix + from[k]] = -1;
  __syncthreads();
  const int stretch = (n + THREADS - 1) / THREADS;
  const int first = int(lower(n, int64(threadIdx.x) * stretch)), last = int(lower(n, int64(first) + stretch));
  int kept = 0;
  for (int i = first; i < last; ++i) kept += groups[i] == 0;
  counts[threadIdx.x] = kept;
  __syncthreads();
  int slot = 0;
  for (int t = 0; t < int(threadIdx.x); ++t) slot += counts[t];
  for (int i = first; i < last; ++i)
    if (groups[i] == 0) groups[i] = slot++;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += THREADS) {
    if (groups[i] < 0) continue;
    float sum = weight_of(i);
    for (int k = 0; k < r; ++k)
      if (prefix + to[k] == i) sum += weight_of(prefix + from[k]);
    sizes[groups[i]] = sum;
  }
  __syncthreads();
  for (int k = threadIdx.x; k < r; k += THREADS) groups[prefix + from[k]] = groups[prefix + to[k]];
}

#ifndef __CUDACC_RTC__
// Room for one image in launch_round, in floats and in longs.
inline int64 round_floats(int64 p, int64 d) { return p * d + 2 * p; }
inline int64 round_longs(int64 p) { return 5 * p; }

template <typename T>
void launch_round(cudaStream_t stream, const T* metric, const float* weight, float* floats, int64* longs, int64* group,
                  float* size, int64* source, float* score, int batch, int n, int d, int r, int prefix, int form,
                  double margin, double alpha, bool half, bool protect) {
  if (batch == 0 || n == 0) return;
  const int p = n - prefix;
  const bool sorted = form >= 0, in_halves = sorted && half, some = sorted && (half || protect);
  const int na = !sorted ? (p + 1 - prefix % 2) / 2 : some ? r : (p + 1) / 2, nb = !sorted ? p - na : some ? r : p / 2;
  float *unit = floats, *high = unit + int64(batch) * p * d, *best = high + int64(batch) * p;
  int64 *side = longs, *a = side + int64(batch) * p, *b = a + int64(batch) * na, *at = b + int64(batch) * nb;
  int64* target = at + int64(batch) * na;
  if (r > 0) {
    const dim3 tokens(blocks(p, THREADS), batch);
    VTC_LAUNCH(units_kernel<T>, dim3(blocks(p, THREADS / LANES), batch), THREADS, 0, stream, metric, unit, n, d, prefix);
    if (sorted) launch_energy<float>(stream, unit, nullptr, high, batch, p, d, form, margin, alpha);
    VTC_LAUNCH(sides_kernel, tokens, THREADS, 0, stream, sorted ? high : nullptr, side, p, r, prefix, in_halves, some);
    VTC_LAUNCH(lists_kernel, tokens, THREADS, 0, stream, side, a, b, p, na, nb);
    launch_match<float>(stream, unit, a, b, nullptr, best, at, batch, p, d, na, nb);
    VTC_LAUNCH(top_pairs_kernel, dim3(blocks(na, THREADS), batch), THREADS, 0, stream, best, at, a, b, nullptr, nullptr,
               source, target, score, na, nb, r, 1);
  }
  VTC_LAUNCH(slots_kernel, dim3(batch), THREADS, 0, stream, source, target, weight, group, size, n, r, prefix);
}
#endif

}  // namespace vtc_cuda
