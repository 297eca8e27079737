// The one fused kernel and its transpose: a GEMM over packed NF4 with the low-rank term as r more
// contraction steps in the same accumulator.
#pragma once

#include <cstdint>

#include "fastlora/nf4.h"

// A weight's offsets are a low-rank term too, of rank `groups`: x·(W + O)ᵀ = x·Wᵀ + sums·offsetsᵀ, where sums are
// those of x over each group. So they are groups more contraction steps forward; backward, dy·offsets is added to
// every column of its group.

namespace fastlora {

// y = gain · (x·Wᵀ + scaling · u·lora_bᵀ) + bias,  u = x·lora_aᵀ
struct Nf4LinearArgs {
  const void* x;  // (m, k), dtype
  Nf4Weight weight;
  const void* bias;    // (n), dtype, or null
  const void* lora_a;  // (r, k), lora_dtype; null: u is an input (the caller computed it, e.g. after dropout)
  const void* lora_b;  // (n, r), lora_dtype; null when r == 0
  void* u;             // (m, r), dtype: written when lora_a is given, read when it is null; null when r == 0
  void* y;             // (m, n), dtype, out
  int64_t m, r;
  float scaling;
  DType dtype;       // of x, bias, u, y
  DType lora_dtype;  // of lora_a, lora_b
  int32_t threads;
  const float* addend = nullptr;  // (m, n) or null: added before the one rounding
  const float* gain = nullptr;    // (n), or null for 1: of each column of y, not of the bias nor the addend
  const float* sums = nullptr;    // (m, groups) of a weight with offsets: nf4_linear provides them to its kernels
};
Status nf4_linear(const Nf4LinearArgs& args, Isa isa);

// dx = dy·W + v·lora_a,  v = scaling · dy·lora_b
struct Nf4LinearGradInputArgs {
  const void* dy;  // (m, n), dtype
  Nf4Weight weight;
  const void* lora_a;  // (r, k), lora_dtype; null when r == 0
  const void* lora_b;  // (n, r), lora_dtype; null when r == 0
  void* v;             // (m, r), dtype, out; null when r == 0
  void* dx;            // (m, k), dtype, out
  int64_t m, r;
  float scaling;
  DType dtype;       // of dy, v, dx
  DType lora_dtype;  // of lora_a, lora_b
  int32_t threads;
  const float* addend = nullptr;  // (m, k) or null: added before the one rounding
  void* per_group = nullptr;      // (m, groups), dtype: for dy·offsets; nf4_linear_grad_input provides the room
};
Status nf4_linear_grad_input(const Nf4LinearGradInputArgs& args, Isa isa);

}  // namespace fastlora
