// The device's conversions between float formats, and arithmetic on pairs of 16-bit floats.
#include <bit>
#include <cmath>

#include "intrinsics.h"

namespace fastlora::emulator {
namespace {

uint32_t bits_of(float f) { return std::bit_cast<uint32_t>(f); }
float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

}  // namespace

uint16_t float_to_bf16(float f) {
  if (std::isnan(f)) return 0x7fff;  // as the device's cvt has it
  const uint32_t bits = bits_of(f);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

float fp16_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude > 0x7c00) return float_of(sign | 0x7fc00000u);
  if (magnitude == 0x7c00) return float_of(sign | 0x7f800000u);
  if (magnitude < 0x0400) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + (112u << 23)));  // the exponents' biases are 15 and 127
}

uint16_t float_to_fp16(float f) {
  if (std::isnan(f)) return 0x7fff;
  const auto sign = static_cast<uint16_t>(bits_of(f) >> 16 & 0x8000u);
  const float magnitude = std::fabs(f);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  // Below the normals a unit is 2^-24, and so is the last place of a float32 from 0.5 to 1.
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(bits_of(magnitude + 0.5f) - bits_of(0.5f));
  const uint32_t bits = bits_of(magnitude) - (112u << 23);
  return sign | static_cast<uint16_t>((bits + 0xfffu + (bits >> 13 & 1u)) >> 13);
}

uint32_t multiply_add_pair(bool bf16, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int shift : {0, 16}) {
    const auto half = [&](uint32_t word) { return static_cast<uint16_t>(word >> shift); };
    const auto value = [&](uint32_t word) {
      return static_cast<double>(bf16 ? bf16_to_float(half(word)) : fp16_to_float(half(word)));
    };
    // A product of two halves is exact in float64. Rounding the sum on its way to float32 to odd keeps what the
    // last rounding, to 8 or 11 bits, must know.
    const double sum = std::fma(value(a), value(b), value(c));
    auto rounded = static_cast<float>(sum);
    if (std::isfinite(rounded) && static_cast<double>(rounded) != sum) {
      const bool away = std::fabs(static_cast<double>(rounded)) > std::fabs(sum);
      rounded = float_of((away ? bits_of(rounded) - 1 : bits_of(rounded)) | 1u);
    }
    out |= static_cast<uint32_t>(bf16 ? float_to_bf16(rounded) : float_to_fp16(rounded)) << shift;
  }
  return out;
}

uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (static_cast<uint64_t>(b) << 32) | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    auto byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7)) & 255);
    if ((nibble & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;
    out |= byte << (8 * i);
  }
  return out;
}

}  // namespace fastlora::emulator
