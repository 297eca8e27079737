// The inner product of the AVX-512 levels without tiles: items of the strip broadcast, panels as vectors. Private
// to each file that includes it.
#pragma once

#include "gemm_driver.h"
#include "simd_avx512.h"

namespace fastlora::cpu {
namespace {

// Op brings Vector, load(const uint8_t*) of 16 items, broadcast(const uint8_t*) of one, and multiply_add(acc, a,
// b).
template <class Op, int64_t kStripRows>
struct BroadcastMultiply {
  using Vector = typename Op::Vector;

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
        Vector columns[kPanels];
        for (int p = 0; p < kPanels; ++p) columns[p] = Op::load(panels + (b * kPanels + p) * kTileBytes + t * 64);
        for (int i = 0; i < kRows; ++i) {
          const Vector a = Op::broadcast(strip + (b * kStripRows + i) * 64 + t * 4);
          for (int p = 0; p < kPanels; ++p) acc[i][p] = Op::multiply_add(acc[i][p], a, columns[p]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) _mm512_storeu_ps(c + i * ldc + p * 16, acc[i][p]);
    }
  }

  // Up to three panels: 8 rows x 3 panels are 24 accumulators of 32 registers.
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
}  // namespace fastlora::cpu
