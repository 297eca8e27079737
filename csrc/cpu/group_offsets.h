// What the entry points do for a weight with offsets, before and after their kernels.
#pragma once

#include <memory>
#include <new>

#include "kernels.h"
#include "numeric.h"

namespace fastlora::cpu {

// Whether groups and offsets are both there or neither, and fit the weight.
bool valid_offsets(const Nf4Weight& weight);

// To what nf4_dequantize has written, in float32.
void add_offsets(const Nf4DequantizeArgs& args);

// Room that a call provides to its kernels: `count` elements of `bytes` each; null when memory is out.
inline std::unique_ptr<char[]> room(int64_t count, int64_t bytes) {
  return std::unique_ptr<char[]>(new (std::nothrow) char[static_cast<size_t>(max64(1, count * bytes))]);
}

// Calls body(args) where args.sums are there, if the weight has offsets.
template <class Args, class Body>
Status with_sums(Args args, Isa isa, Body&& body) {
  const Nf4Weight& w = args.weight;
  if (w.groups == 0) return body(args);
  const auto sums = room(args.m * w.groups, sizeof(float));
  if (sums == nullptr) return Status::kOutOfMemory;
  auto* floats = reinterpret_cast<float*>(sums.get());
  const Status status = group_sums({.x = args.x,
                                    .dtype = args.dtype,
                                    .m = args.m,
                                    .k = w.k,
                                    .groups = w.groups,
                                    .sums = floats,
                                    .threads = args.threads},
                                   isa);
  if (status != Status::kOk) return status;
  args.sums = floats;
  return body(args);
}

// The same with room for args.per_group.
template <class Args, class Body>
Status with_per_group(Args args, Body&& body) {
  if (args.weight.groups == 0) return body(args);
  const auto values = room(args.m * args.weight.groups, dtype_bytes(args.dtype));
  if (values == nullptr) return Status::kOutOfMemory;
  args.per_group = values.get();
  return body(args);
}

}  // namespace fastlora::cpu
