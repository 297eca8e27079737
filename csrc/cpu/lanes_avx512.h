// Float32 arithmetic on sixteen lanes of AVX-512, as segmented_products.h takes it. Private to each file that
// includes it.
#pragma once

#include "simd_avx512.h"

namespace fastlora::cpu {
namespace {

struct Avx512Lanes {
  using Vec = __m512;
  static constexpr int64_t kLanes = 16;
  static constexpr int64_t kVecs = 4;
  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set1(float f) { return _mm512_set1_ps(f); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static float sum(Vec a) { return _mm512_reduce_add_ps(a); }
  static Vec load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, Vec f) { _mm512_storeu_ps(p, f); }
  template <DType kType>
  static Vec load(const void* p) {
    if constexpr (kType == DType::kFloat32) return _mm512_loadu_ps(p);
    const __m256i h = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if constexpr (kType == DType::kFloat16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static Vec load(const void* p, DType dtype, int64_t count) { return load16(p, dtype, mask16(count)); }
  static void store(void* p, DType dtype, Vec f, int64_t count) { store16(p, dtype, f, mask16(count)); }
};

}  // namespace
}  // namespace fastlora::cpu
