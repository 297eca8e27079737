// The roofs of AVX2 and FMA.
#include <immintrin.h>

#include "roofs.h"

namespace fastlora::bench {

uint64_t read_avx2(const void* data, size_t bytes) {
  const __m256i* p = static_cast<const __m256i*>(data);
  __m256i s[8] = {};
  for (size_t i = 0; i < bytes / 32; i += 8) {
    for (size_t j = 0; j < 8; ++j) s[j] = _mm256_xor_si256(s[j], _mm256_load_si256(p + i + j));
  }
  for (size_t j = 1; j < 8; ++j) s[0] = _mm256_xor_si256(s[0], s[j]);
  return static_cast<uint64_t>(_mm256_extract_epi64(s[0], 0)) ^
         static_cast<uint64_t>(_mm256_extract_epi64(s[0], 2));
}

void copy_streaming_avx2(void* to, const void* from, size_t bytes) {
  const __m256i* p = static_cast<const __m256i*>(from);
  __m256i* q = static_cast<__m256i*>(to);
  for (size_t i = 0; i < bytes / 32; i += 4) {
    for (size_t j = 0; j < 4; ++j) _mm256_stream_si256(q + i + j, _mm256_load_si256(p + i + j));
  }
  _mm_sfence();
}

float fma_avx2(int64_t steps, const float* data, double* flops) {
  constexpr int kChains = 12;  // latency 4 times two ports, and a spare; with two operands they fit 16 registers
  // Below 1 in magnitude, so that the sums settle at ordinary numbers.
  const __m256 factor = _mm256_mul_ps(_mm256_loadu_ps(data), _mm256_set1_ps(0.5f));
  const __m256 term = _mm256_loadu_ps(data + 8);
  __m256 s[kChains];
  for (int j = 0; j < kChains; ++j) s[j] = _mm256_loadu_ps(data + 8 * j);
  for (int64_t i = 0; i < steps; ++i) {
    for (int j = 0; j < kChains; ++j) s[j] = _mm256_fmadd_ps(s[j], factor, term);
  }
  for (int j = 1; j < kChains; ++j) s[0] = _mm256_add_ps(s[0], s[j]);
  *flops = 2.0 * 8 * kChains * static_cast<double>(steps);
  return _mm256_cvtss_f32(s[0]);
}

}  // namespace fastlora::bench
