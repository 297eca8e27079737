// The NF4 format: constants, the two storage structs, and the quantise / dequantise entry points.
//
// A weight is `rows` x `cols` (an N-D tensor is (product of the leading sizes, last size)). Codes are
// packed row by row, ceil(cols / 2) bytes a row, the even element in the HIGH nibble; an odd row ends with
// code 7 (zero) in its last low nibble. Scale blocks run over the FLATTENED tensor, as bitsandbytes' do:
// element (i, j) belongs to block (i * cols + j) / blocksize, so a block may straddle rows.
#pragma once

#include <cstdint>

#include "fastlora/status.h"

namespace fastlora {

// The 16 values of NormalFloat4 (Dettmers et al., QLoRA, 2023), as float32.
inline constexpr float kNf4Codes[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
inline constexpr int64_t kMinBlocksize = 32;  // a power of two between these
inline constexpr int64_t kMaxBlocksize = 4096;
inline constexpr int64_t kNestedBlocksize = 256;  // absmax values that share one second-level scale

// Scales as bytes, so that no trainer casts them. Unaligned reads are expected: kernels load with memcpy.
struct Nf4Scales {
  // nested == nullptr: ceil(rows*cols / blocksize) float32 absmax values.
  // else:              as many uint8 indices into the dynamic map (nf4_dynamic_map).
  const uint8_t* codes;
  // float32 offset, then one float32 absmax per kNestedBlocksize blocks:
  // absmax[b] = map[codes[b]] * nested[1 + b / 256] + nested[0], each step rounded to float32.
  const uint8_t* nested;
};

struct Nf4Weight {
  const uint8_t* packed;  // (n, ceil(k / 2))
  Nf4Scales scales;
  int64_t n;  // out_features (rows)
  int64_t k;  // in_features (columns)
  int64_t blocksize;
  // Or null; (n, groups): what is added to each weight of a group, which is k / groups columns of a row.
  const float* offsets = nullptr;
  int64_t groups = 0;
};

// The 256 values of the signed dynamic 8-bit map, ascending; built once, the same bits everywhere.
const float* nf4_dynamic_map();

// The magnitudes of its entries 127 .. 254 (0 and up) as two planes of words, 128 low halves and then 128 high
// ones, 64-byte aligned: for kernels that look them up in registers. Entry 127 - i is -(entry 127 + i); entry 255
// is 1.
const uint16_t* nf4_dynamic_map_planes();

struct Nf4QuantizeArgs {
  const void* weight;  // (rows, cols), dtype
  DType dtype;
  int64_t rows, cols, blocksize;
  uint8_t* packed;  // (rows, ceil(cols / 2)) out
  float* absmax;    // (ceil(rows*cols / blocksize)) out
  int32_t threads;
};
// Nearest code of w * (1 / max(absmax, 1e-38)), in float32, a tie to the lower one; in a last block that is not
// full, of w / max(absmax, 1e-38) (that is bitsandbytes' arithmetic). kNotFinite if any weight is NaN or Inf.
Status nf4_quantize(const Nf4QuantizeArgs& args, Isa isa);

struct Nf4DoubleQuantizeArgs {
  const float* absmax;  // (blocks)
  int64_t blocks;
  uint8_t* codes;   // (blocks) out
  uint8_t* nested;  // (1 + ceil(blocks / 256)) float32 out, as bytes
  int32_t threads;
};
// offset = mean(absmax) (float64 sum, rounded once); scale = the largest |absmax - offset| of each 256; then 8-bit
// codes of (absmax - offset) / scale by exact nearest, a tie to the lower index.
Status nf4_double_quantize(const Nf4DoubleQuantizeArgs& args);

struct Nf4DequantizeArgs {
  Nf4Weight weight;
  void* out;  // (n, k), dtype
  DType dtype;
  int32_t threads;
};
// out = code * absmax in float32, rounded once to dtype; with offsets code * absmax + offset, two roundings, in
// float32 only.
Status nf4_dequantize(const Nf4DequantizeArgs& args, Isa isa);

// absmax (blocks) float32 from either form of scales.
Status nf4_decode_absmax(const Nf4Scales& scales, int64_t blocks, float* absmax, int32_t threads);

}  // namespace fastlora
