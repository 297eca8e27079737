// The AMX tile instructions the kernels use, wrapped once. With FASTLORA_AMX_EMULATE the same calls run in
// plain C++ on a thread-local tile file, so that nf4_linear_amx.cpp is tested on machines without AMX.
//
// Every tile is 16 rows of 64 bytes: 16x32 bfloat16 (A), 16 pairs x 16 columns (B), 16x16 float32 (C).
#pragma once

#include <cstdint>
#include <cstring>

#include "numeric.h"

#ifndef FASTLORA_AMX_EMULATE
#include <immintrin.h>
#endif

namespace fastlora::cpu {
namespace {

#ifdef FASTLORA_AMX_EMULATE

struct TileFile {
  alignas(64) uint8_t data[8][1024];
  bool configured;
};
thread_local TileFile t_tiles;

inline void tile_begin() {
  std::memset(&t_tiles, 0xff, sizeof t_tiles);  // what no instruction has written reads as NaN
  t_tiles.configured = true;
}
inline void tile_end() { t_tiles.configured = false; }
inline void tile_fence() {}

template <int kTile>
void tile_zero() {
  std::memset(t_tiles.data[kTile], 0, 1024);
}
template <int kTile>
void tile_load(const void* base, int64_t stride) {
  if (!t_tiles.configured) __builtin_trap();  // #UD on the processor
  for (int row = 0; row < 16; ++row) {
    std::memcpy(t_tiles.data[kTile] + row * 64, static_cast<const char*>(base) + row * stride, 64);
  }
}
template <int kTile>
void tile_stream(const void* base, int64_t stride) {
  tile_load<kTile>(base, stride);
}
template <int kTile>
void tile_store(void* base, int64_t stride) {
  if (!t_tiles.configured) __builtin_trap();
  for (int row = 0; row < 16; ++row) {
    std::memcpy(static_cast<char*>(base) + row * stride, t_tiles.data[kTile] + row * 64, 64);
  }
}
// TDPBF16PS: even and odd products are summed apart over the 16 pairs, then both are added to C.
template <int kC, int kA, int kB>
void tile_multiply() {
  alignas(64) uint16_t b[16][32];
  std::memcpy(b, t_tiles.data[kB], 1024);
  for (int row = 0; row < 16; ++row) {
    uint16_t a[32];
    float c[16], even[16] = {}, odd[16] = {};
    std::memcpy(a, t_tiles.data[kA] + row * 64, 64);
    std::memcpy(c, t_tiles.data[kC] + row * 64, 64);
    for (int pair = 0; pair < 16; ++pair) {
      const float a0 = bf16_to_float(a[2 * pair]), a1 = bf16_to_float(a[2 * pair + 1]);
      for (int column = 0; column < 16; ++column) {
        even[column] += a0 * bf16_to_float(b[pair][2 * column]);
        odd[column] += a1 * bf16_to_float(b[pair][2 * column + 1]);
      }
    }
    for (int column = 0; column < 16; ++column) c[column] += even[column] + odd[column];
    std::memcpy(t_tiles.data[kC] + row * 64, c, 64);
  }
}

#else

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
// In static storage: the intrinsic tells the compiler of 8 of these 64 bytes only, so those of a local could be
// dropped as never read.
constexpr TileConfig kTileConfig;

inline void tile_begin() { _tile_loadconfig(&kTileConfig); }
inline void tile_end() { _tile_release(); }
// The intrinsics do not tell the compiler that they read memory: everything a tile load reads must be stored
// before this.
inline void tile_fence() { __asm__ volatile("" ::: "memory"); }

// The intrinsics paste the tile number into the instruction's text, so it must be a literal.
#define FASTLORA_TILE_SWITCH(tile, call) \
  if constexpr (tile == 0) call(0);      \
  if constexpr (tile == 1) call(1);      \
  if constexpr (tile == 2) call(2);      \
  if constexpr (tile == 3) call(3);      \
  if constexpr (tile == 4) call(4);      \
  if constexpr (tile == 5) call(5);      \
  if constexpr (tile == 6) call(6);      \
  if constexpr (tile == 7) call(7)

template <int kTile>
inline void tile_zero() {
#define FASTLORA_CALL(t) _tile_zero(t)
  FASTLORA_TILE_SWITCH(kTile, FASTLORA_CALL);
#undef FASTLORA_CALL
}
template <int kTile>
inline void tile_load(const void* base, int64_t stride) {
#define FASTLORA_CALL(t) _tile_loadd(t, base, stride)
  FASTLORA_TILE_SWITCH(kTile, FASTLORA_CALL);
#undef FASTLORA_CALL
}
// A load of what this core will not soon read again: it leaves what lies in L1 there.
template <int kTile>
inline void tile_stream(const void* base, int64_t stride) {
#define FASTLORA_CALL(t) _tile_stream_loadd(t, base, stride)
  FASTLORA_TILE_SWITCH(kTile, FASTLORA_CALL);
#undef FASTLORA_CALL
}
template <int kTile>
inline void tile_store(void* base, int64_t stride) {
#define FASTLORA_CALL(t) _tile_stored(t, base, stride)
  FASTLORA_TILE_SWITCH(kTile, FASTLORA_CALL);
#undef FASTLORA_CALL
}
// C is one of tiles 0-3, A tile 4 or 5, B tile 6 or 7.
template <int kC, int kA, int kB>
inline void tile_multiply() {
  static_assert(kA == 4 + kC / 2 && kB == 6 + kC % 2);
  if constexpr (kC == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (kC == 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (kC == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kC == 3) _tile_dpbf16ps(3, 5, 7);
}
#undef FASTLORA_TILE_SWITCH

#endif

}  // namespace
}  // namespace fastlora::cpu
