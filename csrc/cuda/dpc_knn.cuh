// Density peaks among nearest neighbours, distances a tile at a time. Definition: vtc/ops/selection.py, dpc_knn.
//
// A distance is a sum of squared differences, which does not cancel where two tokens are near.
// Floor: two passes of 3 B N^2 D operations and one of 3 B N K D; the N x N distances are never written. Unmeasured.
#pragma once

#include "tile.cuh"

namespace vtc_cuda {

// Squared norms of rows. Grid: (rows / 8).
template <typename T>
__global__ void __launch_bounds__(THREADS) squares_kernel(const T* x, float* squares, int64 rows, int d) {
  const int64 i = int64(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  if (i >= rows) return;
  const float sum = dot_lanes(x + i * d, x + i * d, d);
  if (threadIdx.x % LANES == 0) squares[i] = sum;
}

// Euclidean distance / sqrt(width); what is left between copies of a token by rounding counts as 0.
__device__ __forceinline__ float apart(float squared, float norms, int d) {
  return squared <= 1e-12f * norms ? 0.0f : sqrtf(squared / float(d));
}

__device__ __forceinline__ int neighbors_of(int64 centres, int neighbors) {
  if (centres >= neighbors) return neighbors;
  return centres < 4 ? 1 : centres < 6 ? 2 : 3;
}

// -> density [B, n] = minus the mean of the smallest squared distances (log rho; exp would underflow), widest [B, n] =
// the largest distance; both -inf, 0 for padding. nearest [B, n, neighbors] is room for them. Grid: (row tiles, B).
template <typename T, int R>
__global__ void __launch_bounds__(THREADS) dpc_density_kernel(
    const T* x, const float* squares, const int64* each, const bool* mask, float* nearest, float* density,
    float* widest, int n, int d, int neighbors) {
  __shared__ Stage<R> stage;
  __shared__ float far[SIDE * R][COLUMNS + 1];
  const int row0 = blockIdx.x * SIDE * R, i = row0 + threadIdx.x;
  const int64 image = blockIdx.y;
  const T* mine = x + image * n * d;
  const float* norm = squares + image * n;
  const bool* real = mask == nullptr ? nullptr : mask + image * n;
  const int near = neighbors_of(each[image], neighbors);
  const bool watch = threadIdx.x < SIDE * R && i < n;  // the threads that keep the list of a row, ascending
  float* list = nearest + (image * n + (watch ? i : 0)) * neighbors;
  float most = 0.0f;
  if (watch)
    for (int k = 0; k < near; ++k) list[k] = infinity();
  for (int column0 = 0; column0 < n; column0 += COLUMNS) {
    float s[R][SPAN];
    auto row = [=](int r) { return row0 + r < n ? mine + int64(row0 + r) * d : nullptr; };
    auto column = [=](int j) { return column0 + j < n ? mine + int64(column0 + j) * d : nullptr; };
    tile<R, true, T>(stage, row, column, d, s);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < SPAN; ++c) {
        const int a = row0 + tile_row<R>(r), b = column0 + tile_column(c);
        const bool there = a < n && b < n && (real == nullptr || real[b]);
        far[tile_row<R>(r)][tile_column(c)] = there ? apart(s[r][c], norm[a] + norm[b], d) : infinity();
      }
    __syncthreads();
    if (watch)
      for (int c = 0; c < COLUMNS; ++c) {
        const float now = far[threadIdx.x][c];
        if (now < infinity()) most = higher(now, most);
        if (!(now < list[near - 1])) continue;
        int place = near - 1;
        for (; place > 0 && list[place - 1] > now; --place) list[place] = list[place - 1];
        list[place] = now;
      }
    __syncthreads();
  }
  if (!watch) return;
  float sum = 0.0f;
  for (int k = 0; k < near; ++k) sum += list[k] * list[k];
  const bool there = real == nullptr || real[i];
  density[image * n + i] = there ? -sum / float(near) : -infinity();
  widest[image * n + i] = there ? most : 0.0f;
}

// -> score [B, n] = log rho + log delta, delta the distance to the nearest denser token, or the largest of the image.
template <typename T, int R>
__global__ void __launch_bounds__(THREADS) dpc_score_kernel(
    const T* x, const float* squares, const bool* mask, const float* density, const float* widest, float* score, int n,
    int d) {
  __shared__ Stage<R> stage;
  __shared__ float part[THREADS / LANES];
  const int row0 = blockIdx.x * SIDE * R;
  const int64 image = blockIdx.y;
  const T* mine = x + image * n * d;
  const float *norm = squares + image * n, *rho = density + image * n;
  float most = 0.0f, least[R];
  for (int i = threadIdx.x; i < n; i += THREADS) most = higher(widest[image * n + i], most);
  most = max_lanes(most);
  if (threadIdx.x % LANES == 0) part[threadIdx.x / LANES] = most;
  __syncthreads();
  for (int w = 0; w < THREADS / LANES; ++w) most = higher(part[w], most);
  for (int r = 0; r < R; ++r) least[r] = infinity();
  for (int column0 = 0; column0 < n; column0 += COLUMNS) {
    float s[R][SPAN];
    auto row = [=](int r) { return row0 + r < n ? mine + int64(row0 + r) * d : nullptr; };
    auto column = [=](int j) { return column0 + j < n ? mine + int64(column0 + j) * d : nullptr; };
    tile<R, true, T>(stage, row, column, d, s);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < SPAN; ++c) {
        const int a = row0 + tile_row<R>(r), b = column0 + tile_column(c);
        if (a >= n || b >= n || (mask != nullptr && !mask[image * n + b])) continue;
        const float now = apart(s[r][c], norm[a] + norm[b], d);
        if (better(rho[b], b, rho[a], a) && now < least[r]) least[r] = now;
      }
  }
  for (int r = 0; r < R; ++r) {
    const int i = row0 + tile_row<R>(r);
    const float delta = -max_lanes(-least[r], SIDE);
    if (threadIdx.x % SIDE == 0 && i < n) score[image * n + i] = rho[i] + logf(delta < infinity() ? delta : most);
  }
}

