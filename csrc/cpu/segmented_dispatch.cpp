// The ops of many adapters: what they check, and which kernels they take.
#include <cstring>

#include "fastlora/cpu.h"
#include "fastlora/nf4_linear.h"
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
  Status (*linear)(const Nf4MultiLoraLinearArgs&, const SegmentedJob&);
  Status (*linear_bf16)(const Nf4MultiLoraLinearArgs&, const SegmentedJob&);
  Status (*grad_input)(const Nf4MultiLoraGradInputArgs&, const SegmentedJob&);
  Status (*grad_input_bf16)(const Nf4MultiLoraGradInputArgs&, const SegmentedJob&);
};

constexpr Level kLevels[kIsaCount] = {
    {segmented_shrink_scalar, segmented_expand_scalar, segmented_outer_scalar, nullptr, nullptr, nullptr, nullptr,
     nullptr, nullptr},
#ifdef FASTLORA_X86
    {segmented_shrink_avx2, segmented_expand_avx2, segmented_outer_avx2, segmented_shrink_gemm_avx2,
     segmented_shrink_gemm_avx2, nf4_multi_lora_linear_avx2, nf4_multi_lora_linear_avx2,
     nf4_multi_lora_grad_input_avx2, nf4_multi_lora_grad_input_avx2},
    {segmented_shrink_avx512, segmented_expand_avx512, segmented_outer_avx512, segmented_shrink_gemm_avx512,
     segmented_shrink_gemm_avx512, nf4_multi_lora_linear_avx512, nf4_multi_lora_linear_avx512,
     nf4_multi_lora_grad_input_avx512, nf4_multi_lora_grad_input_avx512},
    {segmented_shrink_avx512, segmented_expand_avx512, segmented_outer_avx512, segmented_shrink_gemm_avx512,
     segmented_shrink_gemm_avx512_bf16, nf4_multi_lora_linear_avx512, nf4_multi_lora_linear_avx512_bf16,
     nf4_multi_lora_grad_input_avx512, nf4_multi_lora_grad_input_avx512_bf16},
    {segmented_shrink_avx512, segmented_expand_avx512, segmented_outer_avx512, segmented_shrink_gemm_avx512,
     segmented_shrink_gemm_amx, nf4_multi_lora_linear_avx512, nf4_multi_lora_linear_amx,
     nf4_multi_lora_grad_input_avx512, nf4_multi_lora_grad_input_amx},
    {segmented_shrink_avx512, segmented_expand_avx512, segmented_outer_avx512, segmented_shrink_gemm_avx512,
     segmented_shrink_gemm_amx_emulated, nf4_multi_lora_linear_avx512, nf4_multi_lora_linear_amx_emulated,
     nf4_multi_lora_grad_input_avx512, nf4_multi_lora_grad_input_amx_emulated},
#endif
};

constexpr int64_t kManyRows = 16;  // of a segment: its first product is the blocked GEMM's

