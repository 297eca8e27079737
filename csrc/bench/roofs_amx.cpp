// The tile multiply of AMX, four tiles loaded for four multiplied, all from L2: the best a GEMM's loop can do.
#include <immintrin.h>

#include <cstring>

#include "roofs.h"

namespace fastlora::bench {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace

float bf16_tiles_amx(int64_t passes, const void* data, size_t bytes, double* flops) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.bytes_per_row[t] = 64;
    config.rows[t] = 16;
  }
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const char* p = static_cast<const char*>(data);
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (size_t at = 0; at < bytes; at += 4096) {
      _tile_loadd(4, p + at, 64);
      _tile_loadd(6, p + at + 2048, 64);
      _tile_loadd(5, p + at + 1024, 64);
      _tile_loadd(7, p + at + 3072, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[4][256];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  _tile_release();
  *flops = 2.0 * 16 * 16 * 32 * 4 * static_cast<double>(bytes / 4096) * static_cast<double>(passes);
  return sums[0][0] + sums[1][1] + sums[2][2] + sums[3][3];
}

}  // namespace fastlora::bench
