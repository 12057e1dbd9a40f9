// The best partner in b of every token of a, no Na x Nb matrix in memory. Definition: vtc/ops/definitions.py,
// bipartite_match (its first half; the r best pairs are a sort of Na numbers).
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

#ifndef __CUDACC_RTC__
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
