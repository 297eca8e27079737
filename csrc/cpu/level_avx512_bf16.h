// What the bfloat16 levels share: the look-up, the packing, the orders. nf4_linear_avx512_bf16.cpp multiplies
// with vdpbf16ps, nf4_linear_amx.cpp with tiles. Private to each file that includes it.
#pragma once

#include "gemm_driver.h"
#include "simd_avx512.h"

namespace fastlora::cpu {
namespace {

alignas(64) constexpr uint16_t kWordColumns[32] = {0,  4,  8,  12,  16,  20,  24,  28,  32,  36, 40,
                                                   44, 48, 52, 56,  60,  64,  68,  72,  76,  80, 84,
                                                   88, 92, 96, 100, 104, 108, 112, 116, 120, 124};

struct Bf16Level {
  using T = uint16_t;
  static constexpr int64_t kPerItem = 2;
  static constexpr int64_t kRun = 128;  // 64 packed bytes: four look-ups of 32 weights
  static constexpr int64_t kStripRows = 32;
  static constexpr int64_t kAccumulatorBytes = 512 << 10;
  static constexpr bool kOverlap = true;

  // `vpermw` reads the low five bits of a word: w, w >> 4, w >> 8, w >> 12 are four look-ups. The c-th yields
  // columns 4i + (c ^ 1).
  static constexpr int64_t order(int64_t p) { return 4 * (p % 32) + ((p / 32) ^ 1); }
  // Two rows interleaved with vpunpck[lh]wd: panel 2c + h, lane 4L + j comes from word 8L + 4h + j.
  static constexpr int64_t column_of(int64_t p) {
    const int64_t c = p / 32, h = p / 16 % 2, lane = p % 16 / 4, j = p % 4;
    return 4 * (8 * lane + 4 * h + j) + (c ^ 1);
  }

  static uint16_t from_float(float f) { return float_to_bf16(f); }
  static void begin() {}
  static void end() {}

  static void load_row(const void* src, DType dtype, int64_t count, uint16_t* dst) {
    if (dtype == DType::kBFloat16) {
      std::memcpy(dst, src, static_cast<size_t>(count) * 2);
    } else {
      load_scaled_row(src, dtype, count, 1.0f, dst);
    }
  }
  static void load_scaled_row(const void* src, DType dtype, int64_t count, float scale, uint16_t* dst) {
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 mask = mask16(count - i);
      const __m512 f = load16(element_ptr(src, i, dtype), dtype, mask);
      _mm256_mask_storeu_epi16(dst + i, mask, to_bf16(_mm512_mul_ps(f, _mm512_set1_ps(scale))));
    }
  }
  static void store_row(const float* src, int64_t count, DType dtype, void* dst) {
    store_row_f32(src, count, dtype, dst);
  }
  static void decode_absmax(const Nf4Scales& scales, const float* map, int64_t first, int64_t count, float* out) {
    decode_absmax_row(scales, map, first, count, out);
  }
  static void transpose_strip(const float* c, int64_t ldc, float (*block)[32]) {
    transpose_strip32(c, ldc, block);
  }

  // A run in the order of the look-ups: even and odd pairs of columns apart, then their high and low halves.
  static void permute_run(const uint16_t* piece, uint8_t* out, int64_t stride) {
    const __m512i even32 = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i even16 = _mm512_srli_epi16(_mm512_load_si512(kWordColumns), 1);
    const __m512i one16 = _mm512_set1_epi16(1);
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i pick = _mm512_add_epi32(even32, _mm512_set1_epi32(odd));
      const __m512i left =
          _mm512_permutex2var_epi32(_mm512_loadu_si512(piece), pick, _mm512_loadu_si512(piece + 32));
      const __m512i right =
          _mm512_permutex2var_epi32(_mm512_loadu_si512(piece + 64), pick, _mm512_loadu_si512(piece + 96));
      const __m512i high = _mm512_permutex2var_epi16(left, _mm512_add_epi16(even16, one16), right);
      _mm512_store_si512(out + 2 * odd * stride, high);
      _mm512_store_si512(out + (2 * odd + 1) * stride, _mm512_permutex2var_epi16(left, even16, right));
    }
  }

