// Sums of the columns of x over groups, less a level's vectors: V is one of lanes_*.h. Private to each file that
// includes it.
#pragma once

#include "kernels.h"
#include "numeric.h"
#include "parallel.h"

namespace fastlora::cpu {
namespace {

template <class V>
float group_sum(const void* from, DType dtype, int64_t count) {
  typename V::Vec sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};  // short chains
  int64_t i = 0;
  for (int64_t turn = 0; i < count; i += V::kLanes, turn = (turn + 1) % 4) {
    const int64_t here = min64(V::kLanes, count - i);
    sums[turn] = V::add(sums[turn], V::load(element_ptr(from, i, dtype), dtype, here));
  }
  return V::sum(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
}

template <class V>
Status group_sums_with(const GroupSumsArgs& args) {
  parallel_ranges(
      args.m * args.groups, args.threads,
      [](void* context, int64_t begin, int64_t end) {
        const GroupSumsArgs& a = *static_cast<const GroupSumsArgs*>(context);
        const int64_t group = a.k / a.groups;
        for (int64_t at = begin; at < end; ++at) {  // rows and groups of x follow each other without gaps
          a.sums[at] = group_sum<V>(element_ptr(a.x, at * group, a.dtype), a.dtype, group);
        }
      },
      const_cast<GroupSumsArgs*>(&args));
  return Status::kOk;
}

}  // namespace
}  // namespace fastlora::cpu
