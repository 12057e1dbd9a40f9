// The CUDA kernels as functions of the CPU, by the shim, for tests/test_kernels_cuda.py to call through ctypes:
//   g++ -std=c++17 -O1 -fopenmp -shared -fPIC csrc/cuda/host_test.cpp
// type: 0 = float32, 1 = float16, 2 = bfloat16.
#define VTC_SHIM
#include "dpc_knn.cuh"
#include "energy.cuh"
#include "match.cuh"
#include "merge.cuh"
#include "minmax.cuh"
#include "probes.cuh"
#include "received.cuh"
#include "round.cuh"
#include "select.cuh"

using namespace vtc_cuda;

namespace {

template <typename F>
void by_type(int type, F call) {
  if (type == 0) call(static_cast<float*>(nullptr));
  else if (type == 1) call(static_cast<__half*>(nullptr));
  else call(static_cast<__nv_bfloat16*>(nullptr));
}

// Writes one float behind an array, in shared and in global memory: the tests of the sanitizers must catch both.
__global__ void overflow_kernel(float* out, int n, bool in_shared) {
  __shared__ float room[32];
  float* to = in_shared ? room : out;
  if (threadIdx.x == 0) to[in_shared ? 32 : n] = 1.0f;
  __syncthreads();
  out[threadIdx.x % n] = room[threadIdx.x];
}

// Half of a warp waits at a barrier that the other half never reaches.
__global__ void divergent_kernel(float* out) {
  if (threadIdx.x < 16) __syncthreads();
  else out[0] = __shfl_xor_sync(ALL, 0.0f, 1);
}

}  // namespace

extern "C" {

void shim_energy(int type, const void* unit, const bool* mask, float* out, int batch, int n, int d, int form,
                 double margin, double alpha) {
  by_type(type, [&](auto* t) {
    launch_energy(nullptr, static_cast<decltype(t)>(const_cast<void*>(unit)), mask, out, batch, n, d, form, margin,
                  alpha);
  });
}

void shim_match(int type, const void* unit, const int64* a, const int64* b, const bool* valid, float* best, int64* at,
                int batch, int n, int d, int na, int nb) {
  by_type(type, [&](auto* t) {
    launch_match(nullptr, static_cast<decltype(t)>(const_cast<void*>(unit)), a, b, valid, best, at, batch, n, d, na,
                 nb);
  });
}

void shim_top_pairs(const float* best, const int64* at, const int64* a, const int64* b, const bool* valid,
                    const int64* each, int64* source, int64* target, float* score, int batch, int na, int nb, int most) {
  launch_top_pairs(nullptr, best, at, a, b, valid, each, source, target, score, batch, na, nb, most);
}

void shim_pair_round(int type, const void* metric, const float* weight, int64* group, float* size, int64* source,
                     float* score, int batch, int n, int d, int r, int prefix, int form, double margin, double alpha,
                     bool half, bool protect) {
  std::vector<float> floats(batch * round_floats(n - prefix, d));
  std::vector<int64> longs(batch * round_longs(n - prefix));
  by_type(type, [&](auto* t) {
    launch_round(nullptr, static_cast<decltype(t)>(const_cast<void*>(metric)), weight, floats.data(), longs.data(),
                 group, size, source, score, batch, n, d, r, prefix, form, margin, alpha, half, protect);
  });
}

void shim_rows(int type, const void* x, const int64* at, void* out, int batch, int n, int c, int m) {
  by_type(type, [&](auto* t) {
    launch_rows(nullptr, static_cast<decltype(t)>(const_cast<void*>(x)), at, static_cast<decltype(t)>(out), batch, n, c,
                m);
  });
}

void shim_merge(int type, const void* x, const int64* group, const float* weight, void* out, int batch, int n, int c,
                int slots) {
  by_type(type, [&](auto* t) {
    launch_merge(nullptr, static_cast<decltype(t)>(const_cast<void*>(x)), group, weight,
                 static_cast<decltype(t)>(out), batch, n, c, slots);
  });
}

void shim_merge_backward(int type, const void* grad, const int64* group, const float* weight, void* out, int batch,
                         int n, int c, int slots) {
  by_type(type, [&](auto* t) {
    launch_merge_backward(nullptr, static_cast<decltype(t)>(const_cast<void*>(grad)), group, weight,
                          static_cast<decltype(t)>(out), batch, n, c, slots);
  });
}

void shim_greedy(int type, const void* unit, const float* table, const float* importance, const int64* each,
                 const bool* mask, int64* order, int batch, int n, int d, int most, int kind, double balance,
                 int step) {
  std::vector<float> state(batch * greedy_state(n));
  by_type(type, [&](auto* t) {
    launch_greedy(nullptr, static_cast<decltype(t)>(const_cast<void*>(unit)), table, importance, each, mask,
                  state.data(), order, batch, n, d, most, kind, balance, step);
  });
}

void shim_dpp(int type, const void* unit, const float* table, const float* relevance, const int64* each,
              const bool* mask, int64* order, int batch, int n, int d, int most) {
  std::vector<float> factor(int64(batch) * most * n), left(batch * dpp_state(n));
  by_type(type, [&](auto* t) {
    launch_dpp(nullptr, static_cast<decltype(t)>(const_cast<void*>(unit)), table, relevance, each, mask, factor.data(),
               left.data(), order, batch, n, d, most);
  });
}

void shim_dpc_knn(int type, const void* x, const int64* each, const bool* mask, int64* order, int64* target,
                  float* distance, int batch, int n, int d, int most, int neighbors) {
  std::vector<float> state(batch * dpc_state(n, neighbors));
  by_type(type, [&](auto* t) {
    launch_dpc(nullptr, static_cast<decltype(t)>(const_cast<void*>(x)), each, mask, state.data(), order, target,
               distance, batch, n, d, most, neighbors);
  });
}

void shim_received(int type, const void* query, const void* key, const bool* mask, float* out, int batch, int heads,
                   int key_heads, int m, int n, int d, double scale) {
  std::vector<float> state(batch * received_state(heads, m, n));
  by_type(type, [&](auto* t) {
    launch_received(nullptr, static_cast<decltype(t)>(const_cast<void*>(query)),
                    static_cast<decltype(t)>(const_cast<void*>(key)), mask, state.data(), out, batch, heads, key_heads,
                    m, n, d, scale);
  });
}

void shim_probes(int type, const void* difference, float* out, int m, int64 tokens, int c, double step) {
  by_type(type, [&](auto* t) {
    launch_probes(nullptr, static_cast<decltype(t)>(const_cast<void*>(difference)), out, m, tokens, c, step);
  });
}

void shim_minmax(const float* scores, const bool* mask, float* out, int batch, int n, double eps, double floor) {
  launch_minmax(nullptr, scores, mask, out, batch, n, eps, floor);
}

void shim_overflow(float* out, int n, bool in_shared) {
  VTC_LAUNCH(overflow_kernel, dim3(1), 32, 0, nullptr, out, n, in_shared);
}

void shim_divergent(float* out) { VTC_LAUNCH(divergent_kernel, dim3(1), 32, 0, nullptr, out); }

}  // extern "C"
