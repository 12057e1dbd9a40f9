// The reduction of ZOO-Prune's probes: the mean over them of |difference| / 2h. Definition: vtc/ops/definitions.py,
// probe_norms.
#pragma once

#include <cmath>

#include "tiles.h"

namespace vtc {

// difference [m, tokens, c], tokens [first, last) -> out [tokens]
inline void probe_norms(const float* difference, int64_t m, int64_t tokens, int64_t c, int64_t first, int64_t last,
                        double step, float* out) {
  for (int64_t i = first; i < last; ++i) {
    double sum = 0.0;
    for (int64_t p = 0; p < m; ++p) {
      const float* row = difference + (p * tokens + i) * c;
      sum += std::sqrt(double(dot(row, row, c)));
    }
    out[i] = float(sum / (2.0 * step * double(std::max<int64_t>(1, m))));
  }
}

}  // namespace vtc
