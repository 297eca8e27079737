// Scalar conversions and small integer helpers for every kernel file.
//
// Everything here is `static inline`, that is, private to the file that includes it: a shared inline function
// compiled once with AVX-512 flags could be the copy the linker keeps for the scalar level.
#pragma once

#include <cstdint>
#include <cstring>

#include "fastlora/nf4.h"

namespace fastlora::cpu {

static inline constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T>
static inline T load_unaligned(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

static inline int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

static inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  return load_unaligned<float>(&bits);
}

// Round to nearest, ties to even; every NaN becomes a quiet one.
static inline uint16_t float_to_bf16(float f) {
  const uint32_t bits = load_unaligned<uint32_t>(&f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float fp16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  uint32_t mantissa = h & 0x3ffu;
  uint32_t bits;
  if (exponent == 0x1f) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // zero or subnormal: mantissa * 2^-24 is exact in float32
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    bits = sign | load_unaligned<uint32_t>(&magnitude);
  }
  return load_unaligned<float>(&bits);
}

// Round to nearest, ties to even, overflow to infinity.
static inline uint16_t float_to_fp16(float f) {
  const uint32_t bits = load_unaligned<uint32_t>(&f);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or above
  if (magnitude < 0x38800000u) {  // below the smallest normal half: adding 0.5 aligns and rounds the mantissa
    float aligned = load_unaligned<float>(&magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (load_unaligned<uint32_t>(&aligned) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

static inline float load_as_float(const void* base, int64_t index, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base)[index];
  const uint16_t h = static_cast<const uint16_t*>(base)[index];
  return dtype == DType::kBFloat16 ? bf16_to_float(h) : fp16_to_float(h);
}

static inline void store_from_float(void* base, int64_t index, DType dtype, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(base)[index] = value;
  } else {
    static_cast<uint16_t*>(base)[index] = dtype == DType::kBFloat16 ? float_to_bf16(value) : float_to_fp16(value);
  }
}

static inline const void* element_ptr(const void* base, int64_t index, DType dtype) {
  return static_cast<const char*>(base) + index * dtype_bytes(dtype);
}
static inline void* element_ptr(void* base, int64_t index, DType dtype) {
  return static_cast<char*>(base) + index * dtype_bytes(dtype);
}

// absmax of one block, from either form of scales. `map` is nf4_dynamic_map().
static inline float block_absmax(const Nf4Scales& scales, const float* map, int64_t block) {
  if (scales.nested == nullptr) return load_unaligned<float>(scales.codes + block * 4);
  const float offset = load_unaligned<float>(scales.nested);
  const float scale = load_unaligned<float>(scales.nested + (1 + block / kNestedBlocksize) * 4);
  return map[scales.codes[block]] * scale + offset;  // two roundings: files are built with -ffp-contract=off
}

}  // namespace fastlora::cpu
