// Float32 arithmetic on eight lanes of AVX2 and FMA, as segmented_products.h takes it. Private to each file that
// includes it.
#pragma once

#include "simd_avx2.h"

namespace fastlora::cpu {
namespace {

struct Avx2Lanes {
  using Vec = __m256;
  static constexpr int64_t kLanes = 8;
  static constexpr int64_t kVecs = 2;
  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set1(float f) { return _mm256_set1_ps(f); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static float sum(Vec a) { return sum8(a); }
  static Vec load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store_floats(float* p, Vec f) { _mm256_storeu_ps(p, f); }
  template <DType kType>
  static Vec load(const void* p) {
    return load8(p, kType);
  }
  static Vec load(const void* p, DType dtype, int64_t count) {
    if (count >= kLanes) return load8(p, dtype);
    alignas(32) float values[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = load_as_float(p, i, dtype);
    return _mm256_load_ps(values);
  }
  static void store(void* p, DType dtype, Vec f, int64_t count) {
    if (count >= kLanes) return store8(p, dtype, f);
    alignas(32) float values[kLanes];
    _mm256_store_ps(values, f);
    for (int64_t i = 0; i < count; ++i) store_from_float(p, i, dtype, values[i]);
  }
};

}  // namespace
}  // namespace fastlora::cpu
