// The roofs of AVX-512 without bfloat16.
#include <immintrin.h>

#include "roofs.h"

namespace fastlora::bench {

uint64_t read_avx512(const void* data, size_t bytes) {
  const __m512i* p = static_cast<const __m512i*>(data);
  __m512i s[8] = {};
  for (size_t i = 0; i < bytes / 64; i += 8) {
    for (size_t j = 0; j < 8; ++j) s[j] = _mm512_xor_si512(s[j], _mm512_load_si512(p + i + j));
  }
  for (size_t j = 1; j < 8; ++j) s[0] = _mm512_xor_si512(s[0], s[j]);
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(s[0]));
}

void copy_streaming_avx512(void* to, const void* from, size_t bytes) {
  const __m512i* p = static_cast<const __m512i*>(from);
  __m512i* q = static_cast<__m512i*>(to);
  for (size_t i = 0; i < bytes / 64; i += 4) {
    for (size_t j = 0; j < 4; ++j) _mm512_stream_si512(q + i + j, _mm512_load_si512(p + i + j));
  }
  _mm_sfence();
}

float fma_avx512(int64_t steps, const float* data, double* flops) {
  constexpr int kChains = 16;
  const __m512 factor = _mm512_mul_ps(_mm512_loadu_ps(data), _mm512_set1_ps(0.5f));
  const __m512 term = _mm512_loadu_ps(data + 16);
  __m512 s[kChains];
  for (int j = 0; j < kChains; ++j) s[j] = _mm512_loadu_ps(data + 16 * j);
  for (int64_t i = 0; i < steps; ++i) {
    for (int j = 0; j < kChains; ++j) s[j] = _mm512_fmadd_ps(s[j], factor, term);
  }
  for (int j = 1; j < kChains; ++j) s[0] = _mm512_add_ps(s[0], s[j]);
  *flops = 2.0 * 16 * kChains * static_cast<double>(steps);
  return _mm512_cvtss_f32(s[0]);
}

}  // namespace fastlora::bench
