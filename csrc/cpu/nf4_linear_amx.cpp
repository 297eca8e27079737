// The GEMM route for bfloat16 x with AMX: 2x2 tiles of float32, a step multiplies 32x32 by 32x32. Dequantising
// and packing are the bfloat16 level's; only the multiply differs.
//
// nf4_linear_amx_emulated.cpp compiles this file a second time with the tiles in plain C++.
#include "amx_tile.h"
#include "lanes_avx512.h"
#include "level_avx512_bf16.h"
#include "segmented_gemm.h"
#include "segmented_many.h"

namespace fastlora::cpu {
namespace {

struct Amx : Bf16Level {
  static constexpr int64_t kGroup = 2;        // two B tiles side by side: 2 KiB a step
  static constexpr int64_t kStripBlocks = 8;  // 256 columns: a strip of 16 KiB
  static constexpr int64_t kPanelBlocks = 8;  // 256 rows of W: 16 KiB a group of panels
  static constexpr int64_t kRunsTogether =
      4;  // of the input gradient: 256 bytes of a row of W, one after the other
  static constexpr int64_t kForwardRows = 128;
  static constexpr int64_t kBackwardRows = 256;
  static constexpr int64_t kPackedBytes = 1 << 20;
  static constexpr int64_t kBackwardBytes = 2 << 20;  // more than L2 holds: 128 KiB at a time serve four runs
  static constexpr bool kResidentC = true;
  static constexpr bool kProjects = true;

  static void begin() { tile_begin(); }
  static void end() { tile_end(); }

