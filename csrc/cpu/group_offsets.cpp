// The offsets of a weight in plain C++: what the entry points do around their kernels, and the scalar sums.
#include "group_offsets.h"

#include "kernels.h"
#include "numeric.h"
#include "parallel.h"

namespace fastlora::cpu {

Status group_sums_scalar(const GroupSumsArgs& args) {
  parallel_ranges(
      args.m * args.groups, args.threads,
      [](void* context, int64_t begin, int64_t end) {
        const GroupSumsArgs& a = *static_cast<const GroupSumsArgs*>(context);
        const int64_t group = a.k / a.groups;
        for (int64_t at = begin; at < end; ++at) {
          float sum = 0.0f;
          for (int64_t j = 0; j < group; ++j) sum += load_as_float(a.x, at * group + j, a.dtype);
          a.sums[at] = sum;
        }
      },
      const_cast<GroupSumsArgs*>(&args));
  return Status::kOk;
}

void add_offsets(const Nf4DequantizeArgs& args) {
  parallel_ranges(
      args.weight.n * args.weight.groups, args.threads,
      [](void* context, int64_t begin, int64_t end) {
        const Nf4DequantizeArgs& a = *static_cast<const Nf4DequantizeArgs*>(context);
        const int64_t group = a.weight.k / a.weight.groups;
        for (int64_t at = begin; at < end; ++at) {
          float* values = static_cast<float*>(a.out) + at * group;
          for (int64_t j = 0; j < group; ++j) values[j] += a.weight.offsets[at];
        }
      },
      const_cast<Nf4DequantizeArgs*>(&args));
}

bool valid_offsets(const Nf4Weight& w) {
  if (w.groups == 0) return w.offsets == nullptr;
  return w.groups > 0 && w.k % w.groups == 0 && (w.offsets != nullptr || w.n == 0);
}

}  // namespace fastlora::cpu
