// What the kernels of the fused layer share, in both directions: their arguments, the operands of the low-rank
// steps, and how results are stored.
//
// Both directions are one product, out = [x | inner] · [W | factor], with W and the factor as they are or
// transposed:
//   forward         x (m, k), contracted over k; factor = s·B (n, r); inner = u (m, r); out = y (m, n)
//   input gradient  x is dy (m, n), contracted over n; factor = A (r, k); inner = v (m, r); out = dx (m, k)
// W is the left operand of the tensor instructions (16 of its rows, or columns, by 16 steps), x the right one (16
// steps by 8 rows of x): at one row of x an eighth of a product is used, and nothing is read in vain.
#pragma once

#include "fastlora/cuda.h"
#include "nf4_pairs.cuh"
#include "tensor_core.cuh"

namespace fastlora::cuda {

struct ProductArgs {
  const void* x;          // (m, inner size), 16-bit
  const uint8_t* packed;  // (n, row_bytes)
  DeviceScales scales;
  const float* map;          // (256) the dynamic map, with nested scales
  const void* bias;          // (outer size), x's dtype, or null
  const float* gain;         // (outer size), or null: what the product is multiplied by
  const void* factor;        // (n, r) or (r, k), factor_dtype; null when r == 0
  const void* inner;         // (m, r), x's dtype; or null:
  const float* inner_parts;  // (inner_splits, m, r), to be summed in order
  void* out;                 // (m, outer size), x's dtype; or null:
  float* parts;              // (splits, m, outer size), summed by a later launch
  int64_t row_bytes;
  int m, n, k, r;
  int shift;  // log2(blocksize)
  int inner_splits;
  int splits;     // of the contraction, over blocks of threads
  int span;       // of it that a split has
  float scaling;  // of the factor
  DType factor_dtype;
  int weight_vector;    // adjacent bytes of W that may be loaded as one: 16, 8, 4, 1
  bool x_vectors;       // rows of x are whole 16-byte vectors, at such addresses
  bool factor_vectors;  // and those of the factor
  bool inner_pairs;     // rows of inner are whole pairs, at such addresses
  int out_vector;       // so many adjacent results may be stored as one: 1, 2, 4, 8
  PairCodes codes;
};

// Four pairs along one direction as the left operand along the other: the low halves of all, and the high ones.
// The pairs belong to steps 2t, 2t + 1, 2t + 8, 2t + 9 of the contraction (t = lane % 4); rows g (= lane / 4) and
// g + 8 of the operand are the pairs' first and second halves.
FASTLORA_DEVICE void transpose_pairs(uint32_t (&a)[4], uint32_t p0, uint32_t p1, uint32_t p8, uint32_t p9) {
  a[0] = byte_permute(p0, p1, 0x5410);
  a[1] = byte_permute(p0, p1, 0x7632);
  a[2] = byte_permute(p8, p9, 0x5410);
  a[3] = byte_permute(p8, p9, 0x7632);
}

// ---- elements of any dtype ----------------------------------------------------------------------------------

FASTLORA_DEVICE float load_any(const void* base, int64_t index, DType dtype FASTLORA_AT) {
  switch (dtype) {
    case DType::kFloat32: return Element<DType::kFloat32>::load(base, index FASTLORA_HERE);
    case DType::kBFloat16: return Element<DType::kBFloat16>::load(base, index FASTLORA_HERE);
    case DType::kFloat16: return Element<DType::kFloat16>::load(base, index FASTLORA_HERE);
  }
  return 0.0f;
}

// Eight adjacent 16-bit elements of which `valid` exist, the others zero. `vectors`: the address is a multiple
// of 16.
FASTLORA_DEVICE Words4 load_halves(const uint16_t* from, int valid, bool vectors FASTLORA_AT) {
  if (vectors && valid >= 8) return load_readonly(reinterpret_cast<const Words4*>(from) FASTLORA_HERE);
  Words4 words;
  FASTLORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < valid ? load_readonly(from + 2 * i FASTLORA_HERE) : 0;
    const uint32_t high = 2 * i + 1 < valid ? load_readonly(from + 2 * i + 1 FASTLORA_HERE) : 0;
    words.w[i] = low | high << 16;
  }
  return words;
}

// Eight adjacent elements from `index` on as four pairs of D, times `factor`; those from `valid` on are zero.
// `vectors`: index is a multiple of 8 and the address of 16.
template <DType D>
FASTLORA_DEVICE Words4 load_octet(const void* base, int64_t index, int valid, DType dtype, bool vectors,
                                  float factor FASTLORA_AT) {
  Words4 out;
  if (vectors && valid >= 8) {
    if (dtype == D) {
      out =
          load_readonly(reinterpret_cast<const Words4*>(static_cast<const uint16_t*>(base) + index) FASTLORA_HERE);
      if (factor == 1.0f) return out;
      float values[8];
      Element<D>::unpack(out, values);
      FASTLORA_UNROLL
      for (int i = 0; i < 4; ++i) out.w[i] = pack_pair<D>(values[2 * i] * factor, values[2 * i + 1] * factor);
      return out;
    }
    if (dtype == DType::kFloat32) {
      const auto* from = reinterpret_cast<const Words4*>(static_cast<const float*>(base) + index);
      FASTLORA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const Words4 four = load_readonly(from + i FASTLORA_HERE);
        out.w[2 * i] = pack_pair<D>(float_of(four.w[0]) * factor, float_of(four.w[1]) * factor);
        out.w[2 * i + 1] = pack_pair<D>(float_of(four.w[2]) * factor, float_of(four.w[3]) * factor);
      }
      return out;
    }
  }
  FASTLORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float low = 2 * i < valid ? load_any(base, index + 2 * i, dtype FASTLORA_HERE) : 0.0f;
    const float high = 2 * i + 1 < valid ? load_any(base, index + 2 * i + 1, dtype FASTLORA_HERE) : 0.0f;
    out.w[i] = pack_pair<D>(low * factor, high * factor);
  }
  return out;
}

