// The GEMM route in float32 with AVX2 and FMA: every dtype of x, exact products, float32 accumulation.
#include <immintrin.h>

#include "gemm_driver.h"
#include "lanes_avx2.h"
#include "segmented_gemm.h"

namespace fastlora::cpu {
namespace {

// What reads and writes rows goes by whole vectors; the tail goes element by element, so that nothing is touched
// past `count`.
struct Avx2Float {
  using T = float;
  static constexpr int64_t kPerItem = 1;
  static constexpr int64_t kRun = 64;  // 32 packed bytes: eight look-ups of 8 weights
  static constexpr int64_t kStripRows = 24;
  static constexpr int64_t kGroup = 1;        // 6 rows x 1 panel: 12 accumulators of 8 lanes
  static constexpr int64_t kStripBlocks = 8;  // 128 columns: a strip of 12 KiB
  static constexpr int64_t kPanelBlocks = 8;  // 128 rows of W: 32 KiB of panels, 8 KiB each
  static constexpr int64_t kForwardRows = 128;
  static constexpr int64_t kBackwardRows = 120;
  static constexpr int64_t kPackedBytes = 512 << 10;
  static constexpr int64_t kAccumulatorBytes = 256 << 10;
  static constexpr bool kOverlap = false, kResidentC = false;

  // Nibble c of dword i is column 8i + (c ^ 1): the even column is in the high nibble.
  static constexpr int64_t order(int64_t p) { return 8 * (p % 8) + ((p / 8) ^ 1); }
  static constexpr int64_t column_of(int64_t p) { return order(p); }
  static float from_float(float f) { return f; }
  static void begin() {}
  static void end() {}

  static void load_row(const void* src, DType dtype, int64_t count, float* dst) {
    load_scaled_row(src, dtype, count, 1.0f, dst);
  }

  static void load_scaled_row(const void* src, DType dtype, int64_t count, float scale, float* dst) {
    const __m256 factor = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(dst + i, _mm256_mul_ps(load8(element_ptr(src, i, dtype), dtype), factor));
    }
    for (; i < count; ++i) dst[i] = load_as_float(src, i, dtype) * scale;
  }

  static void store_row(const float* src, int64_t count, DType dtype, void* dst) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) store8(element_ptr(dst, i, dtype), dtype, _mm256_loadu_ps(src + i));
    for (; i < count; ++i) store_from_float(dst, i, dtype, src[i]);
  }

  static void decode_absmax(const Nf4Scales& scales, const float* map, int64_t first, int64_t count, float* out) {
    for (int64_t b = 0; b < count; ++b) out[b] = block_absmax(scales, map, first + b);
  }

  static void transpose_strip(const float* c, int64_t ldc, float (*block)[kStripRows]) {
    for (int64_t i = 0; i < kStripRows; ++i) {
      for (int64_t j = 0; j < kPanel; ++j) block[j][i] = c[i * ldc + j];
    }
  }

  static void pack_run(const float (*piece)[kRun], uint8_t* out, int64_t stride) {
    for (int64_t p = 0; p < kRun; ++p) {
      auto* item = reinterpret_cast<float*>(out + p / 16 * stride + p % 16 * 64);
      for (int64_t j = 0; j < kPanel; ++j) item[j] = piece[j][order(p)];
    }
  }

  static void restore_columns(const float* c, float* out) {
    for (int64_t p = 0; p < kRun; ++p) out[order(p)] = c[p];
  }

  // The table of 16 is two of 8: `vpermps` reads three bits of a dword, and the fourth, moved to the sign,
  // chooses the half.
  static void dequantize_run(const Run& run, uint8_t* const* out) {
    alignas(32) uint8_t tail[32] = {};
    const uint8_t* bytes = run.bytes;
    if (run.count < 32) {
      std::memcpy(tail, bytes, static_cast<size_t>(run.count));
      bytes = tail;
    }
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    const __m256 low = _mm256_loadu_ps(kNf4Codes), high = _mm256_loadu_ps(kNf4Codes + 8);
    const bool one_block = run.phase + kRun <= int64_t{1} << run.shift;
    const __m256 scales = _mm256_loadu_ps(run.absmax);  // a run meets three blocks at most
    const __m256 block_scale = _mm256_set1_ps(run.absmax[0]);
    const __m256i lane8 = _mm256_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56);
    const __m128i shift = _mm_cvtsi32_si128(run.shift);
    for (int c = 0; c < 8; ++c) {
      const __m256i index = _mm256_srli_epi32(words, 4 * c);
      const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * c));
      const __m256 value =
          _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), sign);
      __m256 scale = block_scale;
      if (!one_block) {
        const __m256i place = _mm256_add_epi32(lane8, _mm256_set1_epi32(run.phase + (c ^ 1)));
        scale = _mm256_permutevar8x32_ps(scales, _mm256_srl_epi32(place, shift));
      }
      _mm256_store_ps(reinterpret_cast<float*>(out[c / 2]) + c % 2 * 8, _mm256_mul_ps(value, scale));
    }
  }

  static void multiply(const uint8_t* strip, const uint8_t* panels, int64_t, int64_t blocks, float* c, int64_t ldc,
                       int64_t rows, Visit visit, NoFiller&) {
    constexpr int kRows = 6;
    const bool accumulate = visit.from != FromC::kZero;
    for (int64_t i0 = 0; i0 < rows; i0 += kRows) {
      __m256 acc[kRows][2];
      float* to = c + i0 * ldc;
      for (int i = 0; i < kRows; ++i) {
        for (int h = 0; h < 2; ++h) {
          acc[i][h] = accumulate ? _mm256_loadu_ps(to + i * ldc + h * 8) : _mm256_setzero_ps();
        }
      }
      for (int64_t b = 0; b < blocks; ++b) {
        for (int t = 0; t < 16; ++t) {
          const auto* item = reinterpret_cast<const float*>(panels + b * kTileBytes + t * 64);
          const __m256 left = _mm256_load_ps(item), right = _mm256_load_ps(item + 8);
          for (int i = 0; i < kRows; ++i) {
            const __m256 a = _mm256_set1_ps(load_unaligned<float>(strip + (b * kStripRows + i0 + i) * 64 + t * 4));
            acc[i][0] = _mm256_fmadd_ps(a, left, acc[i][0]);
            acc[i][1] = _mm256_fmadd_ps(a, right, acc[i][1]);
          }
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int h = 0; h < 2; ++h) _mm256_storeu_ps(to + i * ldc + h * 8, acc[i][h]);
      }
    }
  }
};

}  // namespace

Status nf4_linear_avx2(const Nf4LinearArgs& args) { return gemm_linear<Avx2Float>(args); }

Status nf4_linear_grad_input_avx2(const Nf4LinearGradInputArgs& args) { return gemm_grad_input<Avx2Float>(args); }

Status nf4_multi_lora_linear_avx2(const Nf4MultiLoraLinearArgs& args, const SegmentedJob& job) {
  return gemm_multi_linear<Avx2Float, Avx2Lanes>(args, job);
}

Status nf4_multi_lora_grad_input_avx2(const Nf4MultiLoraGradInputArgs& args, const SegmentedJob& job) {
  return gemm_multi_grad_input<Avx2Float, Avx2Lanes>(args, job);
}

Status segmented_shrink_gemm_avx2(const ShrinkArgs& args) { return gemm_shrink<Avx2Float>(args); }

}  // namespace fastlora::cpu
