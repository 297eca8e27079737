// nf4_dequantize in plain C++: the fallback of every machine.
#include "fastlora/nf4.h"
#include "kernels.h"
#include "nf4_dequantize_driver.h"

namespace fastlora::cpu {
namespace {

struct ScalarLevel {
  static constexpr bool kStreams = false;

  template <DType D, bool kStream>
  void decode(const uint8_t* packed, int64_t count, float absmax, void* out) {
    for (int64_t i = 0; i < count; ++i) {
      const int code = i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
      store_from_float(out, i, D, kNf4Codes[code] * absmax);
    }
  }

  template <DType D>
  void decode_bytes(const uint8_t* codes, int64_t count, float absmax, void* out) {
    for (int64_t i = 0; i < count; ++i) store_from_float(out, i, D, kNf4Codes[codes[i]] * absmax);
  }

  void unpack(const uint8_t* packed, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) codes[i] = i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
  }
};

}  // namespace

Status nf4_dequantize_scalar(const Nf4DequantizeArgs& args) { return dequantize_with<ScalarLevel>(args); }

}  // namespace fastlora::cpu
