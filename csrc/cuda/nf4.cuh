// The NF4 format on the device: codes, the dynamic map, absmax of a block, elements of three dtypes.
#pragma once

#include "device.cuh"
#include "fastlora/nf4.h"

namespace fastlora::cuda {

// An element type: 16-byte vectors of kPerVector elements.
template <DType D>
struct Element {
  static constexpr int kBytes = D == DType::kFloat32 ? 4 : 2;
  static constexpr int kPerVector = 16 / kBytes;

  static FASTLORA_DEVICE float of_half(uint16_t h) {
    return D == DType::kBFloat16 ? bf16_to_float(h) : fp16_to_float(h);
  }
  static FASTLORA_DEVICE uint16_t half_of(float f) {
    return D == DType::kBFloat16 ? float_to_bf16(f) : float_to_fp16(f);
  }

  static FASTLORA_DEVICE float load(const void* base, int64_t index FASTLORA_AT) {
    if constexpr (kBytes == 4) {
      return load_readonly(static_cast<const float*>(base) + index FASTLORA_HERE);
    } else {
      return of_half(load_readonly(static_cast<const uint16_t*>(base) + index FASTLORA_HERE));
    }
  }
  static FASTLORA_DEVICE void store(void* base, int64_t index, float value FASTLORA_AT) {
    if constexpr (kBytes == 4) {
      store_global(static_cast<float*>(base) + index, value FASTLORA_HERE);
    } else {
      store_global(static_cast<uint16_t*>(base) + index, half_of(value) FASTLORA_HERE);
    }
  }
  static FASTLORA_DEVICE void unpack(const Words4& words, float (&out)[kPerVector]) {
    FASTLORA_UNROLL
    for (int i = 0; i < kPerVector; ++i) {
      if constexpr (kBytes == 4) {
        out[i] = float_of(words.w[i]);
      } else {
        out[i] = of_half(static_cast<uint16_t>(words.w[i / 2] >> (16 * (i % 2))));
      }
    }
  }
  static FASTLORA_DEVICE Words4 pack(const float (&values)[kPerVector]) {
    Words4 words;
    FASTLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kBytes == 4) {
        words.w[i] = bits_of(values[i]);
      } else {
        words.w[i] = half_of(values[2 * i]) | (static_cast<uint32_t>(half_of(values[2 * i + 1])) << 16);
      }
    }
    return words;
  }
};

// Scales as they lie in memory, on the device. `map`: the 256 values, in global memory.
struct DeviceScales {
  const uint8_t* codes;   // nested == nullptr: float32 absmax, a block each; else 8-bit indices
  const uint8_t* nested;  // float32 offset, then a float32 scale for every 256 blocks
};

// Both forms of scales read in one way, without a branch: absmax = factors[code] * value + offset, where for plain
// ones the code is any byte, every factor 1 and the offset 0. Loading and decoding are apart, so that a scale can
// be under way while others are used.
struct RawScale {
  float value;
  uint32_t code;
};

class ScaleReader {
 public:
  explicit FASTLORA_DEVICE ScaleReader(const DeviceScales& scales FASTLORA_AT)
      : codes_(scales.codes),
        values_(reinterpret_cast<const float*>(scales.nested == nullptr ? scales.codes : scales.nested + 4)),
        offset_(scales.nested == nullptr
                    ? 0.0f
                    : load_readonly(reinterpret_cast<const float*>(scales.nested) FASTLORA_HERE)),
        shift_(scales.nested == nullptr ? 0 : 8) {}

  template <class Index>
  FASTLORA_DEVICE RawScale fetch(Index block FASTLORA_AT) const {
    return {load_readonly(values_ + (block >> shift_) FASTLORA_HERE), load_readonly(codes_ + block FASTLORA_HERE)};
  }

  // `stretch`: what every absmax is multiplied by, as fill_factors has multiplied the factors.
  FASTLORA_DEVICE float decode(const RawScale& raw, const float* factors, float stretch FASTLORA_AT) const {
    return multiply_add(load_shared(factors + raw.code FASTLORA_HERE), raw.value, offset_ * stretch);
  }

  // absmax to the bit, as block_absmax() has it; factors without a stretch.
  FASTLORA_DEVICE float decode_exactly(const RawScale& raw, const float* factors FASTLORA_AT) const {
    return add(multiply(load_shared(factors + raw.code FASTLORA_HERE), raw.value), offset_);
  }

 private:
  const uint8_t* codes_;
  const float* values_;
  float offset_;
  int shift_;
};
static_assert(kNestedBlocksize == 1 << 8);

// The factors of a reader in shared memory, by a block of kThreads; a barrier must follow. `map`: null for plain
// ones.
template <int kThreads>
FASTLORA_DEVICE void fill_factors(float* factors, const float* map, float stretch FASTLORA_AT) {
  for (int i = thread_index(); i < 256; i += kThreads) {
    store_shared(factors + i,
                 (map == nullptr ? 1.0f : load_readonly(map + i FASTLORA_HERE)) * stretch FASTLORA_HERE);
  }
}

// absmax of `block`, to the bit; `map` in shared memory, used with nested scales only.
FASTLORA_DEVICE float block_absmax(const DeviceScales& scales, const float* map, int64_t block FASTLORA_AT) {
  if (scales.nested == nullptr) {
    return load_readonly(reinterpret_cast<const float*>(scales.codes) + block FASTLORA_HERE);
  }
  const auto* nested = reinterpret_cast<const float*>(scales.nested);
  const float offset = load_readonly(nested FASTLORA_HERE);
  const float scale = load_readonly(nested + 1 + block / kNestedBlocksize FASTLORA_HERE);
  const uint8_t code = load_readonly(scales.codes + block FASTLORA_HERE);
  return add(multiply(load_shared(map + code FASTLORA_HERE), scale), offset);
}

}  // namespace fastlora::cuda
