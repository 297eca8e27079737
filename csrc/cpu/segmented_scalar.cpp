// The products of many adapters in plain C++: a vector of one lane.
#include "segmented_products.h"

namespace fastlora::cpu {
namespace {

struct Scalar {
  using Vec = float;
  static constexpr int64_t kLanes = 1;
  static constexpr int64_t kVecs = 4;
  static float zero() { return 0.0f; }
  static float set1(float f) { return f; }
  static float fma(float a, float b, float c) { return a * b + c; }
  static float add(float a, float b) { return a + b; }
  static float mul(float a, float b) { return a * b; }
  static float sum(float a) { return a; }
  static float load_floats(const float* p) { return *p; }
  static void store_floats(float* p, float f) { *p = f; }
  template <DType kType>
  static float load(const void* p) {
    return load_as_float(p, 0, kType);
  }
  static float load(const void* p, DType dtype, int64_t) { return load_as_float(p, 0, dtype); }
  static void store(void* p, DType dtype, float f, int64_t) { store_from_float(p, 0, dtype, f); }
};

}  // namespace

Status segmented_shrink_scalar(const ShrinkArgs& args) { return Segmented<Scalar>::shrink(args); }
Status segmented_expand_scalar(const ExpandArgs& args) { return Segmented<Scalar>::expand(args); }
Status segmented_outer_scalar(const OuterArgs& args) { return Segmented<Scalar>::outer(args); }

}  // namespace fastlora::cpu
