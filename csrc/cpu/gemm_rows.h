// Where the rows of a blocked product lie, and what is added beside it: in an ordinary call, nothing and one after
// the other. segmented_gemm.h has the other kind.
#pragma once

#include "gemm_layout.h"

namespace fastlora::cpu {
namespace {

// A row below 0 is one of zeros.
struct NaturalRows {
  int64_t operator()(int64_t row) const { return row; }
};

// out[j] = from[j] + values[first + (k0 + j) / group] for j in [0, count): what the offsets of a weight add to
// columns from k0 on. `out` may be `from`.
inline void add_group_values(const float* from, const void* values, DType dtype, int64_t first, int64_t group,
                             int64_t k0, int64_t count, float* out) {
  for (int64_t j = 0, end; j < count; j = end) {
    const int64_t at = (k0 + j) / group;
    end = min64(count, (at + 1) * group - k0);
    const float value = load_as_float(values, first + at, dtype);
    for (int64_t i = j; i < end; ++i) out[i] = from[i] + value;
  }
}

struct NothingBeside {
  struct State {};
  static constexpr bool kAdds = false;
  NaturalRows from, to;
};

}  // namespace
}  // namespace fastlora::cpu
