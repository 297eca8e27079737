// adamw and adamw_8bit in plain C++: the fallback of every machine.
#include <cmath>

#include "adamw_driver.h"
#include "kernels.h"

namespace fastlora::cpu {
namespace {

inline uint32_t bits_of(float f) { return load_unaligned<uint32_t>(&f); }

// One lane. std::fma is one rounding on every machine, in software where it has to be.
struct ScalarLanes {
  using Vec = float;
  static constexpr int64_t kLanes = 1;
  static Vec zero() { return 0.0f; }
  static Vec set1(float f) { return f; }
  static Vec fma(Vec a, Vec b, Vec c) { return std::fma(a, b, c); }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec sub(Vec a, Vec b) { return a - b; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec div(Vec a, Vec b) { return a / b; }
  static Vec sqrt(Vec a) { return std::sqrt(a); }
  static Vec load_floats(const float* p) { return *p; }
  static void store_floats(float* p, Vec f) { *p = f; }
  template <DType kType>
  static Vec load(const void* p) {
    return load_as_float(p, 0, kType);
  }
  static Vec load(const void* p, DType dtype, int64_t) { return load_as_float(p, 0, dtype); }
  static void store(void* p, DType dtype, Vec f, int64_t) { store_from_float(p, 0, dtype, f); }

  static Vec larger_magnitude(Vec a, Vec b) {
    const uint32_t x = bits_of(a) & 0x7fffffffu, y = bits_of(b) & 0x7fffffffu, larger = x > y ? x : y;
    return load_unaligned<float>(&larger);
  }
  static float largest(Vec a) { return a; }
  static Vec decode(const DynamicMap& map, const uint8_t* codes) { return map.values[*codes]; }
  template <bool kSigned>
  static void encode(const DynamicMap& map, Vec f, uint8_t* codes) {
    const uint32_t bits = bits_of(f);
    const auto leading = static_cast<int64_t>((bits & 0x7fffffffu) >> 16) - kMapFirstCell;
    const int64_t cell = min64(max64(leading, 0), kMapCells - 1) + (bits >> 31) * int64_t{kMapCells};
    const uint32_t entry = map.cells[cell];
    const auto code = static_cast<uint8_t>((bits & 0xffffu) > (entry >> 16) ? entry >> 8 : entry);
    *codes = !kSigned && f > 0.0f && code == 0 ? 1 : code;
  }
};

}  // namespace

Status adamw_scalar(const AdamwArgs& args) { return adamw_with<ScalarLanes>(args); }
Status adamw_8bit_scalar(const Adamw8bitArgs& args) { return adamw_8bit_with<ScalarLanes>(args); }

}  // namespace fastlora::cpu
