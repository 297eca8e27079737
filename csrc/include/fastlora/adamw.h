// One step of AdamW (Loshchilov, Hutter, 2019) in one pass over a parameter, its gradient and its moments.
#pragma once

#include <cstdint>

#include "fastlora/status.h"

namespace fastlora {

inline constexpr int64_t kAdamwBlocksize = 256;  // elements that share a scale of 8-bit moments

// What is the same for every element, each rounded once from float64.
struct AdamwStep {
  float decay;           // 1 - lr * weight_decay
  float weight1;         // 1 - beta1
  float beta2, weight2;  // weight2: 1 - beta2
  float correction2;     // sqrt(1 - beta2^t)
  float eps;
  float minus_step;  // -lr / (1 - beta1^t)
};

// In float32, fma(a, b, c) rounded once, everything else one rounding an operation:
//
//   m <- fma(weight1, g - m, m)               from weight1 = 0.5 on: fma(weight1 - 1, g - m, g)
//   v <- fma(weight2 * g, g, v * beta2)
//   p <- p * decay + (minus_step * m) / (sqrt(v) / correction2 + eps)
//
// and p is rounded to its dtype. That is torch.optim.AdamW, fused, where it has FMA.
struct AdamwArgs {
  void* param;        // (count), dtype, in and out
  const void* grad;   // (count), grad_dtype
  float* exp_avg;     // (count): m, in and out
  float* exp_avg_sq;  // (count): v, in and out
  int64_t count;
  DType dtype, grad_dtype;
  AdamwStep step;
  int32_t threads;
};
Status adamw(const AdamwArgs& args, Isa isa);

// The same on moments of 8 bits (Dettmers et al., 8-bit optimizers, 2022): an index into a dynamic map for each
// element, signed for m and unsigned for v, times one scale for each 256. p gets the new moments before they are
// rounded. They are stored by
//
//   scale = max(largest magnitude of the block, 1e-38), or 0 for a block of zeros
//   code  = nearest of moment * (1 / scale), a tie to the lower one; at least 1 for v > 0
//
// for a second moment that became 0 beside a first one that did not would divide that one by eps.
// A gradient that is not finite leaves nothing finite in its block.
struct Adamw8bitArgs {
  void* param;              // (count), dtype, in and out
  const void* grad;         // (count), grad_dtype
  uint8_t* exp_avg;         // (count): codes of m, in and out
  uint8_t* exp_avg_sq;      // (count): codes of v, in and out
  float* exp_avg_scale;     // (ceil(count / 256)), in and out
  float* exp_avg_sq_scale;  // (ceil(count / 256)), in and out
  int64_t count;
  DType dtype, grad_dtype;
  AdamwStep step;
  int32_t threads;
};
Status adamw_8bit(const Adamw8bitArgs& args, Isa isa);

// The 256 values of the unsigned dynamic 8-bit map, ascending; the signed one is nf4_dynamic_map().
const float* unsigned_dynamic_map();

// The maps as tables. The nearest entry is found by a value's leading 16 bits: its sign, exponent and 7 bits of
// mantissa name a cell, and no cell has more than one midpoint. Magnitudes under 2^-23, whose low bits say
// nothing, are in the first cell, those above 1 in the last one; both are one entry throughout.
inline constexpr int32_t kMapFirstCell = (127 - 23) << 7;
inline constexpr int32_t kMapCells = (23 << 7) + 1;

// What a device's kernels look codes up in.
struct AdamwTables {
  float signed_values[256], unsigned_values[256];
  // The largest float32 that does not exceed the midpoint of an entry and the next: what is above it has the next.
  float signed_bounds[256], unsigned_bounds[256];
  // The lower of the entries that a cell's values have. Signed: of positive values, then of negative ones.
  uint8_t signed_cells[2 * kMapCells];
  uint8_t unsigned_cells[kMapCells + 13];  // to a multiple of 16
};
const AdamwTables& adamw_tables();

}  // namespace fastlora
