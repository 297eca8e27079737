// The kernels of many adapters in one batch by name, and what they take. segmented_lora.cu launches them.
#pragma once

#include "fastlora/cuda.h"
#include "kernels.cuh"
#include "nf4_routed.cuh"

namespace fastlora::cuda {

// Up to so many rows of x tiles have 8 of them, beyond 32. A guess, not yet measured.
inline constexpr int kFewRows = 512;

// Four adjacent elements of which `valid` exist, the others zero. `vectors`: index is a multiple of 4, and the
// address of 16.
FASTLORA_DEVICE void load_quad(const void* base, int64_t index, int valid, DType dtype, bool vectors,
                               float (&out)[4] FASTLORA_AT) {
  if (vectors && valid >= 4 && dtype == DType::kFloat32) {
    const Words4 four =
        load_readonly(reinterpret_cast<const Words4*>(static_cast<const float*>(base) + index) FASTLORA_HERE);
    FASTLORA_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = float_of(four.w[i]);
    return;
  }
  FASTLORA_UNROLL
  for (int i = 0; i < 4; ++i) out[i] = i < valid ? load_any(base, index + i, dtype FASTLORA_HERE) : 0.0f;
}

// Of memory that this launch writes.
template <DType D>
FASTLORA_DEVICE float load_element(const void* base, int64_t index FASTLORA_AT) {
  if constexpr (D == DType::kFloat32) {
    return load_global(static_cast<const float*>(base) + index FASTLORA_HERE);
  } else {
    return Element<D>::of_half(load_global(static_cast<const uint16_t*>(base) + index FASTLORA_HERE));
  }
}

// `valid` (at most kCount) adjacent elements from `index` on, rounded to a pool's dtype. `vectors`: index is a
// multiple of 8, and the address of 16.
template <int kCount>
FASTLORA_DEVICE void store_row(void* base, int64_t index, int valid, DType dtype, bool vectors,
                               const float (&values)[kCount] FASTLORA_AT) {
  if constexpr (kCount == 8) {
    if (vectors && valid >= 8) {
      if (dtype == DType::kFloat32) {
        auto* to = reinterpret_cast<Words4*>(static_cast<float*>(base) + index);
        FASTLORA_UNROLL
        for (int h = 0; h < 2; ++h) {
          const Words4 four{{bits_of(values[4 * h]), bits_of(values[4 * h + 1]), bits_of(values[4 * h + 2]),
                             bits_of(values[4 * h + 3])}};
          store_global(to + h, four FASTLORA_HERE);
        }
      } else {
        auto* to = reinterpret_cast<Words4*>(static_cast<uint16_t*>(base) + index);
        store_global(to, dtype == DType::kBFloat16 ? Element<DType::kBFloat16>::pack(values)
                                                   : Element<DType::kFloat16>::pack(values) FASTLORA_HERE);
      }
      return;
    }
  }
  FASTLORA_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (i >= valid) break;
    switch (dtype) {
      case DType::kFloat32: Element<DType::kFloat32>::store(base, index + i, values[i] FASTLORA_HERE); break;
      case DType::kBFloat16: Element<DType::kBFloat16>::store(base, index + i, values[i] FASTLORA_HERE); break;
      case DType::kFloat16: Element<DType::kFloat16>::store(base, index + i, values[i] FASTLORA_HERE); break;
    }
  }
}

// u[p] = scale · x[order[p]] · pool rows of p's adapter, for every position p and slice; zeros past the rank.
struct ShrinkArgs {
  const void* x;  // (m, width)
  void* u;        // (m, slices.ranks), x's dtype; or, for lora_sum to add:
  float* parts;   // (splits, m, slices.ranks)
  Segments segments;
  Slices slices;
  int width;       // of x
  int splits;      // of the contraction
  bool x_vectors;  // rows of x, and slices in them, are whole 16-byte vectors
};
Status launch_segmented_shrink(const ShrinkArgs& args, DType dtype, void* stream);

