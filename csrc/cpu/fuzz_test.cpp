// The library of cpu.cpp with faults planted beside it, which tests/test_kernels_fuzz.py builds under the sanitizers: they
// must see these before its random calls mean anything.
#include "../cpu.cpp"

#include <memory>

// 0: a value written behind an array, 1: one read from behind it, both by a tile of products; 2: an integer overflows.
extern "C" void plant(int fault) {
  const int64_t width = 64, packed = width * vtc::NR;
  const std::unique_ptr<float[]> row(new float[width]()), columns(new float[packed - (fault == 1)]());
  const std::unique_ptr<float[]> out(new float[4 * vtc::NR - (fault == 0)]());
  const float* const rows[] = {row.get(), row.get(), row.get(), row.get()};
  vtc::dots(rows, 4, columns.get(), width, out.get());
  volatile int large = std::numeric_limits<int>::max() - 1;
  large = large + fault;
}
