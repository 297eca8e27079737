// A byte of packed weights looked up whole: its two values, as two 16-bit floats in a word, are one entry of a
// table in shared memory. This is how every fused kernel makes the operands of its tensor instructions, in
// registers.
//
// There are 32 copies of each word, one a bank, so that no two lanes of a warp ever meet in one: an entry is 128
// bytes. From entry to entry it is 256 bytes, because then one byte permute makes the address: byte 1 is the
// packed byte, byte 0 the lane's copy. The gaps between the entries hold the ring of packed weights that the
// look-ups come from.
#pragma once

#include <bit>

#include "nf4.cuh"

namespace fastlora::cuda {

inline constexpr int kPairPitch = 256;
inline constexpr int kPairTableBytes = 256 * kPairPitch;
inline constexpr int kGapBytes = 128;

// The codes are stored times this, and absmax is divided by it: of all factors it is the one for which rounding
// the 16 codes to D costs least (6.3e-4 of their root mean square instead of 10.6e-4 for bfloat16, 0.6e-4 instead
// of 1.6e-4 for float16).
template <DType D>
inline constexpr float kStretch = D == DType::kBFloat16 ? 1.437005f : 1.67769f;

// The 16 codes, stretched and rounded, as bits of D.
struct PairCodes {
  uint16_t half[16];
};

template <DType D>
constexpr PairCodes pair_codes() {
  PairCodes codes{};
  for (int i = 0; i < 16; ++i) {
    // To nearest even. None is subnormal: |code| is 0 or at least 0.07.
    constexpr int kCut = D == DType::kBFloat16 ? 16 : 13;
    const auto bits = std::bit_cast<uint32_t>(kNf4Codes[i] * kStretch<D>);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half = (magnitude + (1u << (kCut - 1)) - 1 + (magnitude >> kCut & 1u)) >> kCut;
    if (D == DType::kFloat16 && half != 0) half -= (127 - 15) << 10;
    codes.half[i] = static_cast<uint16_t>(sign | half);
  }
  return codes;
}

// Fills the table at the start of shared memory, by a block of kThreads; a barrier must follow.
template <int kThreads>
FASTLORA_DEVICE void fill_pair_table(const PairCodes& codes) {
  for (int byte = thread_index(); byte < 256; byte += kThreads) {
    const uint32_t pair = codes.half[byte >> 4] | static_cast<uint32_t>(codes.half[byte & 15]) << 16;
    auto* entry = shared_memory<Words4>(byte * kPairPitch);
    // Eight neighbours write to eight different places of their entries at a time.
    for (int i = 0; i < 8; ++i) store_shared(entry + (i + byte) % 8, Words4{{pair, pair, pair, pair}});
  }
}

// Gap i of 256, 128 bytes that begin at bank 0.
FASTLORA_DEVICE uint8_t* gap(int i) { return shared_memory<uint8_t>(i * kPairPitch + kGapBytes); }

// Picks byte i of a word for look_up: an immediate where i is known, else kept in a register.
FASTLORA_DEVICE constexpr uint32_t pick_byte(uint32_t i) { return 0x6504u | i << 4; }

// The pair of the picked byte of `word`, the even column in the low half. `copy`: 4 * lane_index().
FASTLORA_DEVICE uint32_t look_up(uint32_t word, uint32_t picked, uint32_t copy FASTLORA_AT) {
  const uint32_t offset = byte_permute(word, copy, picked);
  return load_shared(reinterpret_cast<const uint32_t*>(shared_memory<uint8_t>(0) + offset) FASTLORA_HERE);
}

// A scale in two parts: high + low has 8 bits more than bfloat16 has, 11 more than float16. As one word, low in
// its low half, and as two words of two equal halves each, as it is used.
struct PairScale {
  uint32_t high, low;
};

// `scale`: absmax divided by the table's stretch.
template <DType D>
FASTLORA_DEVICE uint32_t split_scale(float scale) {
  float high = scale, rest;
  if constexpr (D == DType::kBFloat16) {
    high =
        float_of(bits_of(scale) & 0xffff0000u);  // cut, not rounded: a finite scale never gives an infinite part
    rest = add(scale, -high);
  } else {
    rest = add(scale, -fp16_to_float(float_to_fp16(scale)));
  }
  if (!(rest < 3.4e38f && rest > -3.4e38f)) rest = 0.0f;  // of an infinite scale
  return pack_pair<D>(rest, high);
}

FASTLORA_DEVICE PairScale pair_scale(uint32_t split) {
  return {byte_permute(split, split, 0x3232), byte_permute(split, split, 0x1010)};
}

// pair * scale, as if rounded once from float32: the product with `low` is exact enough for that.
template <DType D>
FASTLORA_DEVICE uint32_t scaled(uint32_t pair, const PairScale& scale) {
  return multiply_add_pair<D>(pair, scale.high, multiply_pair<D>(pair, scale.low));
}

}  // namespace fastlora::cuda