const Level* level_of(Isa isa) {
  const int32_t index = static_cast<int32_t>(isa);
  return index >= 0 && index < kIsaCount && isa_available(isa) ? &kLevels[index] : nullptr;
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

// And the term it gives: `out` += it, or `addend` = it.
Status low_rank(const Level& level, const SegmentedJob& job, bool forward, const void* wide, void* narrow,
                void* out, float* addend) {
  const Status status = shrink(level, job, forward, wide, narrow, false);
  if (status != Status::kOk) return status;
  return level.expand({.job = job,
                       .side = forward ? job.b : job.a,
                       .narrow = narrow,
                       .out = out,
                       .addend = addend,
                       .scaled = forward});
}

Status segmented(const SegmentedLoraArgs& a, bool forward) {
  const Level* level = level_of(a.isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  SegmentedJob job;
  const Status status = make_segmented_job(a.table, a.routing, a.m, a.k, a.n, a.dtype, a.threads, &job);
  if (status != Status::kOk) return status;
  return low_rank(*level, job, forward, a.x, a.u, a.y, nullptr);
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
  for (int64_t j = 0; j < a.table.slices; ++j) {
    zero(a.da[j], a.table.slice[j].rows * a.k, a.table.dtype);
    zero(a.db[j], a.table.slice[j].rows * a.table.slice[j].n, a.table.dtype);
  }
  status = level->outer({.job = job, .side = job.a, .narrow = a.v, .wide = a.x, .out = a.da, .scaled = false});
  if (status != Status::kOk) return status;
  return level->outer({.job = job, .side = job.b, .narrow = a.u, .wide = a.dy, .out = a.db, .scaled = true});
}

Status nf4_multi_lora_linear(const Nf4MultiLoraLinearArgs& a) {
  const Level* level = level_of(a.isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  SegmentedJob job;
  Status status = make_segmented_job(a.table, a.routing, a.m, a.weight.k, a.weight.n, a.dtype, a.threads, &job);
  if (status != Status::kOk) return status;
  const auto gemm = a.dtype == DType::kBFloat16 ? level->linear_bf16 : level->linear;
  if (gemm != nullptr && (a.batch_invariant || !takes_decode(a.isa, a.dtype, a.m, a.weight))) {
    status = shrink(*level, job, true, a.x, a.u, a.batch_invariant);
    return status != Status::kOk || a.m == 0 || a.weight.n == 0 ? status : gemm(a, job);
  }
  const int64_t count = a.m * a.weight.n;
  auto* addend = static_cast<float*>(thread_scratch_beside(static_cast<size_t>(count + 16) * sizeof(float)));
  if (addend == nullptr) return Status::kOutOfMemory;
  zero(addend, count, DType::kFloat32);
  status = low_rank(*level, job, true, a.x, a.u, nullptr, addend);
  if (status != Status::kOk) return status;
  return nf4_linear({.x = a.x,
                     .weight = a.weight,
                     .bias = a.bias,
                     .lora_a = nullptr,
                     .lora_b = nullptr,
                     .u = nullptr,
                     .y = a.y,
                     .m = a.m,
                     .r = 0,
                     .scaling = 0.0f,
                     .dtype = a.dtype,
                     .lora_dtype = a.dtype,
                     .threads = a.threads,
                     .addend = addend},
                    a.isa);
}

Status nf4_multi_lora_grad_input(const Nf4MultiLoraGradInputArgs& a) {
  const Level* level = level_of(a.isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  SegmentedJob job;
  Status status = make_segmented_job(a.table, a.routing, a.m, a.weight.k, a.weight.n, a.dtype, a.threads, &job);
  if (status != Status::kOk) return status;
  const auto gemm = a.dtype == DType::kBFloat16 ? level->grad_input_bf16 : level->grad_input;
  if (gemm != nullptr) {
    status = shrink(*level, job, false, a.dy, a.v, a.batch_invariant);
    return status != Status::kOk || a.m == 0 || a.weight.k == 0 ? status : gemm(a, job);
  }
  const int64_t count = a.m * a.weight.k;
  auto* addend = static_cast<float*>(thread_scratch_beside(static_cast<size_t>(count + 16) * sizeof(float)));
  if (addend == nullptr) return Status::kOutOfMemory;
  zero(addend, count, DType::kFloat32);
  status = low_rank(*level, job, false, a.dy, a.v, nullptr, addend);
  if (status != Status::kOk) return status;
  return nf4_linear_grad_input({.dy = a.dy,
                                .weight = a.weight,
                                .lora_a = nullptr,
                                .lora_b = nullptr,
                                .v = nullptr,
                                .dx = a.dx,
                                .m = a.m,
                                .r = 0,
                                .scaling = 0.0f,
                                .dtype = a.dtype,
                                .lora_dtype = a.dtype,
                                .threads = a.threads,
                                .addend = addend},
                               a.isa);
}

}  // namespace fastlora
