// The product of two small matrices as the emulated tensor cores form it: exact products, summed in float64 in the
// order of k. (A device sums in an order and with a rounding of its own.)
#pragma once

namespace fastlora::emulator {

using Two [[gnu::may_alias]] = double __attribute__((vector_size(16)));

// d (rows x columns) += a (rows x 16) · b (16 x columns), row-major, at multiples of 16 bytes; columns in eights.
inline void add_product(double* d, const double* a, const double* b, int rows, int columns) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; column += 8) {
      auto* out = reinterpret_cast<Two*>(d + row * columns + column);
      Two sum[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] = out[i];
      for (int k = 0; k < 16; ++k) {
        const double x = a[row * 16 + k];
        const auto* y = reinterpret_cast<const Two*>(b + k * columns + column);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[i] += x * y[i];
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) out[i] = sum[i];
    }
  }
}

}  // namespace fastlora::emulator