  // kRowTiles x kPanels tiles of C: tiles 0..3 are C, 4 and 5 rows of the strip, 6 and 7 panels.
  template <int kRowTiles, int kPanels, class Filler>
  [[gnu::noinline]] static void micro(const uint8_t* strip, const uint8_t* panels, int64_t blocks, float* c,
                                      int64_t ldc, Visit visit, Filler& filler) {
    auto fill = filler.local();
    float* c_low = c + 16 * ldc;
    if (visit.from == FromC::kLoad) {
      tile_load<0>(c, ldc * 4);
      if constexpr (kPanels == 2) tile_load<1>(c + 16, ldc * 4);
      if constexpr (kRowTiles == 2) tile_load<2>(c_low, ldc * 4);
      if constexpr (kRowTiles == 2 && kPanels == 2) tile_load<3>(c_low + 16, ldc * 4);
    } else if (visit.from == FromC::kZero) {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    for (int64_t b = 0; b < blocks; ++b) {
      tile_load<4>(strip, 64);
      tile_load<6>(panels, 64);
      tile_multiply<0, 4, 6>();
      fill.point();
      if constexpr (kPanels == 2) {
        tile_load<7>(panels + kTileBytes, 64);
        tile_multiply<1, 4, 7>();
        fill.point();
      }
      if constexpr (kRowTiles == 2) {
        tile_load<5>(strip + 1024, 64);
        tile_multiply<2, 5, 6>();
        fill.point();
        if constexpr (kPanels == 2) {
          tile_multiply<3, 5, 7>();
          fill.point();
        }
      }
      strip += kStripRows * 64;
      panels += kPanels * kTileBytes;
    }
    filler.take(fill);
    if (!visit.store) return;
    tile_store<0>(c, ldc * 4);
    if constexpr (kPanels == 2) tile_store<1>(c + 16, ldc * 4);
    if constexpr (kRowTiles == 2) tile_store<2>(c_low, ldc * 4);
    if constexpr (kRowTiles == 2 && kPanels == 2) tile_store<3>(c_low + 16, ldc * 4);
  }

  // Visits of 2x2 tiles, one after the other: `count` groups of panels to one strip or, kStrips, strips to one
  // group. What changes from visit to visit is streamed; what does not stays in L1. A tile of C leaves for memory,
  // and the next visit's comes in its place, just before the first product that needs it: the other tiles'
  // products go on.
  template <bool kStrips, class Filler>
  [[gnu::noinline]] static void visits(const uint8_t* strip, const uint8_t* panels, int64_t step, int64_t count,
                                       int64_t blocks, float* c, int64_t c_step, int64_t ldc, Visit visit,
                                       Filler& filler) {
    tile_fence();
    auto fill = filler.local();
    float* before = nullptr;
    for (int64_t v = 0; v < count; ++v, c += c_step) {
      const uint8_t* a = strip + (kStrips ? v * step : 0);
      const uint8_t* b = panels + (kStrips ? 0 : v * step);
      const auto change = [&]<int kTile>() {
        const int64_t at = kTile / 2 * 16 * ldc + kTile % 2 * 16;
        if (before != nullptr) tile_store<kTile>(before + at, ldc * 4);
        if (visit.from == FromC::kLoad) {
          tile_load<kTile>(c + at, ldc * 4);
        } else if (visit.from == FromC::kZero) {
          tile_zero<kTile>();
        }
      };
      const auto load = [&] {
        if constexpr (kStrips) {
          tile_stream<4>(a, 64);
          tile_stream<5>(a + 1024, 64);
          tile_load<6>(b, 64);
          tile_load<7>(b + kTileBytes, 64);
        } else {
          tile_stream<6>(b, 64);
          tile_stream<7>(b + kTileBytes, 64);
          tile_load<4>(a, 64);
          tile_load<5>(a + 1024, 64);
        }
        a += kStripRows * 64;
        b += 2 * kTileBytes;
      };
      load();
      change.template operator()<0>();
      tile_multiply<0, 4, 6>();
      fill.point();
      change.template operator()<1>();
      tile_multiply<1, 4, 7>();
      fill.point();
      change.template operator()<2>();
      tile_multiply<2, 5, 6>();
      fill.point();
      change.template operator()<3>();
      tile_multiply<3, 5, 7>();
      fill.point();
      for (int64_t i = 1; i < blocks; ++i) {
        load();
        tile_multiply<0, 4, 6>();
        fill.point();
        tile_multiply<1, 4, 7>();
        fill.point();
        tile_multiply<2, 5, 6>();
        fill.point();
        tile_multiply<3, 5, 7>();
        fill.point();
      }
      if (visit.store) before = c;
    }
    if (visit.store) {
      tile_store<0>(before, ldc * 4);
      tile_store<1>(before + 16, ldc * 4);
      tile_store<2>(before + 16 * ldc, ldc * 4);
      tile_store<3>(before + 16 * ldc + 16, ldc * 4);
    }
    filler.take(fill);
    tile_fence();
  }

  // How often multiply calls filler.point() over all groups of so many panels: once a product of tiles.
  static int64_t points(int64_t panels, int64_t rows, int64_t blocks) {
    return panels * ceil_div(rows, 16) * blocks;
  }

  template <class Filler>
  static void multiply(const uint8_t* strip, const uint8_t* panels, int64_t width, int64_t blocks, float* c,
                       int64_t ldc, int64_t rows, Visit visit, Filler& filler) {
    tile_fence();
    if (width == 2) {
      if (rows > 16) {
        micro<2, 2>(strip, panels, blocks, c, ldc, visit, filler);
      } else {
        micro<1, 2>(strip, panels, blocks, c, ldc, visit, filler);
      }
    } else {
      if (rows > 16) {
        micro<2, 1>(strip, panels, blocks, c, ldc, visit, filler);
      } else {
        micro<1, 1>(strip, panels, blocks, c, ldc, visit, filler);
      }
    }
    tile_fence();
  }
};

}  // namespace

#ifdef FASTLORA_AMX_EMULATE
Status nf4_linear_amx_emulated(const Nf4LinearArgs& args) { return gemm_linear<Amx>(args); }
Status nf4_linear_grad_input_amx_emulated(const Nf4LinearGradInputArgs& args) {
  return gemm_grad_input<Amx>(args);
}
Status nf4_multi_lora_linear_amx_emulated(const Nf4MultiLoraLinearArgs& args, const SegmentedJob& job) {
  return gemm_multi_linear<Amx, Avx512Lanes>(args, job);
}
Status nf4_multi_lora_grad_input_amx_emulated(const Nf4MultiLoraGradInputArgs& args, const SegmentedJob& job) {
  return gemm_multi_grad_input<Amx, Avx512Lanes>(args, job);
}
Status segmented_expand_many_amx_emulated(const ExpandArgs& args) {
  using Products = Many<Amx, Avx512Lanes>;
  return Products::run<Products::Expand>(args);
}
Status segmented_outer_many_amx_emulated(const OuterArgs& args) {
  using Products = Many<Amx, Avx512Lanes>;
  return Products::run<Products::Outer>(args);
}
Status segmented_shrink_gemm_amx_emulated(const ShrinkArgs& args) { return gemm_shrink<Amx>(args); }
#else
Status nf4_linear_amx(const Nf4LinearArgs& args) { return gemm_linear<Amx>(args); }
Status nf4_linear_grad_input_amx(const Nf4LinearGradInputArgs& args) { return gemm_grad_input<Amx>(args); }
Status nf4_multi_lora_linear_amx(const Nf4MultiLoraLinearArgs& args, const SegmentedJob& job) {
  return gemm_multi_linear<Amx, Avx512Lanes>(args, job);
}
Status nf4_multi_lora_grad_input_amx(const Nf4MultiLoraGradInputArgs& args, const SegmentedJob& job) {
  return gemm_multi_grad_input<Amx, Avx512Lanes>(args, job);
}
Status segmented_expand_many_amx(const ExpandArgs& args) {
  using Products = Many<Amx, Avx512Lanes>;
  return Products::run<Products::Expand>(args);
}
Status segmented_outer_many_amx(const OuterArgs& args) {
  using Products = Many<Amx, Avx512Lanes>;
  return Products::run<Products::Outer>(args);
}
Status segmented_shrink_gemm_amx(const ShrinkArgs& args) { return gemm_shrink<Amx>(args); }
#endif

}  // namespace fastlora::cpu
