// The offsets of a weight as operands of the blocked GEMM.
#pragma once

#include "gemm_backward.h"

namespace fastlora::cpu {
namespace {

inline DenseRows offsets_of(const Nf4Weight& w) { return {w.offsets, DType::kFloat32, w.n, w.groups, 1.0f}; }

// per_group (m, groups) = dy·offsets; nothing where there are none.
template <class L>
Status offset_product(const void* dy, int64_t m, const Nf4Weight& w, DType dtype, void* per_group,
                      int32_t threads) {
  if (w.groups == 0) return Status::kOk;
  Backward<L, DenseRows> product{.dy = dy,
                                 .m = m,
                                 .n = w.n,
                                 .k = w.groups,
                                 .dtype = dtype,
                                 .source = offsets_of(w),
                                 .v = nullptr,
                                 .ext = {},
                                 .out = per_group};
  return product.run(threads);
}

}  // namespace
}  // namespace fastlora::cpu
