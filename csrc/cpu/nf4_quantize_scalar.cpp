// nf4_quantize in plain C++: the fallback of every machine.
#include "fastlora/nf4.h"
#include "kernels.h"
#include "nf4_quantize_driver.h"

namespace fastlora::cpu {
namespace {

struct ScalarLevel {
  // Magnitudes are compared as their bits, in which Inf and then NaN come after every number.
  template <DType D>
  float absmax(const void* x, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float value = load_as_float(x, i, D);
      const uint32_t magnitude = load_unaligned<uint32_t>(&value) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    return load_unaligned<float>(&largest);
  }

  // How many of the 15 midpoints lie strictly below: the nearest code, a tie to the lower one.
  static uint8_t nearest(float scaled) {
    uint8_t code = 0;
    for (int i = 0; i < 15; ++i) {
      code = static_cast<uint8_t>(code + (scaled > (kNf4Codes[i] + kNf4Codes[i + 1]) * 0.5f ? 1 : 0));
    }
    return code;
  }

  template <DType D, bool kDivide>
  void encode_bytes(const void* x, int64_t count, float factor, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = load_as_float(x, i, D);
      codes[i] = nearest(kDivide ? value / factor : value * factor);
    }
  }

  template <DType D, bool kDivide>
  void encode(const void* x, int64_t count, float factor, uint8_t* packed) {
    uint8_t codes[kMaxBlocksize + kSlack];
    encode_bytes<D, kDivide>(x, count, factor, codes);
    codes[count] = kZeroCode;
    pack(codes, round_up(count, 2), packed);
  }

  void pack(const uint8_t* codes, int64_t count, uint8_t* packed) {
    for (int64_t i = 0; i < count; i += 2) packed[i / 2] = static_cast<uint8_t>((codes[i] << 4) | codes[i + 1]);
  }
};

}  // namespace

Status nf4_quantize_scalar(const Nf4QuantizeArgs& args) { return quantize_with<ScalarLevel>(args); }

}  // namespace fastlora::cpu
