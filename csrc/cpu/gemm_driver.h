// The two ops of the blocked GEMM: a pass for the low-rank factor, then the base with the factor's term in the
// same sums. gemm_layout.h has the picture.
#pragma once

#include "gemm_backward.h"
#include "gemm_forward.h"
#include "gemm_offsets.h"

namespace fastlora::cpu {
namespace {

// Up to this rank u (v) is computed in the pass over W, from the same packed x (dy), where a level says so.
constexpr int64_t kMostProjected = 64;

template <class L>
Status gemm_linear(const Nf4LinearArgs& a) {
  const DenseRows down = {a.lora_a, a.lora_dtype, a.r, a.weight.k, 1.0f};
  const bool projects = L::kProjects && a.r <= kMostProjected && a.weight.n > 0 && a.weight.k > 0;
  if (a.r > 0 && a.lora_a != nullptr && !projects) {
    Forward<L, DenseRows> low_rank{.x = a.x,
                                   .m = a.m,
                                   .k = a.weight.k,
                                   .n = a.r,
                                   .dtype = a.dtype,
                                   .source = down,
                                   .u = nullptr,
                                   .ext = {},
                                   .bias = nullptr,
                                   .out = a.u};
    if (const Status status = low_rank.run(a.threads); status != Status::kOk) return status;
  }
  Forward<L, Nf4Weight> base{.x = a.x,
                             .m = a.m,
                             .k = a.weight.k,
                             .n = a.weight.n,
                             .dtype = a.dtype,
                             .source = a.weight,
                             .u = a.u,
                             .ext = {a.lora_b, a.lora_dtype, a.weight.n, a.r, a.scaling},
                             .bias = a.bias,
                             .out = a.y,
                             .addend = a.addend,
                             .gain = a.gain,
                             .sums = a.sums,
                             .offsets = offsets_of(a.weight)};
  if (a.r > 0 && a.lora_a != nullptr && projects) base.down = down;
  return base.run(a.threads);
}

template <class L>
Status gemm_grad_input(const Nf4LinearGradInputArgs& a) {
  if (const Status status = offset_product<L>(a.dy, a.m, a.weight, a.dtype, a.per_group, a.threads);
      status != Status::kOk)
    return status;
  const DenseRows up = {a.lora_b, a.lora_dtype, a.weight.n, a.r, a.scaling};
  const bool projects = L::kProjects && a.r <= kMostProjected && a.weight.n > 0 && a.weight.k > 0;
  if (a.r > 0 && !projects) {
    Backward<L, DenseRows> low_rank{.dy = a.dy,
                                    .m = a.m,
                                    .n = a.weight.n,
                                    .k = a.r,
                                    .dtype = a.dtype,
                                    .source = up,
                                    .v = nullptr,
                                    .ext = {},
                                    .out = a.v};
    if (const Status status = low_rank.run(a.threads); status != Status::kOk) return status;
  }
  Backward<L, Nf4Weight> base{.dy = a.dy,
                              .m = a.m,
                              .n = a.weight.n,
                              .k = a.weight.k,
                              .dtype = a.dtype,
                              .source = a.weight,
                              .v = a.v,
                              .ext = {a.lora_a, a.lora_dtype, a.r, a.weight.k, 1.0f},
                              .out = a.dx,
                              .addend = a.addend,
                              .per_group = a.per_group,
                              .groups = a.weight.groups};
  if (a.r > 0 && projects) base.up = up;
  return base.run(a.threads);
}

}  // namespace
}  // namespace fastlora::cpu
