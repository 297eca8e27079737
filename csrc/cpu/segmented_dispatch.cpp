// The ops of many adapters: what they check, and which kernels they take.
#include <cstring>

#include "fastlora/cpu.h"
#include "fastlora/nf4_linear.h"
#include "group_offsets.h"
#include "kernels.h"
#include "parallel.h"
#include "segmented_job.h"

namespace fastlora {
namespace {

using namespace cpu;

struct Level {
  Status (*shrink)(const ShrinkArgs&);
  Status (*expand)(const ExpandArgs&);
  Status (*outer)(const OuterArgs&);
  // The blocked GEMM, for every dtype but bfloat16 and for that; null: there is none.
  Status (*shrink_many)(const ShrinkArgs&);
  Status (*shrink_many_bf16)(const ShrinkArgs&);
  Status (*expand_many_bf16)(const ExpandArgs&);
  Status (*outer_many_bf16)(const OuterArgs&);
  Status (*linear)(const Nf4MultiLoraLinearArgs&, const SegmentedJob&);
  Status (*linear_bf16)(const Nf4MultiLoraLinearArgs&, const SegmentedJob&);
  Status (*grad_input)(const Nf4MultiLoraGradInputArgs&, const SegmentedJob&);
  Status (*grad_input_bf16)(const Nf4MultiLoraGradInputArgs&, const SegmentedJob&);
};

constexpr Level kLevels[kIsaCount] = {
    {segmented_shrink_scalar, segmented_expand_scalar, segmented_outer_scalar, nullptr, nullptr, nullptr, nullptr,
     nullptr, nullptr, nullptr, nullptr},
#ifdef FASTLORA_X86
    {segmented_shrink_avx2, segmented_expand_avx2, segmented_outer_avx2, segmented_shrink_gemm_avx2,
     segmented_shrink_gemm_avx2, nullptr, nullptr, nf4_multi_lora_linear_avx2, nf4_multi_lora_linear_avx2,
     nf4_multi_lora_grad_input_avx2, nf4_multi_lora_grad_input_avx2},
    {segmented_shrink_avx512, segmented_expand_avx512, segmented_outer_avx512, segmented_shrink_gemm_avx512,
     segmented_shrink_gemm_avx512, nullptr, nullptr, nf4_multi_lora_linear_avx512, nf4_multi_lora_linear_avx512,
     nf4_multi_lora_grad_input_avx512, nf4_multi_lora_grad_input_avx512},
    {segmented_shrink_avx512, segmented_expand_avx512, segmented_outer_avx512, segmented_shrink_gemm_avx512,
     segmented_shrink_gemm_avx512_bf16, nullptr, nullptr, nf4_multi_lora_linear_avx512,
     nf4_multi_lora_linear_avx512_bf16, nf4_multi_lora_grad_input_avx512, nf4_multi_lora_grad_input_avx512_bf16},
    {segmented_shrink_avx512, segmented_expand_avx512, segmented_outer_avx512, segmented_shrink_gemm_avx512,
     segmented_shrink_gemm_amx, segmented_expand_many_amx, segmented_outer_many_amx, nf4_multi_lora_linear_avx512,
     nf4_multi_lora_linear_amx, nf4_multi_lora_grad_input_avx512, nf4_multi_lora_grad_input_amx},
    {segmented_shrink_avx512, segmented_expand_avx512, segmented_outer_avx512, segmented_shrink_gemm_avx512,
     segmented_shrink_gemm_amx_emulated, segmented_expand_many_amx_emulated, segmented_outer_many_amx_emulated,
     nf4_multi_lora_linear_avx512, nf4_multi_lora_linear_amx_emulated, nf4_multi_lora_grad_input_avx512,
     nf4_multi_lora_grad_input_amx_emulated},
#endif
};

constexpr int64_t kManyRows = 16;  // of a segment: blocked products

const Level* level_of(Isa isa) {
  const int32_t index = static_cast<int32_t>(isa);
  return index >= 0 && index < kIsaCount && isa_available(isa) ? &kLevels[index] : nullptr;
}

bool valid_weight(const Nf4Weight& w) {
  const int64_t b = w.blocksize;
  return w.n >= 0 && w.k >= 0 && b >= kMinBlocksize && b <= kMaxBlocksize && (b & (b - 1)) == 0 &&
         valid_offsets(w);
}

void zero(void* data, int64_t count, DType dtype) {
  if (count > 0) std::memset(data, 0, static_cast<size_t>(count * dtype_bytes(dtype)));
}

// u (or v).
Status shrink(const Level& level, const SegmentedJob& job, bool forward, const void* wide, void* narrow,
              bool one_route) {
  zero(narrow, job.routing.m * job.narrow_ld, job.dtype);
  const auto gemm = job.dtype == DType::kBFloat16 ? level.shrink_many_bf16 : level.shrink_many;
  const ShrinkArgs args{.job = job,
                        .side = forward ? job.a : job.b,
                        .wide = wide,
                        .narrow = narrow,
                        .scaled = !forward,
                        .many = gemm == nullptr || one_route ? INT64_MAX : kManyRows};
  const Status status = level.shrink(args);
  return status != Status::kOk || gemm == nullptr || one_route ? status : gemm(args);
}

// Rows [begin, end) of the term it gives: `out` += it, or `addend` = it.
Status expand(const Level& level, const SegmentedJob& job, bool forward, const void* narrow, int64_t begin,
              int64_t end, void* out, float* addend) {
  const auto many = job.dtype == DType::kBFloat16 && out != nullptr ? level.expand_many_bf16 : nullptr;
  const ExpandArgs args{.job = job,
                        .side = forward ? job.b : job.a,
                        .narrow = narrow,
                        .row_begin = begin,
                        .row_end = end,
                        .out = out,
                        .addend = addend,
                        .scaled = forward,
                        .many = many == nullptr ? INT64_MAX : kManyRows};
  const Status status = level.expand(args);
  return status != Status::kOk || many == nullptr ? status : many(args);
}

// The gradient of one side's pools.
Status outer(const Level& level, const SegmentedJob& job, const Side& side, const void* narrow, const void* wide,
             void* const* out, bool scaled) {
  const auto many = job.dtype == DType::kBFloat16 ? level.outer_many_bf16 : nullptr;
  const OuterArgs args{.job = job,
                       .side = side,
                       .narrow = narrow,
                       .wide = wide,
                       .out = out,
                       .scaled = scaled,
                       .many = many == nullptr ? INT64_MAX : kManyRows};
  const Status status = level.outer(args);
  return status != Status::kOk || many == nullptr ? status : many(args);
}

// Calls layer(first row, rows, addend) with the low-rank term of as many rows at a time as kAddendFloats hold.
template <class Layer>
Status by_addend(const Level& level, const SegmentedJob& job, bool forward, const void* narrow, Layer&& layer) {
  constexpr int64_t kAddendFloats = 1 << 20;
  const int64_t m = job.routing.m, columns = max64(1, forward ? job.n : job.k);
  const int64_t most = min64(m, max64(16, kAddendFloats / columns));
  auto* addend = static_cast<float*>(thread_scratch_beside(static_cast<size_t>(most * columns + 1) * 4));
  if (addend == nullptr) return Status::kOutOfMemory;
  for (int64_t i = 0; i < m; i += most) {
    const int64_t rows = min64(most, m - i);
    zero(addend, rows * columns, DType::kFloat32);
    Status status = expand(level, job, forward, narrow, i, i + rows, nullptr, addend);
    if (status == Status::kOk) status = layer(i, rows, addend);
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

// A thread is worth waking for about 10 us of work: so many multiply-adds, a row of an adapter counting as two
// more rows of the batch for its way from memory.
int32_t useful_threads(const SegmentedJob& job, double base) {
  constexpr double kWorkPerThread = 1 << 18;
  double work = base;
  for (int64_t s = 0; s < job.segments; ++s) {
    const Segment segment = job.segment(s);
    for (int64_t j = 0; j < job.table.slices; ++j) {
      work += static_cast<double>((segment.count + 2) * job.rank(j, segment.slot)) *
              static_cast<double>(job.k + job.b.cols[j]);
    }
  }
  const double most = work / kWorkPerThread + 1.0;
  return most < static_cast<double>(job.threads) ? static_cast<int32_t>(most) : job.threads;
}

Status segmented(const SegmentedLoraArgs& a, bool forward) {
  const Level* level = level_of(a.isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  SegmentedJob job;
  Status status = make_segmented_job(a.table, a.routing, a.m, a.k, a.n, a.dtype, a.threads, &job);
  if (status != Status::kOk) return status;
  job.threads = useful_threads(job, 0.0);
  status = shrink(*level, job, forward, a.x, a.u, false);
  return status != Status::kOk ? status : expand(*level, job, forward, a.u, 0, a.m, a.y, nullptr);
}

// Zeros in the rows of slice j's gradients that no routed slot has.
Status zero_gaps(const SegmentedJob& job, int64_t j, void* da, void* db) {
  const AdapterSlice& slice = job.table.slice[j];
  auto* routed = static_cast<uint8_t*>(thread_scratch(static_cast<size_t>(slice.rows + 1)));
  if (routed == nullptr) return Status::kOutOfMemory;
  std::memset(routed, 0, static_cast<size_t>(slice.rows));
  for (int64_t s = 0; s < job.segments; ++s) {
    const int64_t slot = job.segment(s).slot;
    const int64_t rank = job.rank(j, slot);
    if (rank > 0) std::memset(routed + job.first(j, slot), 1, static_cast<size_t>(rank));
  }
  for (int64_t row = 0; row < slice.rows; ++row) {
    if (routed[row] != 0) continue;
    zero(element_ptr(da, row * job.k, job.table.dtype), job.k, job.table.dtype);
    zero(element_ptr(db, row * slice.n, job.table.dtype), slice.n, job.table.dtype);
  }
  return Status::kOk;
}

}  // namespace

Status segmented_lora(const SegmentedLoraArgs& args) { return segmented(args, true); }
Status segmented_lora_grad_input(const SegmentedLoraArgs& args) { return segmented(args, false); }

Status segmented_lora_grad_pools(const SegmentedLoraGradPoolsArgs& a) {
  const Level* level = level_of(a.isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  SegmentedJob job;
  Status status = make_segmented_job(a.table, a.routing, a.m, a.k, a.n, a.dtype, a.threads, &job);
  if (status != Status::kOk) return status;
  job.threads = useful_threads(job, 0.0);
  for (int64_t j = 0; j < a.table.slices; ++j) {
    status = zero_gaps(job, j, a.da[j], a.db[j]);
    if (status != Status::kOk) return status;
  }
  status = outer(*level, job, job.a, a.v, a.x, a.da, false);
  if (status != Status::kOk) return status;
  return outer(*level, job, job.b, a.u, a.dy, a.db, true);
}

Status nf4_multi_lora_linear(const Nf4MultiLoraLinearArgs& a) {
  const Level* level = level_of(a.isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  if (!valid_weight(a.weight)) return Status::kBadArgument;
  const Nf4Weight& w = a.weight;
  SegmentedJob job;
  Status status = make_segmented_job(a.table, a.routing, a.m, w.k, w.n, a.dtype, a.threads, &job);
  if (status != Status::kOk || a.m == 0) return status;
  job.threads = useful_threads(job, static_cast<double>(a.m) * static_cast<double>(w.n * w.k));
  status = shrink(*level, job, true, a.x, a.u, a.batch_invariant);
  if (status != Status::kOk || w.n == 0) return status;
  const auto gemm = a.dtype == DType::kBFloat16 ? level->linear_bf16 : level->linear;
  if (gemm != nullptr && (a.batch_invariant || !takes_decode(a.isa, a.dtype, a.m, w)))
    return with_sums(a, a.isa, [&](const Nf4MultiLoraLinearArgs& call) { return gemm(call, job); });
  return by_addend(*level, job, true, a.u, [&](int64_t first, int64_t rows, const float* addend) {
    return nf4_linear({.x = element_ptr(a.x, first * w.k, a.dtype),
                       .weight = w,
                       .bias = a.bias,
                       .lora_a = nullptr,
                       .lora_b = nullptr,
                       .u = nullptr,
                       .y = element_ptr(a.y, first * w.n, a.dtype),
                       .m = rows,
                       .r = 0,
                       .scaling = 0.0f,
                       .dtype = a.dtype,
                       .lora_dtype = a.dtype,
                       .threads = a.threads,
                       .addend = addend},
                      a.isa);
  });
}

Status nf4_multi_lora_grad_input(const Nf4MultiLoraGradInputArgs& a) {
  const Level* level = level_of(a.isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  if (!valid_weight(a.weight)) return Status::kBadArgument;
  const Nf4Weight& w = a.weight;
  SegmentedJob job;
  Status status = make_segmented_job(a.table, a.routing, a.m, w.k, w.n, a.dtype, a.threads, &job);
  if (status != Status::kOk || a.m == 0) return status;
  job.threads = useful_threads(job, static_cast<double>(a.m) * static_cast<double>(w.n * w.k));
  status = shrink(*level, job, false, a.dy, a.v, a.batch_invariant);
  if (status != Status::kOk || w.k == 0) return status;
  const auto gemm = a.dtype == DType::kBFloat16 ? level->grad_input_bf16 : level->grad_input;
  if (gemm != nullptr)
    return with_per_group(a, [&](const Nf4MultiLoraGradInputArgs& call) { return gemm(call, job); });
  return by_addend(*level, job, false, a.v, [&](int64_t first, int64_t rows, const float* addend) {
    return nf4_linear_grad_input({.dy = element_ptr(a.dy, first * w.n, a.dtype),
                                  .weight = w,
                                  .lora_a = nullptr,
                                  .lora_b = nullptr,
                                  .v = nullptr,
                                  .dx = element_ptr(a.dx, first * w.k, a.dtype),
                                  .m = rows,
                                  .r = 0,
                                  .scaling = 0.0f,
                                  .dtype = a.dtype,
                                  .lora_dtype = a.dtype,
                                  .threads = a.threads,
                                  .addend = addend},
                                 a.isa);
  });
}

}  // namespace fastlora
