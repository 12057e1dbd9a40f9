// The reduction of ZOO-Prune's probes, fused over them: the mean over probes of |difference| / 2h.
// Definition: vtc/scores/sensitivity.py, central_differences.
//
// Floor: read m B N C values once, 2 operations each. Unmeasured.
#pragma once

#include "common.cuh"

namespace vtc_cuda {

constexpr int PROBE_THREADS = 256;

// difference [m, tokens, c] (tokens = B N) -> out [tokens] = sum_m |difference| / divisor. A warp per token.
template <typename T>
__global__ void __launch_bounds__(PROBE_THREADS) probes_kernel(const T* difference, float* out, int m, int64 tokens,
                                                               int c, float divisor) {
  const int64 i = int64(blockIdx.x) * (PROBE_THREADS / LANES) + threadIdx.x / LANES;
  if (i >= tokens) return;
  float sum = 0.0f;
  for (int p = 0; p < m; ++p) {
    const T* row = difference + (p * tokens + i) * c;
    sum += sqrtf(dot_lanes(row, row, c));
  }
  if (threadIdx.x % LANES == 0) out[i] = sum / divisor;
}

#ifndef __CUDACC_RTC__
template <typename T>
void launch_probes(cudaStream_t stream, const T* difference, float* out, int m, int64 tokens, int c, double step) {
  if (tokens == 0) return;
  VTC_LAUNCH(probes_kernel<T>, dim3(blocks(tokens, PROBE_THREADS / LANES)), PROBE_THREADS, 0, stream, difference, out,
             m, tokens, c, float(2.0 * step * (m > 0 ? m : 1)));
}
#endif

}  // namespace vtc_cuda
