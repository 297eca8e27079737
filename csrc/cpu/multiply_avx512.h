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

  static constexpr bool kResidentC = false;
  static constexpr bool kProjects = false;

  template <int kRows, int kPanels, class Filler>
  static void micro(const uint8_t* strip, const uint8_t* panels, int64_t blocks, float* c, int64_t ldc,
                    bool accumulate, Filler& filler) {
    // A mask instead of a branch: with one, GCC keeps the accumulators on the stack.
    constexpr int kEvery = kPanels == 1 ? 1 : 2;  // items between two quarters
    const __mmask16 keep = accumulate ? 0xffff : 0;
    __m512 acc[kRows][kPanels];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) acc[i][p] = _mm512_maskz_loadu_ps(keep, c + i * ldc + p * 16);
    }
    Filler fill = filler;  // a local: it lives in registers
    for (int64_t b = 0; b < blocks; ++b) {
      for (int t0 = 0; t0 < 16; t0 += 4 * kEvery) {
        const auto quarter = [&]<int kQuarter>() {
          for (int t = t0 + kQuarter * kEvery; t < t0 + (kQuarter + 1) * kEvery; ++t) {
            Vector columns[kPanels];
            for (int p = 0; p < kPanels; ++p) {
              columns[p] = Op::load(panels + (b * kPanels + p) * kTileBytes + t * 64);
            }
            for (int i = 0; i < kRows; ++i) {
              const Vector a = Op::broadcast(strip + (b * kStripRows + i) * 64 + t * 4);
              for (int p = 0; p < kPanels; ++p) acc[i][p] = Op::multiply_add(acc[i][p], a, columns[p]);
            }
          }
          fill.template quarter<kQuarter>();
        };
        quarter.template operator()<0>();
        quarter.template operator()<1>();
        quarter.template operator()<2>();
        quarter.template operator()<3>();
      }
    }
    filler = fill;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) _mm512_storeu_ps(c + i * ldc + p * 16, acc[i][p]);
    }
  }

  static int64_t points(int64_t, int64_t, int64_t) { return 0; }  // quarters only

  // Up to three panels: 8 rows x 3 panels are 24 accumulators of 32 registers.
  template <class Filler>
  static void multiply(const uint8_t* strip, const uint8_t* panels, int64_t width, int64_t blocks, float* c,
                       int64_t ldc, int64_t rows, Visit visit, Filler& filler) {
    const bool accumulate = visit.from != FromC::kZero;
    for (int64_t i = 0; i < rows; i += width == 1 ? 16 : 8) {
      const uint8_t* from = strip + i * 64;
      float* to = c + i * ldc;
      if (width == 3) {
        micro<8, 3>(from, panels, blocks, to, ldc, accumulate, filler);
      } else if (width == 2) {
        micro<8, 2>(from, panels, blocks, to, ldc, accumulate, filler);
      } else {
        micro<16, 1>(from, panels, blocks, to, ldc, accumulate, filler);
      }
    }
  }
};

}  // namespace
}  // namespace fastlora::cpu
