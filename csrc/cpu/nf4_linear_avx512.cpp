// The GEMM route in float32 with AVX-512: every dtype of x, exact products, float32 accumulation.
#include "lanes_avx512.h"
#include "multiply_avx512.h"
#include "segmented_gemm.h"

namespace fastlora::cpu {
namespace {

struct FloatItems {
  using Vector = __m512;
  static Vector load(const uint8_t* p) { return _mm512_load_ps(p); }
  static Vector broadcast(const uint8_t* p) { return _mm512_set1_ps(load_unaligned<float>(p)); }
  static __m512 multiply_add(__m512 acc, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, acc); }
};

struct Avx512Float : BroadcastMultiply<FloatItems, 32> {
  using T = float;
  static constexpr int64_t kPerItem = 1;
  static constexpr int64_t kRun = 128;  // 64 packed bytes: eight look-ups of 16 weights
  static constexpr int64_t kStripRows = 32;
  static constexpr int64_t kGroup = 3;        // 8 rows x 3 panels: 24 accumulators
  static constexpr int64_t kStripBlocks = 8;  // 128 columns: a strip of 16 KiB
  static constexpr int64_t kPanelBlocks = 4;  // 64 rows of W: 32 KiB of panels, 12 KiB a group
  static constexpr int64_t kForwardRows = 144;
  static constexpr int64_t kBackwardRows = 128;
  static constexpr int64_t kPackedBytes = 768 << 10;
  static constexpr int64_t kAccumulatorBytes = 512 << 10;
  static constexpr bool kOverlap = false;

  // `vpermps` reads the low four bits of a dword, so eight nibbles of one dword are eight look-ups with no
  // masks: the c-th yields columns 8i + (c ^ 1), because the even column is in the high nibble.
  static constexpr int64_t order(int64_t p) { return 8 * (p % 16) + ((p / 16) ^ 1); }
  static constexpr int64_t column_of(int64_t p) { return order(p); }
  static float from_float(float f) { return f; }
  static void begin() {}
  static void end() {}

