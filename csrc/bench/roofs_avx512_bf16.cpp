// The bfloat16 dot product of AVX-512: one operand in registers, the other streamed from L2, as in a GEMM.
#include <immintrin.h>

#include "roofs.h"

namespace fastlora::bench {

float bf16_dot_avx512_bf16(int64_t passes, const void* data, size_t bytes, double* flops) {
  constexpr int kRows = 5, kPanels = 4;  // 20 sums, 5 + 4 operands: 29 of 32 registers
  const char* p = static_cast<const char*>(data);
  __m512bh a[kRows];
  __m512 s[kRows][kPanels];
  for (int i = 0; i < kRows; ++i) {
    a[i] = (__m512bh)_mm512_loadu_si512(p + 64 * i);
    for (int j = 0; j < kPanels; ++j) s[i][j] = _mm512_setzero_ps();
  }
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (size_t at = 0; at < bytes; at += 64 * kPanels) {
      for (int j = 0; j < kPanels; ++j) {
        const __m512bh b = (__m512bh)_mm512_load_si512(p + at + 64 * j);
        for (int i = 0; i < kRows; ++i) s[i][j] = _mm512_dpbf16_ps(s[i][j], a[i], b);
      }
    }
  }
  __m512 all = _mm512_setzero_ps();
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kPanels; ++j) all = _mm512_add_ps(all, s[i][j]);
  }
  *flops = 64.0 * kRows * static_cast<double>(bytes / 64) * static_cast<double>(passes);
  return _mm512_cvtss_f32(all);
}

}  // namespace fastlora::bench