// order [B, most] = the tokens of the `each` highest scores, best first, -1 behind them. A token's place is the number
// of better ones, which each thread counts for itself. Grid: (n / 256, B).
__global__ void __launch_bounds__(THREADS) top_kernel(const float* score, const int64* each, const bool* mask,
                                                      int64* order, int n, int most) {
  __shared__ float near[THREADS];
  const int i = blockIdx.x * THREADS + threadIdx.x;
  const int64 image = blockIdx.y;
  auto real = [=](int j) { return j < n && (mask == nullptr || mask[image * n + j]); };
  const bool there = real(i);
  const float mine = there ? clean(score[image * n + i]) : 0.0f;
  int place = 0, all = 0;
  for (int start = 0; start < n; start += THREADS) {
    const int j = start + threadIdx.x;
    near[threadIdx.x] = real(j) ? clean(score[image * n + j]) : -infinity();
    __syncthreads();
    for (int k = 0; k < THREADS && start + k < n; ++k) {
      if (near[k] < LOWEST) continue;
      all += 1;
      place += better(near[k], start + k, mine, i);
    }
    __syncthreads();
  }
  const int64 count = lower(lower(each[image], all), most);
  if (there && place < count) order[image * most + place] = i;
  if (i < most && i >= count) order[image * most + i] = -1;
}

