// Every kernel of the fused layer by name. nf4_linear.cu alone chooses among them; each wants what stands beside
// it.
#pragma once

#include "nf4_linear.cuh"

namespace fastlora::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
// Rows of `row_bytes` are whole 16-byte vectors, at such addresses.
inline bool whole_vectors(const void* p, int64_t row_bytes) { return aligned(p, 16) && row_bytes % 16 == 0; }

// y for m <= 8, by blocks of `rows` (16 or 32) columns of y. Whole vectors of x; rows of W that are whole scale
// blocks of at least 64; one split.
Status launch_nf4_linear_decode(const ProductArgs& args, DType dtype, int rows, bool overlaps, void* stream);

// y by tiles of 128 columns and 8 * `columns` rows of x, columns 2, 4, 8 or 12; span a multiple of 128. Unless
// `ragged` (columns up to 8): rows of W that are whole scale blocks, in whole vectors.
Status launch_nf4_linear_tile(const ProductArgs& args, DType dtype, int columns, bool ragged, bool overlaps,
                              void* stream);

// y by tiles of 128 columns and `columns` rows of x, columns 16, 32, 64, 128 or 256; span a multiple of 64.
// Capability 9.0a. Whole vectors of x; rows of W that are whole scale blocks, in whole vectors.
Status launch_nf4_linear_sm90(const ProductArgs& args, DType dtype, int columns, bool overlaps, void* stream);

// out = the sum of product.parts over its splits, plus the bias.
Status launch_split_sum(const ProductArgs& product, void* out, int width, DType dtype, void* stream);

// The copy of an operand (m, inner) that is widened by u or v: see wide_size() in cuda.h.
struct Wide {
  uint16_t* rows;  // (m, size), the operand's dtype; null: none is wanted
  int size, rank_at, r;
};
inline Wide wide_of(void* rows, int64_t inner, int64_t r, bool ones) {
  return {static_cast<uint16_t*>(rows), static_cast<int>(wide_size(inner, r, ones)),
          static_cast<int>(wide_rank_at(inner)), static_cast<int>(r)};
}

struct ProjectArgs {
  const void* x;  // (m, k), 16-bit
  const void* a;  // (r, k), a_dtype
  void* u;        // (m, r), x's dtype; or null, and, where nothing is widened either,
  float* parts;   // (splits, m, r)
  Wide wide;      // x widened by u: with one split
  int m, k, r;
  int splits;  // of k
  bool ones;   // one more column of `wide`, for the bias
  DType a_dtype;
  bool x_vectors, a_vectors;  // rows of them are whole 16-byte vectors, at such addresses
};
// u = x·Aᵀ
Status launch_lora_project(const ProjectArgs& args, DType dtype, void* stream);

// dx by tiles of 128 columns and `columns` rows of dy, as launch_nf4_linear_sm90.
Status launch_nf4_linear_grad_input_sm90(const ProductArgs& args, DType dtype, int columns, bool overlaps,
                                         void* stream);

// dx by tiles of 128 columns and 8 * `columns` rows of dy, columns 1, 2, 4 or 8; span a multiple of 128. Unless
// `ragged` (columns 2 or 8): as above.
Status launch_nf4_linear_grad_input_tile(const ProductArgs& args, DType dtype, int columns, bool ragged,
                                         bool overlaps, void* stream);

// out = scaling * the sum of `splits` parts of `count` values each; none where count is 0.
struct PartSum {
  const float* parts;
  void* out;
  Wide wide;  // where they are written once more, with the zeros behind them
  int64_t count;
  int splits;
  float scaling;
  DType dtype;
};
Status launch_lora_sum(const PartSum& first, const PartSum& second, void* stream);

}  // namespace fastlora::cuda