  static void load_row(const void* src, DType dtype, int64_t count, float* dst) {
    load_row_f32(src, dtype, count, 1.0f, dst);
  }
  static void load_scaled_row(const void* src, DType dtype, int64_t count, float scale, float* dst) {
    load_row_f32(src, dtype, count, scale, dst);
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

  // Natural 16x16 transposes: column e of the run is item e / 8 of vector (e % 8) ^ 1.
  static void pack_run(const float (*piece)[kRun], uint8_t* out, int64_t stride) {
    for (int64_t e0 = 0; e0 < kRun; e0 += 16) {
      __m512i rows[16];
      for (int j = 0; j < 16; ++j) rows[j] = _mm512_load_si512(piece[j] + e0);
      transpose16(rows);
      for (int e = 0; e < 16; ++e) {
        _mm512_store_si512(out + ((e % 8) ^ 1) * stride + ((e0 + e) / 8) * 64, rows[e]);
      }
    }
  }

  // ranks[q][i], q in 0..15 and i in 0..31, to 32 rows of 16 ranks.
  static void transpose_ranks(const float (&ranks)[16][32], uint8_t* out) {
    for (int h = 0; h < 2; ++h) {
      __m512i rows[16];
      for (int q = 0; q < 16; ++q) rows[q] = _mm512_load_si512(ranks[q] + 16 * h);
      transpose16(rows);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(out + (16 * h + i) * 64, rows[i]);
    }
  }

  static void dequantize_run(const Run& run, uint8_t* const* out) {
    const __m512 codes = _mm512_loadu_ps(kNf4Codes);
    const __m512i words = _mm512_maskz_loadu_epi8(mask64(run.count), run.bytes);
    const __m512i lane8 =
        _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 3);
    if (run.shift >= 6 && run.phase % 64 == 0) {  // two halves, one absmax each
      const __m512 first = _mm512_set1_ps(run.absmax[run.phase >> run.shift]);
      const __m512 second = _mm512_set1_ps(run.absmax[(run.phase + 64) >> run.shift]);
      const __m512 scale = _mm512_mask_blend_ps(0xff00, first, second);
      for (int c = 0; c < 8; ++c) {
        const __m512 value = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * c), codes);
        _mm512_store_ps(out[c], _mm512_mul_ps(value, scale));
      }
      return;
    }
    const __m512 scales = _mm512_loadu_ps(run.absmax);  // at most 5 of them are used
    const __m128i shift = _mm_cvtsi32_si128(run.shift);
    const bool whole_lanes = run.phase % 8 == 0;  // no block ends inside a lane's eight columns
    __m512 scale = _mm512_setzero_ps();
    for (int c = 0; c < 8; ++c) {
      if (c == 0 || !whole_lanes) {
        const __m512i place = _mm512_add_epi32(lane8, _mm512_set1_epi32(run.phase + (whole_lanes ? 0 : c ^ 1)));
        scale = _mm512_permutexvar_ps(_mm512_srl_epi32(place, shift), scales);
      }
      const __m512 value = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * c), codes);
      _mm512_store_ps(out[c], _mm512_mul_ps(value, scale));
    }
  }

  // The inverse of `order`: interleave eight vectors by ones, twos and fours.
  static void restore_columns(const float* c, float* out) {
    __m512i w[8], t[8];
    for (int q = 0; q < 8; ++q) w[q] = _mm512_load_si512(c + (q ^ 1) * 16);
    const __m512i lo32 = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i hi32 = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const __m512i lo64 = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i hi64 = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    const __m512i lo128 = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i hi128 = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int q = 0; q < 4; ++q) {  // t[2q], t[2q + 1]: pairs of columns (2q, 2q + 1), items 0-7 and 8-15
      t[2 * q] = _mm512_permutex2var_epi32(w[2 * q], lo32, w[2 * q + 1]);
      t[2 * q + 1] = _mm512_permutex2var_epi32(w[2 * q], hi32, w[2 * q + 1]);
    }
    for (int h = 0; h < 2; ++h) {  // fours: columns 0-3 from t[h], t[2 + h]; columns 4-7 from t[4 + h], t[6 + h]
      const __m512i left_lo = _mm512_permutex2var_epi64(t[h], lo64, t[2 + h]);
      const __m512i left_hi = _mm512_permutex2var_epi64(t[h], hi64, t[2 + h]);
      const __m512i right_lo = _mm512_permutex2var_epi64(t[4 + h], lo64, t[6 + h]);
      const __m512i right_hi = _mm512_permutex2var_epi64(t[4 + h], hi64, t[6 + h]);
      float* to = out + h * 64;
      _mm512_store_si512(to, _mm512_permutex2var_epi64(left_lo, lo128, right_lo));
      _mm512_store_si512(to + 16, _mm512_permutex2var_epi64(left_lo, hi128, right_lo));
      _mm512_store_si512(to + 32, _mm512_permutex2var_epi64(left_hi, lo128, right_hi));
      _mm512_store_si512(to + 48, _mm512_permutex2var_epi64(left_hi, hi128, right_hi));
    }
  }
};

}  // namespace

Status nf4_linear_avx512(const Nf4LinearArgs& args) { return gemm_linear<Avx512Float>(args); }

Status nf4_linear_grad_input_avx512(const Nf4LinearGradInputArgs& args) {
  return gemm_grad_input<Avx512Float>(args);
}

Status nf4_multi_lora_linear_avx512(const Nf4MultiLoraLinearArgs& args, const SegmentedJob& job) {
  return gemm_multi_linear<Avx512Float, Avx512Lanes>(args, job);
}

Status nf4_multi_lora_grad_input_avx512(const Nf4MultiLoraGradInputArgs& args, const SegmentedJob& job) {
  return gemm_multi_grad_input<Avx512Float, Avx512Lanes>(args, job);
}

Status segmented_shrink_gemm_avx512(const ShrinkArgs& args) { return gemm_shrink<Avx512Float>(args); }

}  // namespace fastlora::cpu
