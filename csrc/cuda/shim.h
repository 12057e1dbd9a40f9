// CUDA C++ on the CPU, so that the kernels can be tested, and run under the sanitizers, where there is no GPU.
//
// A block is run by one OS thread: every CUDA thread is a fiber that runs until it must wait at __syncthreads or at a
// shuffle of its warp. OpenMP takes the blocks of a launch. Enough for what the kernels use, and they use little: 1-D
// blocks of whole warps, shared memory, __syncthreads, shuffles of the whole warp.
//
// With VTC_SHIM_SERIAL blocks run one after the other and nothing is thread-local: AddressSanitizer puts red zones
// around plain statics only, and makes every look at a thread-local variable a call.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#ifdef VTC_SHIM_SERIAL
#define VTC_SHIM_LOCAL
#else
#define VTC_SHIM_LOCAL thread_local
#endif
#define __shared__ static VTC_SHIM_LOCAL

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

namespace vtc_shim {

constexpr int WARP = 32;
constexpr size_t STACK = 32 << 10;
enum State { READY, AT_WARP, AT_BLOCK, DONE };

// Where a fiber or the scheduler goes on. ucontext starts a fiber, on a stack of its own; afterwards two built-ins switch,
// which save less and call nobody. The two must not stand in one function; sanitizers need not know of the jump.
using Place = void*[5];
#define VTC_SHIM_SWITCH __attribute__((noinline, no_sanitize("address"))) inline
VTC_SHIM_SWITCH void jump(Place& to) { __builtin_longjmp(to, 1); }
VTC_SHIM_SWITCH void go(Place& here, Place& to) {
  if (__builtin_setjmp(here) == 0) jump(to);
}
VTC_SHIM_SWITCH void start(Place& here, ucontext_t& to) {
  if (__builtin_setjmp(here) == 0) setcontext(&to);
}

struct Fiber {
  Place here;
  std::unique_ptr<char[]> stack;
  State state = READY;
  int phase = 0;  // two shuffles in a row use different slots, so that one wait per shuffle is enough
};

struct Block {
  std::vector<Fiber> fibers;
  Place scheduler;
  std::vector<uint32_t> slots;
  std::vector<char> shared;
  const std::function<void()>* body = nullptr;
};

inline VTC_SHIM_LOCAL Block block;
inline VTC_SHIM_LOCAL dim3 thread_index, block_index, block_size, grid_size;

inline void wait(State where) {
  Fiber& mine = block.fibers[thread_index.x];
  mine.state = where;
  go(mine.here, block.scheduler);
}

inline void live() {  // block after block
  for (;; wait(DONE)) (*block.body)();
}

inline void resume(Fiber& fiber) {
  if (fiber.stack) return go(block.scheduler, fiber.here);
  fiber.stack = std::make_unique<char[]>(STACK);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  start(block.scheduler, context);
}

// Runs what can run of fibers [first, last), then lets them pass if all that still run wait at `where`.
inline bool turn(int first, int last, State where) {
  bool ran = false, all = true, any = false;
  for (int i = first; i < last; ++i) {
    Fiber& fiber = block.fibers[i];
    while (fiber.state == READY) {
      ran = true;
      thread_index.x = unsigned(i);
      resume(fiber);
    }
    all = all && (fiber.state == where || fiber.state == DONE);
    any = any || fiber.state == where;
  }
  for (int i = first; all && i < last; ++i)
    if (block.fibers[i].state == where) block.fibers[i].state = READY;
  return ran || (all && any);
}

inline void run_block(unsigned threads, size_t shared, const std::function<void()>& body) {
  const int count = int(threads);
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  block.slots.assign(2 * threads, 0);
  block.shared = std::vector<char>(shared);  // a new allocation of this very size: an overflow is seen
  block.body = &body;
  for (int i = 0; i < count; ++i) {
    block.fibers[i].state = READY;
    block.fibers[i].phase = 0;
  }
  for (;;) {
    bool moved = false, done = true;
    for (int w = 0; w < count; w += WARP)
      while (turn(w, w + WARP, AT_WARP)) moved = true;
    moved = turn(0, count, AT_BLOCK) || moved;
    for (int i = 0; i < count; ++i) done = done && block.fibers[i].state == DONE;
    if (done) return;
    if (!moved) {
      std::fprintf(stderr, "shim: the threads of a block wait for each other at different barriers\n");
      std::abort();
    }
  }
}

inline void launch(dim3 grid, unsigned threads, size_t shared, const std::function<void()>& body) {
  const long blocks = long(grid.x) * grid.y * grid.z;
  if (threads % WARP || threads == 0 || threads > 1024 || shared > 48 << 10 || grid.y > 65535 || grid.z > 65535) {
    std::fprintf(stderr, "shim: a GPU would refuse this launch\n");
    std::abort();
  }
#ifndef VTC_SHIM_SERIAL
#pragma omp parallel for schedule(dynamic)
#endif
  for (long b = 0; b < blocks; ++b) {
    block_size = dim3(threads);
    grid_size = grid;
    block_index = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    run_block(threads, shared, body);
  }
}

inline float xor_shuffle(float value, int lanes) {
  Fiber& mine = block.fibers[thread_index.x];
  uint32_t* slots = block.slots.data() + (mine.phase ? block_size.x : 0);
  mine.phase ^= 1;
  std::memcpy(&slots[thread_index.x], &value, 4);
  wait(AT_WARP);
  std::memcpy(&value, &slots[thread_index.x ^ unsigned(lanes)], 4);
  return value;
}

}  // namespace vtc_shim

#define threadIdx (vtc_shim::thread_index)
#define blockIdx (vtc_shim::block_index)
#define blockDim (vtc_shim::block_size)
#define gridDim (vtc_shim::grid_size)
#define VTC_DYNAMIC_SHARED(name) float* name = reinterpret_cast<float*>(vtc_shim::block.shared.data())
#define VTC_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  ((void)(stream), vtc_shim::launch(grid, threads, shared, [=] { kernel(__VA_ARGS__); }))

inline void __syncthreads() { vtc_shim::wait(vtc_shim::AT_BLOCK); }
inline float __shfl_xor_sync(unsigned, float value, int lanes) { return vtc_shim::xor_shuffle(value, lanes); }
inline float __int_as_float(int bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline int __float_as_int(float f) { int bits; std::memcpy(&bits, &f, 4); return bits; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) { return __int_as_float(int(uint32_t(x.bits) << 16)); }
inline __nv_bfloat16 __float2bfloat16(float f) {
  uint32_t bits = uint32_t(__float_as_int(f));
  if (f != f) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, rest = x.bits & 1023;
  const int power = int(exponent ? exponent : 1) - 25;
  const float size =
      exponent == 31 ? (rest ? NAN : INFINITY) : std::ldexp(float(rest + (exponent ? 1024 : 0)), power);
  return __int_as_float(int(uint32_t(__float_as_int(size)) | sign));
}
inline __half __float2half(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float size = std::fabs(f);
  if (size != size) return {0x7fff};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent;
  std::frexp(size, &exponent);
  exponent = size == 0.0f || exponent < -13 ? -13 : exponent;  // below: subnormal, in steps of 2^-24
  // the implicit one of a normal number carries into the exponent field, as does rounding up to the next power
  const int steps = int(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return {uint16_t(sign | (steps + ((exponent + 13) << 10)))};
}
