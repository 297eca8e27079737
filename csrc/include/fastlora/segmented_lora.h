// Many adapters in one batch: row i of x uses the adapter of slot slots[i], or none (-1).
//
//   u[i] = x[i]·A[s]ᵀ                        rounded to x's dtype, from float32 sums
//   y[i] += scaling[s] · u[i]·B[s]ᵀ
//   v[i] = scaling[s] · dy[i]·B[s],  dx[i] += v[i]·A[s]
//   dA[s] = Σ v[i]ᵀ·x[i],  dB[s] = scaling[s] · Σ dy[i]ᵀ·u[i]   over the rows of s
//
// The adapters lie in two pools: rows [first, first + rank) of `a` are a slot's A, the same rows of `b` its B
// transposed. Rows of x are visited in the order of a routing, in which those of one slot lie together; u and v
// are in that order.
#pragma once

#include <cstdint>

#include "fastlora/nf4.h"

namespace fastlora {

inline constexpr int32_t kMaxSlices = 8;

// Slice j writes the columns of y that follow those of slice j - 1.
struct AdapterSlice {
  const void* a;           // (rows, k)
  const void* b;           // (rows, n)
  int64_t rows, n, width;  // width: columns of u and v, at least the largest rank
};

struct AdapterTable {
  AdapterSlice slice[kMaxSlices];
  int32_t slices;
  int64_t capacity;
  const int32_t* entries;  // (slices, capacity, 2): first row, rank; rank 0: as if the row had no adapter
  const float* scaling;    // (slices, capacity)
  DType dtype;             // of the pools
};

// What lora_route makes of slots.
struct Routing {
  const int32_t* order;  // (m): rows by slot, stably; those without an adapter last
  const int32_t*
      segments;  // (segment_rows, 2): slot and its first position in order; {-1, routed rows} to the end
  int64_t m, segment_rows;
};

struct LoraRouteArgs {
  const void* slots;  // (m)
  bool wide;          // int64, else int32
  int64_t m, capacity;
  int32_t* order;     // (m) out
  int32_t* segments;  // (min(m, capacity) + 1, 2) out
};
// kBadArgument: a slot is not in -1 .. capacity - 1.
Status lora_route(const LoraRouteArgs& args);

// y (m, n) += ..., u (m, sum of widths) out: columns past the rank and rows without an adapter are zeros, and such
// rows of y keep their bits. For the gradient of the input x is dy (m, n), y is dx (m, k) and u is v.
struct SegmentedLoraArgs {
  const void* x;  // (m, k), dtype
  void* y;        // (m, n), dtype, in and out
  void* u;        // (m, sum of widths), dtype, out
  int64_t m, k, n;
  AdapterTable table;
  Routing routing;
  DType dtype;  // of x, y, u
  int32_t threads;
  Isa isa;
};
// kBadArgument, before anything is written: entries that leave their pool or exceed the width, an order that is no
// permutation, segments that do not cut it.
Status segmented_lora(const SegmentedLoraArgs& args);
Status segmented_lora_grad_input(const SegmentedLoraArgs& args);

// da[j], db[j] like the pools; zeros where nothing was routed.
struct SegmentedLoraGradPoolsArgs {
  const void* x;   // (m, k), dtype
  const void* dy;  // (m, n), dtype
  const void* u;   // (m, sum of widths), dtype
  const void* v;   // the same
  void* da[kMaxSlices];
  void* db[kMaxSlices];
  int64_t m, k, n;
  AdapterTable table;
  Routing routing;
  DType dtype;
  int32_t threads;
  Isa isa;
};
Status segmented_lora_grad_pools(const SegmentedLoraGradPoolsArgs& args);

// y = x·Wᵀ + bias and the low-rank term of every row, rounded once.
struct Nf4MultiLoraLinearArgs {
  const void* x;  // (m, k), dtype
  Nf4Weight weight;
  const void* bias;  // (n), dtype, or null
  void* y;           // (m, n), dtype, out
  void* u;           // (m, sum of widths), dtype, out
  int64_t m;
  AdapterTable table;
  Routing routing;
  DType dtype;
  bool batch_invariant;  // a row's bits do not depend on the other rows
  int32_t threads;
  Isa isa;
  const float* sums = nullptr;  // as Nf4LinearArgs'
};
Status nf4_multi_lora_linear(const Nf4MultiLoraLinearArgs& args);

// dx = dy·W and the low-rank term, rounded once.
struct Nf4MultiLoraGradInputArgs {
  const void* dy;  // (m, n), dtype
  Nf4Weight weight;
  void* dx;  // (m, k), dtype, out
  void* v;   // (m, sum of widths), dtype, out
  int64_t m;
  AdapterTable table;
  Routing routing;
  DType dtype;
  bool batch_invariant;
  int32_t threads;
  Isa isa;
  void* per_group = nullptr;  // as Nf4LinearGradInputArgs'
};
Status nf4_multi_lora_grad_input(const Nf4MultiLoraGradInputArgs& args);

}  // namespace fastlora
