// Scores shifted and scaled to [0, 1] by the lowest and the highest real one of their image, in one launch.
// Definition: vtc/ops/definitions.py, minmax.
//
// Floor: read B N scores twice, write them once. Unmeasured.
#pragma once

#include "common.cuh"

namespace vtc_cuda {

// scores [B, n], mask [B, n] or nullptr -> out [B, n]. Grid: B.
__global__ void __launch_bounds__(1024) minmax_kernel(const float* scores, const bool* mask, float* out, int n,
                                                      float eps, float floor) {
  __shared__ float lows[LANES], highs[LANES];
  const int64 image = int64(blockIdx.x) * n;
  const int thread = threadIdx.x, lane = thread % LANES, warp = thread / LANES, warps = blockDim.x / LANES;
  float low = -infinity(), high = -infinity();  // of -score: one reduction serves both
  for (int i = thread; i < n; i += blockDim.x) {
    if (mask != nullptr && !mask[image + i]) continue;
    low = peak(low, -scores[image + i]);
    high = peak(high, scores[image + i]);
  }
  low = max_lanes(low);
  high = max_lanes(high);
  if (lane == 0) {
    lows[warp] = low;
    highs[warp] = high;
  }
  __syncthreads();
  low = -max_lanes(lane < warps ? lows[lane] : -infinity());
  high = max_lanes(lane < warps ? highs[lane] : -infinity());
  const float span = high - low + eps;
  for (int i = thread; i < n; i += blockDim.x) out[image + i] = (scores[image + i] - low + floor) / span;
}

#ifndef __CUDACC_RTC__
inline void launch_minmax(cudaStream_t stream, const float* scores, const bool* mask, float* out, int batch, int n,
                          double eps, double floor) {
  if (batch == 0 || n == 0) return;
  VTC_LAUNCH(minmax_kernel, dim3(batch), CROWD, 0, stream, scores, mask, out, n, float(eps), float(floor));
}
#endif

}  // namespace vtc_cuda
