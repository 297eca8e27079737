// What the kernels for many adapters share: a table and a routing as the loops want them.
//
// The low-rank term has two sides. Side A lies along in_features, side B along out_features, a slice at its
// columns; forward shrinks by A and expands by B, backward the other way round, and the gradients of both pools
// are the same outer product.
#pragma once

#include "fastlora/segmented_lora.h"
#include "numeric.h"

namespace fastlora::cpu {

// One pool of every slice beside the wide operand that it meets: x and A, dy (or y) and B.
struct Side {
  const void* pool[kMaxSlices];  // (rows, cols)
  int64_t cols[kMaxSlices];
  int64_t column[kMaxSlices];  // of the wide operand, where the slice begins
  int64_t ld;                  // columns of the wide operand
  bool disjoint;               // slices have columns of their own
};

struct Segment {
  int64_t slot, begin, count;  // positions [begin, begin + count) of order
};

struct SegmentedJob {
  AdapterTable table;
  Routing routing;
  DType dtype;  // of everything but the pools
  int32_t threads;
  int64_t k, n, routed, segments;
  int64_t narrow_ld;              // the sum of the widths
  int64_t narrow_at[kMaxSlices];  // a slice's first column of u and v
  Side a, b;

  Segment segment(int64_t i) const {
    const int32_t* at = routing.segments + 2 * i;
    return {at[0], at[1], at[3] - at[1]};
  }
  int64_t first(int64_t slice, int64_t slot) const { return table.entries[2 * (slice * table.capacity + slot)]; }
  int64_t rank(int64_t slice, int64_t slot) const {
    return table.entries[2 * (slice * table.capacity + slot) + 1];
  }
  float scaling(int64_t slice, int64_t slot) const { return table.scaling[slice * table.capacity + slot]; }
  int64_t row(int64_t position) const { return routing.order[position]; }
};

// kBadArgument where a table, a routing or the sizes could lead a kernel astray; else the job of a call.
Status make_segmented_job(const AdapterTable& table, const Routing& routing, int64_t m, int64_t k, int64_t n,
                          DType dtype, int32_t threads, SegmentedJob* job);

// u (m, sum of widths) = wide·poolᵀ by segments, times the scaling if `scaled`; zeros elsewhere.
struct ShrinkArgs {
  const SegmentedJob& job;
  const Side& side;
  const void* wide;  // (m, side.ld), dtype
  void* narrow;      // (m, narrow_ld), dtype, in the order of the routing
  bool scaled;
  int64_t many;  // segments of so many rows and more are the blocked GEMM's
};

// out += narrow·pool by segments, times the scaling if `scaled`.
struct ExpandArgs {
  const SegmentedJob& job;
  const Side& side;
  const void* narrow;
  int64_t row_begin, row_end;  // of the batch: only these, and `out` and `addend` begin with the first
  void* out;                   // (rows, side.ld), dtype, or null
  float* addend;               // else (rows, side.ld) in float32: rows that have an adapter are written
  bool scaled;
  int64_t many;  // segments of so many rows and more are the blocked products'
};

// out[j] like pool j: rows of a slot are Σ narrowᵀ·wide over its rows, times the scaling if `scaled`.
struct OuterArgs {
  const SegmentedJob& job;
  const Side& side;
  const void* narrow;
  const void* wide;
  void* const* out;
  bool scaled;
  int64_t many;
};

Status segmented_shrink_scalar(const ShrinkArgs& args);
Status segmented_expand_scalar(const ExpandArgs& args);
Status segmented_outer_scalar(const OuterArgs& args);
Status segmented_shrink_avx2(const ShrinkArgs& args);
Status segmented_expand_avx2(const ExpandArgs& args);
Status segmented_outer_avx2(const OuterArgs& args);
Status segmented_shrink_avx512(const ShrinkArgs& args);
Status segmented_expand_avx512(const ExpandArgs& args);
Status segmented_outer_avx512(const OuterArgs& args);

Status segmented_shrink_gemm_avx2(const ShrinkArgs& args);
Status segmented_shrink_gemm_avx512(const ShrinkArgs& args);
Status segmented_shrink_gemm_avx512_bf16(const ShrinkArgs& args);  // bfloat16 x only
Status segmented_shrink_gemm_amx(const ShrinkArgs& args);          // bfloat16 x only
Status segmented_shrink_gemm_amx_emulated(const ShrinkArgs& args);

// All of the batch, bfloat16 x only.
Status segmented_expand_many_amx(const ExpandArgs& args);
Status segmented_expand_many_amx_emulated(const ExpandArgs& args);
Status segmented_outer_many_amx(const OuterArgs& args);
Status segmented_outer_many_amx_emulated(const OuterArgs& args);

// The fused layer, u (v) given.
Status nf4_multi_lora_linear_avx2(const Nf4MultiLoraLinearArgs& args, const SegmentedJob& job);
Status nf4_multi_lora_linear_avx512(const Nf4MultiLoraLinearArgs& args, const SegmentedJob& job);
Status nf4_multi_lora_linear_avx512_bf16(const Nf4MultiLoraLinearArgs& args, const SegmentedJob& job);
Status nf4_multi_lora_linear_amx(const Nf4MultiLoraLinearArgs& args, const SegmentedJob& job);
Status nf4_multi_lora_linear_amx_emulated(const Nf4MultiLoraLinearArgs& args, const SegmentedJob& job);
Status nf4_multi_lora_grad_input_avx2(const Nf4MultiLoraGradInputArgs& args, const SegmentedJob& job);
Status nf4_multi_lora_grad_input_avx512(const Nf4MultiLoraGradInputArgs& args, const SegmentedJob& job);
Status nf4_multi_lora_grad_input_avx512_bf16(const Nf4MultiLoraGradInputArgs& args, const SegmentedJob& job);
Status nf4_multi_lora_grad_input_amx(const Nf4MultiLoraGradInputArgs& args, const SegmentedJob& job);
Status nf4_multi_lora_grad_input_amx_emulated(const Nf4MultiLoraGradInputArgs& args, const SegmentedJob& job);

}  // namespace fastlora::cpu
