// The ops of many adapters on the blocked GEMM: the fused layer in both directions, and the first product of
// segments with many rows.
#pragma once

#include "gemm_backward.h"
#include "gemm_forward.h"
#include "gemm_offsets.h"
#include "segmented_beside.h"

namespace fastlora::cpu {
namespace {

// Rows of one segment in, consecutive rows of u out.
struct GatheredRows {
  struct State {};
  static constexpr bool kAdds = false;
  OrderedRows from = {};
  NaturalRows to = {};
};

template <class L, class V>
Status gemm_multi_linear(const Nf4MultiLoraLinearArgs& a, const SegmentedJob& job) {
  AdaptersForward<L, V> beside;
  beside.job = &job;
  beside.side = &job.b;
  beside.narrow = a.u;
  beside.scaled = true;
  beside.one_route = a.batch_invariant;
  beside.from = beside.to = {job.routing.order};
  Forward<L, Nf4Weight, AdaptersForward<L, V>> base{.x = a.x,
                                                    .m = a.m,
                                                    .k = a.weight.k,
                                                    .n = a.weight.n,
                                                    .dtype = a.dtype,
                                                    .source = a.weight,
                                                    .u = nullptr,
                                                    .ext = {},
                                                    .bias = a.bias,
                                                    .out = a.y,
                                                    .beside = beside,
                                                    .sums = a.sums,
                                                    .offsets = offsets_of(a.weight)};
  return base.run(job.threads);
}

template <class L, class V>
Status gemm_multi_grad_input(const Nf4MultiLoraGradInputArgs& a, const SegmentedJob& job) {
  if (const Status status = offset_product<L>(a.dy, a.m, a.weight, a.dtype, a.per_group, job.threads);
      status != Status::kOk)
    return status;
  AdaptersBackward<L, V> beside;
  beside.job = &job;
  beside.side = &job.a;
  beside.narrow = a.v;
  beside.one_route = a.batch_invariant;
  beside.from = beside.to = {job.routing.order};
  Backward<L, Nf4Weight, AdaptersBackward<L, V>> base{.dy = a.dy,
                                                      .m = a.m,
                                                      .n = a.weight.n,
                                                      .k = a.weight.k,
                                                      .dtype = a.dtype,
                                                      .source = a.weight,
                                                      .v = nullptr,
                                                      .ext = {},
                                                      .out = a.dx,
                                                      .beside = beside,
                                                      .per_group = a.per_group,
                                                      .groups = a.weight.groups};
  return base.run(job.threads);
}

// u of the segments of at least args.many rows.
template <class L>
struct ShrinkMany {
  const ShrinkArgs& a;
  Status status = Status::kOk;

  // Of a unit: many share the packing of the adapter, but there should be some units for every thread.
  int64_t unit_rows() const {
    return max64(32, min64(128, round_up(a.job.routed / (4 * max64(1, a.job.threads)), 32)));
  }

  template <class Body>
  void each_unit(Body&& body) const {
    const int64_t most = unit_rows();
    for (int64_t s = 0; s < a.job.segments; ++s) {
      const Segment segment = a.job.segment(s);
      if (segment.count < a.many) continue;
      for (int64_t j = 0; j < a.job.table.slices; ++j) {
        if (a.job.rank(j, segment.slot) == 0) continue;
        for (int64_t i = 0; i < segment.count; i += most) {
          if (!body(segment, j, segment.begin + i, min64(most, segment.count - i))) return;
        }
      }
    }
  }
  int64_t cost_of(const Segment& segment, int64_t j, int64_t rows) const {
    return (rows + a.job.rank(j, segment.slot)) * (1 + a.side.cols[j] / 256);
  }

  void range(int64_t begin, int64_t end) {
    Share share{begin, end};
    each_unit([&](const Segment& segment, int64_t j, int64_t position, int64_t rows) {
      if (share.take(cost_of(segment, j, rows))) unit(segment, j, position, rows);
      return !share.over();
    });
  }

  void unit(const Segment& segment, int64_t j, int64_t position, int64_t rows) {
    const SegmentedJob& job = a.job;
    const int64_t cols = a.side.cols[j], rank = job.rank(j, segment.slot);
    const DenseRows pool{static_cast<const char*>(a.side.pool[j]) +
                             job.first(j, segment.slot) * cols * dtype_bytes(job.table.dtype),
                         job.table.dtype, rank, cols, a.scaled ? job.scaling(j, segment.slot) : 1.0f};
    Forward<L, DenseRows, GatheredRows> product{
        .x = element_ptr(a.wide, a.side.column[j], job.dtype),
        .m = rows,
        .k = cols,
        .n = rank,
        .dtype = job.dtype,
        .source = pool,
        .u = nullptr,
        .ext = {},
        .bias = nullptr,
        .out = element_ptr(a.narrow, position * job.narrow_ld + job.narrow_at[j], job.dtype),
        .beside = {.from = {job.routing.order + position}},
        .x_ld = a.side.ld,
        .out_ld = job.narrow_ld};
    const Status found = product.run(1);
    if (found != Status::kOk) __atomic_store_n(&status, found, __ATOMIC_RELAXED);
  }
};

template <class L>
Status gemm_shrink(const ShrinkArgs& args) {
  ShrinkMany<L> self{args};
  int64_t total = 0;
  self.each_unit([&](const Segment& segment, int64_t j, int64_t, int64_t rows) {
    total += self.cost_of(segment, j, rows);
    return true;
  });
  parallel_ranges(
      total, args.job.threads,
      [](void* context, int64_t begin, int64_t end) { static_cast<ShrinkMany<L>*>(context)->range(begin, end); },
      &self);
  return self.status;
}

}  // namespace
}  // namespace fastlora::cpu