// ---- the low-rank steps -------------------------------------------------------------------------------------

// scaling * factor[row][col] and [col + 1] of a factor (n, r); zero outside.
template <DType D>
FASTLORA_DEVICE uint32_t factor_pair(const ProductArgs& args, int row, int col FASTLORA_AT) {
  float values[2] = {0.0f, 0.0f};
  FASTLORA_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (row < args.n && col + i < args.r) {
      const int64_t index = static_cast<int64_t>(row) * args.r + col + i;
      values[i] = load_any(args.factor, index, args.factor_dtype FASTLORA_HERE) * args.scaling;
    }
  }
  return pack_pair<D>(values[0], values[1]);
}

// inner[row][col] and [col + 1], which the launch before wrote; zero outside.
template <DType D>
FASTLORA_DEVICE uint32_t inner_pair(const ProductArgs& args, int row, int col FASTLORA_AT) {
  if (row >= args.m || col >= args.r) return 0;
  const int64_t index = static_cast<int64_t>(row) * args.r + col;
  const bool second = col + 1 < args.r;
  if (args.inner != nullptr) {
    const auto* inner = static_cast<const uint16_t*>(args.inner) + index;
    if (args.inner_pairs) return load_global(reinterpret_cast<const uint32_t*>(inner) FASTLORA_HERE);
    const uint32_t low = load_global(inner FASTLORA_HERE);
    return second ? low | static_cast<uint32_t>(load_global(inner + 1 FASTLORA_HERE)) << 16 : low;
  }
  float low = 0.0f, high = 0.0f;
  for (int split = 0; split < args.inner_splits; ++split) {
    const float* part = args.inner_parts + static_cast<int64_t>(split) * args.m * args.r + index;
    low = add(low, load_global(part FASTLORA_HERE));
    if (second) high = add(high, load_global(part + 1 FASTLORA_HERE));
  }
  return pack_pair<D>(low, high);
}

// Steps r0 .. r0 + 15 of inner, for the 8 rows of x from `row` on: a right operand.
template <DType D>
FASTLORA_DEVICE void inner_operand(const ProductArgs& args, int row, int r0, uint32_t (&b)[2] FASTLORA_AT) {
  const int group = lane_index() / 4, pair = lane_index() % 4 * 2;
  b[0] = inner_pair<D>(args, row + group, r0 + pair FASTLORA_HERE);
  b[1] = inner_pair<D>(args, row + group, r0 + pair + 8 FASTLORA_HERE);
}

// ---- results ------------------------------------------------------------------------------------------------

// kCount adjacent results of row `row` of x, from column `col` (a multiple of kCount) of `width`: to the output,
// with gain and bias, or to this split's part.
template <DType D, int kCount>
FASTLORA_DEVICE void store_results(const ProductArgs& args, int split, int row, int col, int width,
                                   float (&values)[kCount] FASTLORA_AT) {
  if (row >= args.m || col >= width) return;
  const int64_t index = static_cast<int64_t>(row) * width + col;
  if (args.out == nullptr) {
    float* part = args.parts + static_cast<int64_t>(split) * args.m * width + index;
    if (args.out_vector >= kCount) {
      constexpr int kAtOnce = kCount < 4 ? kCount : 4;
      struct alignas(4 * kAtOnce) Floats {
        float f[kAtOnce];
      };
      FASTLORA_UNROLL
      for (int i = 0; i < kCount; i += kAtOnce) {
        Floats floats;
        FASTLORA_UNROLL
        for (int j = 0; j < kAtOnce; ++j) floats.f[j] = values[i + j];
        store_global(reinterpret_cast<Floats*>(part + i), floats FASTLORA_HERE);
      }
      return;
    }
    FASTLORA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (col + i < width) store_global(part + i, values[i] FASTLORA_HERE);
    }
    return;
  }
  if (args.gain != nullptr) {
    FASTLORA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (col + i < width) values[i] = multiply(values[i], load_global(args.gain + col + i FASTLORA_HERE));
    }
  }
  if (args.bias != nullptr) {
    FASTLORA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (col + i < width) values[i] = add(values[i], Element<D>::load(args.bias, col + i FASTLORA_HERE));
    }
  }
  auto* out = static_cast<uint16_t*>(args.out) + index;
  if (args.out_vector >= kCount) {
    struct alignas(2 * kCount) Pairs {
      uint32_t w[kCount / 2];
    } pairs;
    FASTLORA_UNROLL
    for (int i = 0; i < kCount / 2; ++i) pairs.w[i] = pack_pair<D>(values[2 * i], values[2 * i + 1]);
    store_global(reinterpret_cast<Pairs*>(out), pairs FASTLORA_HERE);
    return;
  }
  FASTLORA_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (col + i < width) store_global(out + i, Element<D>::half_of(values[i]) FASTLORA_HERE);
  }
}

}  // namespace fastlora::cuda
