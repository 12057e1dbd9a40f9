// PiToMe's energy of every token, the similarities a tile at a time. Definition: vtc/ops/definitions.py, energy.
//
// Floor: 2 B N^2 D operations and B N (D width-of-T + 4) bytes; the N x N similarities are never written.
// Each block of 16 R rows reads all N rows (from L2 after the first): B N^2 D width-of-T / (16 R) bytes. Unmeasured.
#pragma once

#include "tile.cuh"

namespace vtc_cuda {

enum Form { ELU = 0, PAPER = 1, GAUSSIAN = 2, NEAREST = 3 };

__device__ __forceinline__ float energy_of(float s, int form, float margin, float alpha, float sigma) {
  const float d = s - margin;
  if (form == ELU) return d > 0.0f ? d : alpha * expm1f(d);
  if (form == PAPER) return s >= margin ? s : alpha * expm1f(d);
  const float z = (1.0f - s) / sigma;
  return expf(-0.5f * (z * z)) / (sigma * 2.5066282746310002f);
}

// unit [B, n, d], mask [B, n] or nullptr -> out [B, n]. Grid: (row tiles, B).
template <typename T, int R>
__global__ void __launch_bounds__(THREADS) energy_kernel(
    const T* unit, const bool* mask, float* out, int n, int d, int form, float margin, float alpha, float sigma) {
  __shared__ Stage<R> stage;
  const int row0 = blockIdx.x * SIDE * R;
  const T* mine = unit + int64(blockIdx.y) * n * d;
  const bool* real = mask == nullptr ? nullptr : mask + int64(blockIdx.y) * n;
  float total[R], count = 0.0f;
  for (int r = 0; r < R; ++r) total[r] = form == NEAREST ? -2.0f : 0.0f;
  for (int column0 = 0; column0 < n; column0 += COLUMNS) {
    float s[R][SPAN];
    auto row = [=](int i) { return row0 + i < n ? mine + int64(row0 + i) * d : nullptr; };
    auto column = [=](int j) { return column0 + j < n ? mine + int64(column0 + j) * d : nullptr; };
    tile<R, false, T>(stage, row, column, d, s);
    bool there[SPAN];
    for (int c = 0; c < SPAN; ++c) {
      const int j = column0 + tile_column(c);
      there[c] = j < n && (real == nullptr || real[j]);
      count += there[c] ? 1.0f : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float part = 0.0f;
#pragma unroll
      for (int c = 0; c < SPAN; ++c) {
        const bool itself = row0 + tile_row<R>(r) == column0 + tile_column(c);
        if (!there[c]) continue;
        if (form == NEAREST) {
          if (!itself) total[r] = peak(total[r], s[r][c]);
        } else {  // a token's similarity to itself is 1, or 0 for a zero vector, but for rounding
          part += energy_of(itself ? rintf(s[r][c]) : s[r][c], form, margin, alpha, sigma);
        }
      }
      if (form != NEAREST) total[r] += part;
    }
  }
  count = sum_lanes(count, SIDE);  // exact below 2^24 tokens
  for (int r = 0; r < R; ++r) {
    const int i = row0 + tile_row<R>(r);
    const float all = form == NEAREST ? max_lanes(total[r], SIDE) : sum_lanes(total[r], SIDE) / higher(count, 1.0f);
    if (threadIdx.x % SIDE == 0 && i < n)
      out[int64(blockIdx.y) * n + i] = real == nullptr || real[i] ? all : -infinity();
  }
}

#ifndef __CUDACC_RTC__
template <typename T>
void launch_energy(cudaStream_t stream, const T* unit, const bool* mask, float* out, int batch, int n, int d, int form,
                   double margin, double alpha) {
  if (batch == 0 || n == 0) return;
  const bool many = many_tiles(n, batch);
  auto kernel = many ? energy_kernel<T, 4> : energy_kernel<T, 1>;
  VTC_LAUNCH(kernel, dim3(blocks(n, SIDE * (many ? 4 : 1)), batch), THREADS, 0, stream, unit, mask, out, n, d, form,
             float(margin), float(alpha), float(1.0 - margin));
}
#endif

}  // namespace vtc_cuda
