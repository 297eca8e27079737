// The GEMM route for bfloat16 x with AVX-512 BF16: two products a lane and step, float32 accumulation.
#include "level_avx512_bf16.h"

namespace fastlora::cpu {
namespace {

struct Avx512Bf16 : Bf16Level {
  static constexpr int64_t kGroup = 3;         // 8 rows x 3 panels: 24 accumulators
  static constexpr int64_t kStripBlocks = 8;   // 256 columns: a strip of 16 KiB
  static constexpr int64_t kPanelBlocks = 4;   // 128 rows of W: 32 KiB of panels, 12 KiB a group
  static constexpr int64_t kForwardRows = 96;  // with k up to 4608 in one packed block
  static constexpr int64_t kBackwardRows = 128;
  static constexpr int64_t kPackedBytes = 864 << 10;

  template <int kRows, int kPanels>
  static void micro(const uint8_t* strip, const uint8_t* panels, int64_t blocks, float* c, int64_t ldc,
                    bool accumulate) {
    // A mask instead of a branch: with one, GCC keeps the accumulators on the stack.
    const __mmask16 keep = accumulate ? 0xffff : 0;
    __m512 acc[kRows][kPanels];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) acc[i][p] = _mm512_maskz_loadu_ps(keep, c + i * ldc + p * 16);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      for (int t = 0; t < 16; ++t) {
        __m512bh columns[kPanels];
        for (int p = 0; p < kPanels; ++p) {
          columns[p] = reinterpret_cast<__m512bh>(
              _mm512_load_si512(panels + b * kPanels * kTileBytes + p * kTileBytes + t * 64));
        }
        for (int i = 0; i < kRows; ++i) {
          const auto a = reinterpret_cast<__m512bh>(
              _mm512_set1_epi32(load_unaligned<int32_t>(strip + b * kStripRows * 64 + i * 64 + t * 4)));
          for (int p = 0; p < kPanels; ++p) acc[i][p] = _mm512_dpbf16_ps(acc[i][p], a, columns[p]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) _mm512_storeu_ps(c + i * ldc + p * 16, acc[i][p]);
    }
  }

  static void multiply(const uint8_t* strip, const uint8_t* panels, int64_t width, int64_t blocks, float* c,
                       int64_t ldc, int64_t rows, bool accumulate) {
    for (int64_t i = 0; i < rows; i += width == 1 ? 16 : 8) {
      const uint8_t* from = strip + i * 64;
      float* to = c + i * ldc;
      if (width == 3) {
        micro<8, 3>(from, panels, blocks, to, ldc, accumulate);
      } else if (width == 2) {
        micro<8, 2>(from, panels, blocks, to, ldc, accumulate);
      } else {
        micro<16, 1>(from, panels, blocks, to, ldc, accumulate);
      }
    }
  }
};

}  // namespace

Status nf4_linear_avx512_bf16(const Nf4LinearArgs& args) { return gemm_linear<Avx512Bf16>(args); }

Status nf4_linear_grad_input_avx512_bf16(const Nf4LinearGradInputArgs& args) {
  return gemm_grad_input<Avx512Bf16>(args);
}

}  // namespace fastlora::cpu
