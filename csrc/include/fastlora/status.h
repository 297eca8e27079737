// What every kernel entry point speaks: a status out, a dtype and an instruction-set level in.
#pragma once

#include <cstdint>

namespace fastlora {

// Kernels never throw and never print. Anything but kOk means that no output was completed.
enum class Status : int32_t {
  kOk = 0,
  kBadArgument = 1,       // a size, pointer or enum the callers above should have refused
  kOutOfMemory = 2,       // a scratch buffer could not be allocated
  kUnsupportedLevel = 3,  // the forced level is not there on this machine
  kNotFinite = 4,         // nf4_quantize met NaN or Inf; the outputs are unspecified
  kDeviceError = 5,       // a launch failed on the device; cuda_error() tells
};

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Ordered: a level implies those below it, up to kAmx. kAmxEmulated is the AMX kernel with its tile
// instructions done in plain C++ (csrc/cpu/amx_tile.h), so that its logic is tested on any AVX-512 machine.
enum class Isa : int32_t {
  kScalar = 0,
  kAvx2 = 1,        // AVX2, FMA, F16C
  kAvx512 = 2,      // AVX-512 F BW DQ VL VNNI
  kAvx512Bf16 = 3,  // and AVX512_BF16
  kAmx = 4,         // and AMX-TILE, AMX-BF16
  kAmxEmulated = 5,
};
inline constexpr int32_t kIsaCount = 6;

}  // namespace fastlora
