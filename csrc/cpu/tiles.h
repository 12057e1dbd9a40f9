// Rows of dot products, a tile at a time: the hot loop that energy, match, dpc_knn and the selections share.
//
// Columns are packed once, NR at a time with the width outermost, so that a step along the width is one load of NR
// values; rows meet them, each value broadcast. Every kernel is written once, over a type that says how wide the
// processor's vectors are, and compiled for AVX-512, AVX2 and anything else; which one runs is decided at run time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define VTC_X86 1
#else
#define VTC_X86 0
#endif
#define VTC_INLINE inline __attribute__((always_inline))

// parallel(first, last, grain, f): f(a, b) on parts of [first, last). The front door sets torch's own threads; without
// one, as under the sanitizers, it is a plain call.
#ifndef VTC_PARALLEL
#define VTC_PARALLEL(first, last, grain, f) (f)((first), (last))
#endif

namespace vtc {

constexpr int64_t NR = 32;    // columns of a tile
constexpr int64_t ROWS = 48;  // rows that meet a panel of columns while it is near
constexpr int64_t DEPTH = 256;  // of the width at a time: 32 columns of it are 32 KB

template <int LANES, int M_, int STRIPES_>
struct Vectors {
  typedef float F __attribute__((vector_size(4 * LANES)));
  typedef int32_t I __attribute__((vector_size(4 * LANES)));
  typedef double D __attribute__((vector_size(8 * LANES)));
  static constexpr int lanes = LANES, M = M_, stripes = STRIPES_;  // M rows x (stripes x lanes) columns in registers
};
using Wide = Vectors<16, 12, 2>;
using Middle = Vectors<8, 6, 2>;
using Plain = Vectors<4, 2, 4>;

// 2 = AVX-512, 1 = AVX2 with FMA, 0 = anything: what there is, or less, where VTC_CPU (avx512, avx2, plain) asks for less.
inline int processor() {
#if VTC_X86
  static const int level = [] {
    const int best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") ? 2
                     : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")       ? 1
                                                                                             : 0;
    const char* const names[] = {"plain", "avx2", "avx512"};
    const char* asked = std::getenv("VTC_CPU");
    if (asked == nullptr || *asked == 0) return best;
    for (int l = 0; l < 3; ++l)
      if (std::strcmp(asked, names[l]) == 0) return std::min(best, l);
    std::fprintf(stderr, "vtc: VTC_CPU=%s is left aside: it takes avx512, avx2 or plain\n", asked);
    return best;
  }();
  return level;
#else
  return 0;
#endif
}

// VTC_KERNEL(name, (type a, ...), (a, ...)): a function `name` that runs name_body<Vectors> for this processor.
#if VTC_X86
#define VTC_KERNEL(name, parameters, arguments)                                                            \
  __attribute__((target("avx512f,avx512dq"))) inline void name##_wide parameters { name##_body<Wide> arguments; } \
  __attribute__((target("avx2,fma"))) inline void name##_middle parameters { name##_body<Middle> arguments; }     \
  inline void name##_plain parameters { name##_body<Plain> arguments; }                                    \
  inline void name parameters {                                                                            \
    if (processor() == 2) name##_wide arguments;                                                           \
    else if (processor() == 1) name##_middle arguments;                                                    \
    else name##_plain arguments;                                                                           \
  }
#else
#define VTC_KERNEL(name, parameters, arguments) \
  inline void name parameters { name##_body<Plain> arguments; }
#endif

template <class F, class T>
VTC_INLINE void load(F& v, const T* from) {  // by memcpy, because nothing is aligned; it is one move
  std::memcpy(&v, from, sizeof v);
}
template <class F, class T>
VTC_INLINE void store(T* to, const F& v) {
  std::memcpy(to, &v, sizeof v);
}

// All columns of a set of rows, packed; those beyond the last are zero.
struct Columns {
  int64_t count, width;
  std::vector<float> packed;
  Columns(int64_t n, int64_t d) : count(n), width(d), packed(panels() * d * NR, 0.0f) {}
  Columns(const float* const* rows, int64_t n, int64_t d) : Columns(n, d) {
    for (int64_t p = 0; p < panels(); ++p) pack(p, rows + p * NR);
  }
  void pack(int64_t p, const float* const* rows) {
    const int64_t here = std::min(NR, count - p * NR);
    float* to = packed.data() + p * width * NR;
    for (int64_t k0 = 0; k0 < width; k0 += 16)  // in squares that stay near
      for (int64_t j = 0; j < here; ++j)
        for (int64_t k = k0; k < std::min(width, k0 + 16); ++k) to[k * NR + j] = rows[j][k];
  }
  int64_t panels() const { return (count + NR - 1) / NR; }
  const float* panel(int64_t p) const { return packed.data() + p * width * NR; }
};

// M rows against NR columns over `depth` of the width, added to out [M, NR] or put there.
template <class V, int M>
VTC_INLINE void block(const float* const* rows, const float* packed, int64_t depth, bool add, float* out) {
  constexpr int L = V::lanes, S = M == V::M ? V::stripes : int(NR / L) < 4 ? int(NR / L) : 4;
  using F = typename V::F;
  for (int64_t first = 0; first < NR; first += S * L) {
    F sum[M][S];
    for (int i = 0; i < M; ++i)
      for (int s = 0; s < S; ++s) sum[i][s] = F{};
    for (int64_t k = 0; k < depth; ++k) {
      F column[S];
      for (int s = 0; s < S; ++s) load(column[s], packed + k * NR + first + s * L);
      for (int i = 0; i < M; ++i) {
        const float x = rows[i][k];
        for (int s = 0; s < S; ++s) sum[i][s] += x * column[s];
      }
    }
    for (int i = 0; i < M; ++i)
      for (int s = 0; s < S; ++s) {
        F before = {};
        if (add) load(before, out + i * NR + first + s * L);  // last: short sums of sums lose less
        store(out + i * NR + first + s * L, before + sum[i][s]);
      }
  }
}

// out [m, NR], m <= ROWS: dot products of rows and packed columns.
template <class V>
VTC_INLINE void tile_body(const float* const* rows, int m, const float* packed, int64_t width, float* out) {
  const float* at[ROWS];
  if (width == 0) std::memset(out, 0, sizeof(float) * m * NR);
  for (int64_t k = 0; k < width; k += DEPTH) {
    const int64_t depth = std::min(DEPTH, width - k);
    for (int i = 0; i < m; ++i) at[i] = rows[i] + k;
    int i = 0;
    for (; i + V::M <= m; i += V::M) block<V, V::M>(at + i, packed + k * NR, depth, k > 0, out + i * NR);
    for (; i + 4 <= m; i += 4) block<V, 4>(at + i, packed + k * NR, depth, k > 0, out + i * NR);
    if (i < m) {  // four again, the last one more than once: as fast as one alone
      const float* last[4];
      float some[4 * NR] = {};
      for (int r = 0; r < 4; ++r) last[r] = at[std::min(i + r, m - 1)];
      if (k > 0) std::copy(out + i * NR, out + m * NR, some);
      block<V, 4>(last, packed + k * NR, depth, k > 0, some);
      std::copy(some, some + (m - i) * NR, out + i * NR);
    }
  }
}
template <class V>
VTC_INLINE void dots_body(const float* const* rows, int m, const float* packed, int64_t width, float* out) {
  tile_body<V>(rows, m, packed, width, out);
}
VTC_KERNEL(dots, (const float* const* rows, int m, const float* packed, int64_t width, float* out),
           (rows, m, packed, width, out))

inline std::vector<const float*> pointers(const float* x, int64_t n, int64_t d) {
  std::vector<const float*> rows(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = x + i * d;
  return rows;
}

// One dot product, with sums enough to keep the units busy.
template <class V>
VTC_INLINE void dot_into_body(const float* a, const float* b, int64_t width, float* out) {
  constexpr int sums = 4;
  typename V::F sum[sums];
  for (int s = 0; s < sums; ++s) sum[s] = typename V::F{};
  int64_t k = 0;
  for (; k + sums * V::lanes <= width; k += sums * V::lanes)
    for (int s = 0; s < sums; ++s) {
      typename V::F x, y;
      load(x, a + k + s * V::lanes);
      load(y, b + k + s * V::lanes);
      sum[s] += x * y;
    }
  for (int s = 1; s < sums; ++s) sum[0] += sum[s];
  float total = 0;
  for (int l = 0; l < V::lanes; ++l) total += sum[0][l];
  for (; k < width; ++k) total += a[k] * b[k];
  *out = total;
}
VTC_KERNEL(dot_into, (const float* a, const float* b, int64_t width, float* out), (a, b, width, out))

inline float dot(const float* a, const float* b, int64_t width) {
  float out;
  dot_into(a, b, width, &out);
  return out;
}

constexpr float SAME = 1.0f - 1e-6f;  // copies have cosine 1 but for rounding: from here on it counts as 1
inline float same(float c) { return c > SAME ? 1.0f : c; }

}  // namespace vtc