  // Two rows as items of panels of 16 columns, in order or, permuted, in the order of two rows of W looked up.
  static void interleave(const uint16_t* even, const uint16_t* odd, bool permuted, int64_t panels,
                         uint16_t* items) {
    if (!permuted) {
      for (int64_t p = 0; p < panels; ++p) {
        const auto low =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + p * 16)));
        const auto high =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + p * 16)));
        _mm512_store_si512(items + p * 32, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
      return;
    }
    alignas(64) uint8_t a[4][64], b[4][64];
    permute_run(even, a[0], 64);
    permute_run(odd, b[0], 64);
    for (int c = 0; c < 4; ++c) {
      const __m512i x = _mm512_load_si512(a[c]), y = _mm512_load_si512(b[c]);
      _mm512_store_si512(items + 2 * c * 32, _mm512_unpacklo_epi16(x, y));
      _mm512_store_si512(items + (2 * c + 1) * 32, _mm512_unpackhi_epi16(x, y));
    }
  }

  // An item is columns e and e + 4 of a group of eight (one 128-bit lane): bring the pairs together, then
  // transpose 16x16 dwords; dword d goes to vector (d % 4) ^ 1, item d / 4.
  static void pack_run(const uint16_t (*piece)[kRun], uint8_t* out, int64_t stride) {
    const __m512i pair_up =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    for (int64_t d0 = 0; d0 < kRun / 2; d0 += 16) {
      __m512i rows[16];
      for (int j = 0; j < 16; ++j) {
        rows[j] = _mm512_shuffle_epi8(_mm512_load_si512(piece[j] + 2 * d0), pair_up);
      }
      transpose16(rows);
      for (int d = 0; d < 16; ++d) {
        _mm512_store_si512(out + ((d % 4) ^ 1) * stride + ((d0 + d) / 4) * 64, rows[d]);
      }
    }
  }

  // ranks[q][i], q and i in 0..31, to 32 rows of 32 ranks: words of two ranks interleaved, then 16x16 dwords.
  static void transpose_ranks(const uint16_t (&ranks)[32][32], uint8_t* out) {
    __m512i low[16], high[16];
    for (int q = 0; q < 16; ++q) {
      const __m512i even = _mm512_load_si512(ranks[2 * q]), odd = _mm512_load_si512(ranks[2 * q + 1]);
      low[q] = _mm512_unpacklo_epi16(even, odd);  // in 128-bit lane L, columns 8L .. 8L + 3
      high[q] = _mm512_unpackhi_epi16(even, odd);
    }
    transpose16(low);
    transpose16(high);
    for (int i = 0; i < 16; ++i) {
      uint8_t* to = out + (i / 4 * 8 + i % 4) * 64;
      _mm512_store_si512(to, low[i]);
      _mm512_store_si512(to + 4 * 64, high[i]);
    }
  }

  // Two rows of a run, in natural order, as items of the contraction over rows in the order of the look-ups.
  static void pack_pair(const uint16_t* even, const uint16_t* odd, uint8_t* const* out) {
    alignas(64) uint8_t a[4][64], b[4][64];
    permute_run(even, a[0], 64);
    permute_run(odd, b[0], 64);
    for (int c = 0; c < 4; ++c) {
      const __m512i left = _mm512_load_si512(a[c]), right = _mm512_load_si512(b[c]);
      _mm512_store_si512(out[2 * c], _mm512_unpacklo_epi16(left, right));
      _mm512_store_si512(out[2 * c + 1], _mm512_unpackhi_epi16(left, right));
    }
  }

  // The same with the columns as they are.
  static void pack_pair_in_order(const uint16_t* even, const uint16_t* odd, uint8_t* const* out) {
    alignas(64) static constexpr uint16_t kPairs[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i low = _mm512_load_si512(kPairs), high = _mm512_load_si512(kPairs + 32);
    for (int p = 0; p < kRun / 32; ++p) {
      const __m512i left = _mm512_load_si512(even + 32 * p), right = _mm512_load_si512(odd + 32 * p);
      _mm512_store_si512(out[2 * p], _mm512_permutex2var_epi16(left, low, right));
      _mm512_store_si512(out[2 * p + 1], _mm512_permutex2var_epi16(left, high, right));
    }
  }

  // Where whole runs have a simple alignment: a run's words and the table its indices are for.
  struct Look {
    __m512i words, table, more;  // more: the codes of blocks 2 and 3 (kWords)
    __m512i high;                // what goes above a nibble in each byte to name the block
    __m512i index;
  };

  template <Alignment kAlign, bool kFour = false>
  [[gnu::always_inline]] static Look look(__m512i words, const float* absmax, int32_t phase, int shift) {
    const __m512 codes = _mm512_loadu_ps(kNf4Codes);
    Look l;
    l.words = words;
    if constexpr (kAlign == Alignment::kHalves) {
      // Two halves with one absmax each: one table of 32 words, the second half's codes above the first's, and
      // bit 4 of every index says which half the word is in.
      const __m512 first = _mm512_mul_ps(codes, _mm512_set1_ps(absmax[phase >> shift]));
      const __m512 second = _mm512_mul_ps(codes, _mm512_set1_ps(absmax[(phase + 64) >> shift]));
      l.table = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
      l.more = l.table;
      l.high = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(0x10), 1);
    } else {
      // Up to three blocks (four with kFour), their borders between words: a table of 64 words, bits 4 and 5 name
      // the block.
      __m512 scaled[4];
      for (int b = 0; b < 3 + kFour; ++b) scaled[b] = _mm512_mul_ps(codes, _mm512_set1_ps(absmax[b]));
      if constexpr (!kFour) scaled[3] = scaled[2];
      l.table = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scaled[1], scaled[0]));
      l.more = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scaled[3], scaled[2]));
      const __m512i place =
          _mm512_add_epi16(_mm512_load_si512(kWordColumns), _mm512_set1_epi16(static_cast<int16_t>(phase)));
      const __m512i block = _mm512_slli_epi16(_mm512_srl_epi16(place, _mm_cvtsi32_si128(shift)), 4);
      l.high = _mm512_or_si512(block, _mm512_slli_epi16(block, 8));
    }
    return l;
  }

  template <Alignment kAlign>
  [[gnu::always_inline]] static Look look(const uint8_t* bytes, const float* absmax, int32_t phase, int shift) {
    return look<kAlign>(_mm512_loadu_si512(bytes), absmax, phase, shift);
  }

  // Indices of look-ups c = odd (as they are) and c = odd + 2 (shifted right by 8).
  [[gnu::always_inline]] static __m512i indices(const Look& l, int odd) {
    const __m512i words = odd == 0 ? l.words : _mm512_srli_epi16(l.words, 4);
    return _mm512_ternarylogic_epi32(words, _mm512_set1_epi8(0x0f), l.high, 0xea);
  }
  template <Alignment kAlign>
  [[gnu::always_inline]] static __m512i pick(const Look& l, __m512i index) {
    if constexpr (kAlign == Alignment::kHalves) return _mm512_permutexvar_epi16(index, l.table);
    return _mm512_permutex2var_epi16(l.table, index, l.more);
  }

  template <Alignment kAlign>
  [[gnu::always_inline]] static void look_up_all(const Look& l, __m512i (&values)[4]) {
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i index = indices(l, odd);
      values[odd] = pick<kAlign>(l, index);
      values[odd + 2] = pick<kAlign>(l, _mm512_srli_epi16(index, 8));
    }
  }

  // The four look-ups are made in this order, because two share a mask; each gives the values of one of c = 0..3.
  static constexpr int look_of(int quarter) { return quarter % 2 * 2 + quarter / 2; }
  template <Alignment kAlign, int kQuarter>
  [[gnu::always_inline]] static __m512i look_up(Look& l) {
    l.index = kQuarter % 2 == 0 ? indices(l, kQuarter / 2) : _mm512_srli_epi16(l.index, 8);
    return pick<kAlign>(l, l.index);
  }
  template <Alignment kAlign, int kQuarter>
  [[gnu::always_inline]] static void look_up(Look& l, uint8_t* out) {
    _mm512_store_si512(out, look_up<kAlign, kQuarter>(l));
  }
  // Two rows of W as items of the contraction over rows.
  template <Alignment kAlign, int kQuarter>
  [[gnu::always_inline]] static void look_up_pair(Look& even, Look& odd, uint8_t* low, uint8_t* high) {
    const __m512i a = look_up<kAlign, kQuarter>(even), b = look_up<kAlign, kQuarter>(odd);
    _mm512_store_si512(low, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(high, _mm512_unpackhi_epi16(a, b));
  }

  // The four look-ups of a run: values[c] holds columns 4i + (c ^ 1), code * absmax rounded once to bfloat16.
  static void look_up(const Run& run, __m512i (&values)[4]) {
    const __m512 codes = _mm512_loadu_ps(kNf4Codes);
    const __m512i words = _mm512_maskz_loadu_epi8(mask64(run.count), run.bytes);
    if (run.shift >= 6 && run.phase % 64 == 0) {
      return look_up_all<Alignment::kHalves>(look<Alignment::kHalves>(words, run.absmax, run.phase, run.shift),
                                             values);
    }
    const __m128i shift = _mm_cvtsi32_si128(run.shift);
    if (run.phase % 4 == 0 && (run.phase + 127) >> run.shift < 4) {
      return look_up_all<Alignment::kWords>(look<Alignment::kWords, true>(words, run.absmax, run.phase, run.shift),
                                            values);
    }
    const __m512 scales = _mm512_loadu_ps(run.absmax);  // at most 5 of them are used
    const __m512i lane4 = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
    for (int c = 0; c < 4; ++c) {
      const __m512i index = _mm512_srli_epi16(words, 4 * c);
      __m512 scaled[2];
      for (int h = 0; h < 2; ++h) {
        const __m256i words16 = h == 0 ? _mm512_castsi512_si256(index) : _mm512_extracti64x4_epi64(index, 1);
        const __m512 value = _mm512_permutexvar_ps(_mm512_cvtepu16_epi32(words16), codes);
        const __m512i place = _mm512_add_epi32(lane4, _mm512_set1_epi32(run.phase + 64 * h + (c ^ 1)));
        scaled[h] = _mm512_mul_ps(value, _mm512_permutexvar_ps(_mm512_srl_epi32(place, shift), scales));
      }
      values[c] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scaled[1], scaled[0]));
    }
  }

  static void dequantize_run(const Run& run, uint8_t* const* out) {
    __m512i values[4];
    look_up(run, values);
    for (int c = 0; c < 4; ++c) _mm512_store_si512(out[c], values[c]);
  }

  // Two rows of W as items of the contraction over rows.
  static void dequantize_pair(const Run& even, const Run& odd, uint8_t* const* out) {
    __m512i a[4], b[4];
    look_up(even, a);
    look_up(odd, b);
    for (int c = 0; c < 4; ++c) {
      _mm512_store_si512(out[2 * c], _mm512_unpacklo_epi16(a[c], b[c]));
      _mm512_store_si512(out[2 * c + 1], _mm512_unpackhi_epi16(a[c], b[c]));
    }
  }

  // The inverse of column_of: per half h a 4x4 transpose inside the lanes, then one of whole lanes.
  static void restore_columns(const float* c, float* out) {
    for (int h = 0; h < 2; ++h) {
      __m512 w[4], t[4], lanes[4];
      for (int q = 0; q < 4; ++q) w[q] = _mm512_load_ps(c + (2 * (q ^ 1) + h) * 16);
      t[0] = _mm512_unpacklo_ps(w[0], w[1]);
      t[1] = _mm512_unpackhi_ps(w[0], w[1]);
      t[2] = _mm512_unpacklo_ps(w[2], w[3]);
      t[3] = _mm512_unpackhi_ps(w[2], w[3]);
      for (int j = 0; j < 4; ++j) {  // lanes[j]: in lane L the four columns from 32L + 16h + 4j on
        const __m512d a = _mm512_castps_pd(t[j / 2]), b = _mm512_castps_pd(t[2 + j / 2]);
        lanes[j] = _mm512_castpd_ps(j % 2 == 0 ? _mm512_unpacklo_pd(a, b) : _mm512_unpackhi_pd(a, b));
      }
      const __m512 even01 = _mm512_shuffle_f32x4(lanes[0], lanes[1], 0x88);
      const __m512 odd01 = _mm512_shuffle_f32x4(lanes[0], lanes[1], 0xdd);
      const __m512 even23 = _mm512_shuffle_f32x4(lanes[2], lanes[3], 0x88);
      const __m512 odd23 = _mm512_shuffle_f32x4(lanes[2], lanes[3], 0xdd);
      _mm512_store_ps(out + 16 * h, _mm512_shuffle_f32x4(even01, even23, 0x88));
      _mm512_store_ps(out + 32 + 16 * h, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
      _mm512_store_ps(out + 64 + 16 * h, _mm512_shuffle_f32x4(even01, even23, 0xdd));
      _mm512_store_ps(out + 96 + 16 * h, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
    }
  }
};

}  // namespace
}  // namespace fastlora::cpu
