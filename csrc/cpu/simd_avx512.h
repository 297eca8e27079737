// AVX-512 building blocks shared by the wide levels: conversions, transposes, scales. Included only by files
// compiled with AVX-512 flags; private to each (see gemm_driver.h).
#pragma once

#include <immintrin.h>

#include "numeric.h"

namespace fastlora::cpu {
namespace {

inline __mmask16 mask16(int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << max64(count, 0)) - 1u);
}
inline __mmask32 mask32(int64_t count) {
  return count >= 32 ? static_cast<__mmask32>(~0u) : static_cast<__mmask32>((1u << max64(count, 0)) - 1u);
}
inline __mmask64 mask64(int64_t count) { return count >= 64 ? ~0ull : (1ull << max64(count, 0)) - 1ull; }

// Up to 16 elements as float32, zeros past `mask`; never reads past it.
inline __m512 load16(const void* p, DType dtype, __mmask16 mask) {
  if (dtype == DType::kFloat32) return _mm512_maskz_loadu_ps(mask, p);
  const __m256i h = _mm256_maskz_loadu_epi16(mask, p);
  if (dtype == DType::kFloat16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

// Round to nearest even in integers, NaN kept quiet: the same bits as float_to_bf16, subnormals included
// (the vcvtneps2bf16 instruction would flush them).
inline __m256i to_bf16(__m512 f) {
  const __m512i bits = _mm512_castps_si512(f);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, quiet));
}

inline void store16(void* p, DType dtype, __m512 f, __mmask16 mask) {
  if (dtype == DType::kFloat32) {
    _mm512_mask_storeu_ps(p, mask, f);
  } else {
    const __m256i h =
        dtype == DType::kBFloat16 ? to_bf16(f) : _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(p, mask, h);
  }
}

inline void load_row_f32(const void* src, DType dtype, int64_t count, float scale, float* dst) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = mask16(count - i);
    const __m512 f = load16(element_ptr(src, i, dtype), dtype, mask);
    _mm512_mask_storeu_ps(dst + i, mask, _mm512_mul_ps(f, _mm512_set1_ps(scale)));
  }
}

inline void store_row_f32(const float* src, int64_t count, DType dtype, void* dst) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = mask16(count - i);
    store16(element_ptr(dst, i, dtype), dtype, _mm512_maskz_loadu_ps(mask, src + i), mask);
  }
}

// absmax of blocks [first, first + count), the same bits as block_absmax. Double-quantised, 32 at a time: the map
// is odd but for its last value, 1, so 128 magnitudes in two planes of words, 4 registers each, hold the rest of
// it. A gather would take as long as 7 of the decode kernels' look-ups.
inline void decode_absmax_row(const Nf4Scales& scales, const float* map, int64_t first, int64_t count,
                              float* out) {
  if (scales.nested == nullptr) {
    std::memcpy(out, scales.codes + first * 4, static_cast<size_t>(count) * 4);
    return;
  }
  if (count < 8) {  // the setting up costs as much as some of these
    for (int64_t b = 0; b < count; ++b) out[b] = block_absmax(scales, map, first + b);
    return;
  }
  const uint16_t* planes = nf4_dynamic_map_planes();
  __m512i plane[2][4];
  for (int p = 0; p < 2; ++p) {
    for (int q = 0; q < 4; ++q) plane[p][q] = _mm512_load_si512(planes + p * 128 + q * 32);
  }
  alignas(64) static constexpr uint16_t kJoin[64] = {
      // words of low and high alternately: dwords in order
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i join[2] = {_mm512_load_si512(kJoin), _mm512_load_si512(kJoin + 32)};
  const __m512 offset = _mm512_set1_ps(load_unaligned<float>(scales.nested));
  for (int64_t b = first; b < first + count;) {
    const int64_t group = b / kNestedBlocksize;
    const int64_t stop = min64(first + count, (group + 1) * kNestedBlocksize);
    const __m512 scale = _mm512_set1_ps(load_unaligned<float>(scales.nested + (1 + group) * 4));
    for (; b < stop; b += 32) {
      const __mmask32 mask = mask32(stop - b);
      const __m512i code = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, scales.codes + b));
      const __m512i from_zero = _mm512_sub_epi16(code, _mm512_set1_epi16(127));
      const __m512i index = _mm512_abs_epi16(from_zero);  // 128, that is code 255, finds the 0 of index 0
      const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
      const __mmask32 last = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
      __m512i word[2];
      for (int p = 0; p < 2; ++p) {
        word[p] = _mm512_mask_blend_epi16(upper, _mm512_permutex2var_epi16(plane[p][0], index, plane[p][1]),
                                          _mm512_permutex2var_epi16(plane[p][2], index, plane[p][3]));
      }
      word[1] = _mm512_or_si512(word[1], _mm512_and_si512(from_zero, _mm512_set1_epi16(-0x8000)));  // the sign
      word[1] = _mm512_mask_mov_epi16(word[1], last, _mm512_set1_epi16(0x3f80));
      for (int h = 0; h < 2; ++h) {
        const __m512 value = _mm512_castsi512_ps(_mm512_permutex2var_epi16(word[0], join[h], word[1]));
        _mm512_mask_storeu_ps(out + (b - first) + 16 * h, static_cast<__mmask16>(mask >> (16 * h)),
                              _mm512_add_ps(_mm512_mul_ps(value, scale), offset));
      }
    }
    b = stop;
  }
}

// rows[i][j] -> rows[j][i], 32-bit elements.
inline void transpose16(__m512i (&rows)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i ab_lo = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    const __m512i ab_hi = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    const __m512i cd_lo = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
    const __m512i cd_hi = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    t[i] = _mm512_unpacklo_epi64(ab_lo, cd_lo);
    t[i + 1] = _mm512_unpackhi_epi64(ab_lo, cd_lo);
    t[i + 2] = _mm512_unpacklo_epi64(ab_hi, cd_hi);
    t[i + 3] = _mm512_unpackhi_epi64(ab_hi, cd_hi);
  }
  // t[4g + c] holds, in 128-bit lane L, column 4L + c of rows 4g .. 4g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i even01 = _mm512_shuffle_i32x4(t[c], t[4 + c], 0x88);  // lanes 0, 2 of both
    const __m512i odd01 = _mm512_shuffle_i32x4(t[c], t[4 + c], 0xdd);   // lanes 1, 3
    const __m512i even23 = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    rows[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    rows[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
}

// block[j][i] = c[i][j] for 32 rows i and 16 columns j.
inline void transpose_strip32(const float* c, int64_t ldc, float (*block)[32]) {
  for (int half = 0; half < 2; ++half) {
    __m512i rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(c + (half * 16 + i) * ldc);
    transpose16(rows);
    for (int j = 0; j < 16; ++j) _mm512_store_si512(block[j] + half * 16, rows[j]);
  }
}

}  // namespace
}  // namespace fastlora::cpu
