// The best partner in b of every token of a, no Na x Nb matrix in memory. Definition: vtc/ops/definitions.py,
// bipartite_match; and the r best of those pairs.
//
// Floor: 2 B Na Nb D operations and B (Na + Nb) D width-of-T + 20 B Na bytes; at N = 577, D = 64, B = 1 both are far
// below the time of a launch. Unmeasured.
#pragma once

#include "tile.cuh"

namespace vtc_cuda {

// unit [B, n, d]; a [B, na], b [B, nb] tokens; valid [B, nb] or nullptr -> best [B, na], at [B, na], an index into b:
// the lowest of equals, 0 (and -inf) where no entry of b is valid. Grid: (tiles of a, B).
template <typename T, int R>
__global__ void __launch_bounds__(THREADS) match_kernel(
    const T* unit, const int64* a, const int64* b, const bool* valid, float* best, int64* at, int n, int d, int na,
    int nb) {
  __shared__ Stage<R> stage;
  const int row0 = blockIdx.x * SIDE * R;
  const int64 image = blockIdx.y;
  const T* mine = unit + image * n * d;
  const int64 *from = a + image * na, *to = b + image * nb;
  auto row_of = [=](int64 token) { return token >= 0 && token < n ? mine + token * d : nullptr; };
  float top[R];
  int top_at[R];
  for (int r = 0; r < R; ++r) {
    top[r] = -infinity();
    top_at[r] = 0;
  }
  for (int column0 = 0; column0 < nb; column0 += COLUMNS) {
    float s[R][SPAN];
    auto row = [=](int i) { return row0 + i < na ? row_of(from[row0 + i]) : nullptr; };
    auto column = [=](int j) { return column0 + j < nb ? row_of(to[column0 + j]) : nullptr; };
    tile<R, false, T>(stage, row, column, d, s);
#pragma unroll
    for (int c = 0; c < SPAN; ++c) {  // ascending: a strict comparison keeps the lowest of equals
      const int j = column0 + tile_column(c);
      if (j >= nb || (valid != nullptr && !valid[image * nb + j])) continue;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (s[r][c] > top[r]) {
          top[r] = s[r][c];
          top_at[r] = j;
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const int i = row0 + tile_row<R>(r);
    best_lanes(top[r], top_at[r], SIDE);
    if (threadIdx.x % SIDE == 0 && i < na) {
      best[image * na + i] = top[r];
      at[image * na + i] = top_at[r];
    }
  }
}

// The `most` best pairs of an image, of which each[image] exist (nullptr: all), and without `all` none of -inf: best, at [B, na] of match_kernel; valid
// [B, na] or nullptr -> source, target, score [B, most]. A pair's place is the number of pairs before it: na^2
// comparisons, the scores in shared memory. Grid: (na / 256, B).
__global__ void __launch_bounds__(THREADS) top_pairs_kernel(
    const float* best, const int64* at, const int64* a, const int64* b, const bool* valid, const int64* each,
    int64* source, int64* target, float* score, int na, int nb, int most, int all) {
  __shared__ float scores[THREADS];
  const int64 image = blockIdx.y;
  const int i = blockIdx.x * THREADS + threadIdx.x;
  auto score_of = [=](int j) {
    return valid == nullptr || valid[image * na + j] ? best[image * na + j] : -infinity();
  };
  const float mine = i < na ? score_of(i) : 0.0f;
  int place = 0;
  for (int j0 = 0; j0 < na; j0 += THREADS) {
    __syncthreads();
    if (j0 + int(threadIdx.x) < na) scores[threadIdx.x] = score_of(j0 + threadIdx.x);
    __syncthreads();
    for (int j = 0; j < THREADS && j0 + j < na; ++j) place += before(scores[j], j0 + j, mine, i);
  }
  if (i >= na || place >= most) return;
  const int64 partner = at[image * na + i], to = image * most + place;
  const bool real = all || ((each == nullptr || place < each[image]) && mine != -infinity());
  const bool there = real && partner >= 0 && partner < nb;
  source[to] = there ? a[image * na + i] : -1;
  target[to] = there ? b[image * nb + partner] : -1;
  score[to] = there ? mine : -infinity();
}

#ifndef __CUDACC_RTC__
inline void launch_top_pairs(cudaStream_t stream, const float* best, const int64* at, const int64* a, const int64* b,
                             const bool* valid, const int64* each, int64* source, int64* target, float* score,
                             int batch, int na, int nb, int most) {
  if (batch == 0 || most == 0) return;
  VTC_LAUNCH(top_pairs_kernel, dim3(blocks(na, THREADS), batch), THREADS, 0, stream, best, at, a, b, valid, each,
             source, target, score, na, nb, most, 0);
}

template <typename T>
void launch_match(cudaStream_t stream, const T* unit, const int64* a, const int64* b, const bool* valid, float* best,
                  int64* at, int batch, int n, int d, int na, int nb) {
  if (batch == 0 || na == 0) return;
  const bool many = many_tiles(na, batch);
  auto kernel = many ? match_kernel<T, 4> : match_kernel<T, 1>;
  VTC_LAUNCH(kernel, dim3(blocks(na, SIDE * (many ? 4 : 1)), batch), THREADS, 0, stream, unit, a, b, valid, best, at, n,
             d, na, nb);
}
#endif

}  // namespace vtc_cuda
