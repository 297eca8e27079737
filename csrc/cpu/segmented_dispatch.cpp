// The ops of many adapters: what they check, and which kernels they take.
#include <cstring>

#include "fastlora/cpu.h"
#include "fastlora/nf4_linear.h"
#include "parallel.h"
#include "segmented_job.h"

namespace fastlora {
namespace {

using namespace cpu;

struct Level {
  Status (*shrink)(const ShrinkArgs&);
  Status (*expand)(const ExpandArgs&);
  Status (*outer)(const OuterArgs&);
};

constexpr Level kScalarLevel = {segmented_shrink_scalar, segmented_expand_scalar, segmented_outer_scalar};

const Level* level_of(Isa isa) {
  const int32_t index = static_cast<int32_t>(isa);
  return index >= 0 && index < kIsaCount && isa_available(isa) ? &kScalarLevel : nullptr;
}

void zero(void* data, int64_t count, DType dtype) {
  if (count > 0) std::memset(data, 0, static_cast<size_t>(count * dtype_bytes(dtype)));
}

// u (or v) and the term it gives: `out` += it, or `addend` = it.
Status low_rank(const Level& level, const SegmentedJob& job, bool forward, const void* wide, void* narrow,
                void* out, float* addend, bool one_route) {
  zero(narrow, job.routing.m * job.narrow_ld, job.dtype);
  const Side &from = forward ? job.a : job.b, &to = forward ? job.b : job.a;
  const Status status = level.shrink(
      {.job = job, .side = from, .wide = wide, .narrow = narrow, .scaled = !forward, .one_route = one_route});
  if (status != Status::kOk) return status;
  return level.expand({.job = job, .side = to, .narrow = narrow, .out = out, .addend = addend, .scaled = forward});
}

Status segmented(const SegmentedLoraArgs& a, bool forward) {
  const Level* level = level_of(a.isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  SegmentedJob job;
  const Status status = make_segmented_job(a.table, a.routing, a.m, a.k, a.n, a.dtype, a.threads, &job);
  if (status != Status::kOk) return status;
  return low_rank(*level, job, forward, a.x, a.u, a.y, nullptr, false);
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
  const int64_t count = a.m * a.weight.n;
  auto* addend = static_cast<float*>(thread_scratch_beside(static_cast<size_t>(count + 16) * sizeof(float)));
  if (addend == nullptr) return Status::kOutOfMemory;
  zero(addend, count, DType::kFloat32);
  status = low_rank(*level, job, true, a.x, a.u, nullptr, addend, a.batch_invariant);
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
  const int64_t count = a.m * a.weight.k;
  auto* addend = static_cast<float*>(thread_scratch_beside(static_cast<size_t>(count + 16) * sizeof(float)));
  if (addend == nullptr) return Status::kOutOfMemory;
  zero(addend, count, DType::kFloat32);
  status = low_rank(*level, job, false, a.dy, a.v, nullptr, addend, a.batch_invariant);
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