// Every token joins the nearest of the centres `order`: target [B, n] (a centre's is itself, -1 for padding) and
// distance [B, n] (inf for padding). Grid: (row tiles, B).
template <typename T, int R>
__global__ void __launch_bounds__(THREADS) dpc_assign_kernel(
    const T* x, const float* squares, const bool* mask, const int64* order, int64* target, float* distance, int n,
    int d, int most) {
  __shared__ Stage<R> stage;
  const int row0 = blockIdx.x * SIDE * R;
  const int64 image = blockIdx.y;
  const T* mine = x + image * n * d;
  const float* norm = squares + image * n;
  const int64* centres = order + image * most;
  float near[R], is_centre[R];  // the highest of minus the distances: of equals the lowest index, as everywhere
  int at[R];
  for (int r = 0; r < R; ++r) {
    near[r] = -infinity();
    at[r] = n;
    is_centre[r] = 0.0f;
  }
  for (int column0 = 0; column0 < most; column0 += COLUMNS) {
    float s[R][SPAN];
    auto row = [=](int r) { return row0 + r < n ? mine + int64(row0 + r) * d : nullptr; };
    auto column = [=](int j) {
      return column0 + j < most && centres[column0 + j] >= 0 ? mine + centres[column0 + j] * d : nullptr;
    };
    tile<R, true, T>(stage, row, column, d, s);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < SPAN; ++c) {
        const int a = row0 + tile_row<R>(r), b = column0 + tile_column(c);
        const int centre = b < most ? int(centres[b]) : -1;
        if (a >= n || centre < 0) continue;
        const float now = -apart(s[r][c], norm[a] + norm[centre], d);
        if (better(now, centre, near[r], at[r])) {
          near[r] = now;
          at[r] = centre;
        }
        if (a == centre) is_centre[r] = 1.0f;
      }
  }
  for (int r = 0; r < R; ++r) {
    const int i = row0 + tile_row<R>(r);
    best_lanes(near[r], at[r], SIDE);
    is_centre[r] = max_lanes(is_centre[r], SIDE);
    if (threadIdx.x % SIDE || i >= n) continue;
    const bool there = at[r] < n && (mask == nullptr || mask[image * n + i]);
    target[image * n + i] = !there ? -1 : is_centre[r] > 0.0f ? i : at[r];
    distance[image * n + i] = there ? -near[r] : infinity();
  }
}

#ifndef __CUDACC_RTC__
inline int64 dpc_state(int64 n, int64 neighbors) { return n * (4 + neighbors); }  // floats per image

template <typename T>
void launch_dpc(cudaStream_t stream, const T* x, const int64* each, const bool* mask, float* state, int64* order,
                int64* target, float* distance, int batch, int n, int d, int most, int neighbors) {
  if (batch == 0 || n == 0) return;
  const int64 all = int64(batch) * n;
  float *squares = state, *density = squares + all, *widest = density + all, *score = widest + all,
        *nearest = score + all;
  const bool many = many_tiles(n, batch);
  const dim3 grid(blocks(n, SIDE * (many ? 4 : 1)), batch);
  auto density_of = many ? dpc_density_kernel<T, 4> : dpc_density_kernel<T, 1>;
  auto score_of = many ? dpc_score_kernel<T, 4> : dpc_score_kernel<T, 1>;
  auto assign = many ? dpc_assign_kernel<T, 4> : dpc_assign_kernel<T, 1>;
  VTC_LAUNCH(squares_kernel<T>, dim3(blocks(all, THREADS / LANES)), THREADS, 0, stream, x, squares, all, d);
  VTC_LAUNCH(density_of, grid, THREADS, 0, stream, x, squares, each, mask, nearest, density, widest, n, d, neighbors);
  VTC_LAUNCH(score_of, grid, THREADS, 0, stream, x, squares, mask, density, widest, score, n, d);
  VTC_LAUNCH(top_kernel, dim3(blocks(n, THREADS), batch), THREADS, 0, stream, score, each, mask, order, n, most);
  VTC_LAUNCH(assign, grid, THREADS, 0, stream, x, squares, mask, order, target, distance, n, d, most);
}
#endif

}  // namespace vtc_cuda
