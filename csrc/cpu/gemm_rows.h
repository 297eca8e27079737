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

struct NothingBeside {
  struct State {};
  static constexpr bool kAdds = false;
  NaturalRows from, to;
};

}  // namespace
}  // namespace fastlora::cpu