// y[order[p]] += scale · u[p] · pool rows of p's adapter.
struct ExpandArgs {
  const void* u;  // (m, slices.ranks), y's dtype
  void* y;        // (m, width)
  Segments segments;
  Slices slices;
  int width;
  bool same_columns;  // slices all add to the whole of y, unscaled; else to the columns from their own on
  bool y_vectors;     // rows of y, and slices in them, are whole 16-byte vectors
  bool u_quads;       // u of a slice begins at a multiple of 8 bytes
};
// Launched right after the shrink, it overlaps it.
Status launch_segmented_expand(const ExpandArgs& args, DType dtype, void* stream);

// The gradient of one pool, of the rows of a tall operand and of one slice of a narrow one.
struct PoolGradient {
  const void* tall;               // (m, tall_width): x, or dy
  const void* small;              // (m, GradientArgs::ranks), tall's dtype: v, or u
  void* pool;                     // (pool_rows, width), out
  int64_t part_at;                // floats into a part
  int tall_width, width, column;  // of tall; of the pool; where that is in tall
  int pool_rows, rank_at, ranks;
  int slice;
  bool scaled, vectors;  // by the adapter's scaling; rows of tall and of the slice are whole 16-byte vectors
};

// pool[first + q] = scale · Σ small[p][q] · tall[order[p]] over an adapter's rows, in order. Where its rows pass a
// multiple of row_share, in parts: two for each row_share, of the segments that begin in it and before it.
struct GradientArgs {
  PoolGradient of[2 * kMaxSlices];
  Segments segments;
  Slices slices;  // entries and scaling alone
  float* parts;   // (2 * shares, part_size)
  int64_t part_size;
  int count, ranks;
  int row_share;       // a multiple of 64
  int sum_blocks;      // that add up one adapter's parts of a gradient
  bool small_vectors;  // rows of small, and its slices in them, are whole 16-byte vectors
  bool pool_vectors;   // and those of the pools
};
// Zeros into every pool; overlaps nothing.
Status launch_segmented_zero(const GradientArgs& args, void* stream);
// Then what the segments give; then the sums of their parts.
Status launch_segmented_gradients(const GradientArgs& args, DType dtype, void* stream);
Status launch_segmented_sum(const GradientArgs& args, void* stream);

// As launch_nf4_linear_decode, launch_nf4_linear_tile (columns 2, 4 or 8; with `weights`, or blocks of 32 weights,
// 2 or 8) and launch_nf4_linear_grad_input_tile (columns 2 or 8) with an adapter for every row; after the shrink,
// or the sum of its parts, which they overlap.
Status launch_nf4_multi_decode(const RoutedArgs& args, DType dtype, int rows, void* stream);
Status launch_nf4_multi_tile(const RoutedArgs& args, DType dtype, int columns, bool ragged, bool weights,
                             void* stream);
Status launch_nf4_multi_grad_input_tile(const RoutedArgs& args, DType dtype, int columns, bool ragged,
                                        void* stream);

// ---- what the entry points share ------------------------------------------------------------------------------

// Sizes that no kernel takes.
bool bad_table(const AdapterTable& table, const Routing& routing, int64_t m, int64_t k, int64_t n);
Segments segments_of(const Routing& routing);
// The b pools, whose slices are columns of y and dy; or the a pools, of all of x and dx.
Slices slices_of(const AdapterTable& table, int64_t k, bool b, bool scaled);
// u, or v with `grad`: the shrink, and the sum of its parts where there are some.
int64_t inner_scratch(const SegmentedLoraCudaArgs& args, bool grad);
Status launch_inner(const SegmentedLoraCudaArgs& args, bool grad);
// u of every slice, in every row, begins at a multiple of 8 bytes.
bool whole_quads(const void* u, const Slices& slices);

}  // namespace fastlora::cuda
