// Layouts of the blocked GEMM that every wide level shares: y = x·Wᵀ + u·(s·B)ᵀ + bias and its transpose
// dx = dy·W + v·A. A level L brings the instructions (dequantise a run, multiply a strip); the gemm_*.h files
// bring the loops.
//
// One picture for both directions. C += A·B over a contraction cut into 32-bit "items" (one float32, or two
// bfloat16). A is a strip of rows, B a panel of 16 columns:
//
//   A strip   [block of 16 items][kStripRows][16 items]            broadcast, or an AMX A tile
//   B panels  [group of <= kGroup panels][block][panel][16 items][16 columns]   vectors, or an AMX B tile
//
//               A strip (streamed)            B panels                       C (float32 scratch)
//   forward     rows of W, dequantised        x, packed once, in L2          yᵀ  kStripRows x rows of x
//   backward    dy, packed once, in L2        rows of W, dequantised         dx  rows of dy x kRun columns
//
// A look-up yields the columns of a run of kRun weights in an order of its own (L::order, L::column_of). A
// contraction does not care, so in the forward direction x is packed in that order too; in the backward
// direction the columns are put right when C is stored.
//
// Everything sits in an anonymous namespace: each level compiles its own copy with its own flags.
#pragma once

#include "kernels.h"
#include "numeric.h"

namespace fastlora::cpu {
namespace {

constexpr int64_t kPanel = 16;        // columns of a panel, items of a block
constexpr int64_t kTileBytes = 1024;  // 16 items x 16 columns x 4 bytes
constexpr int64_t kAbsmaxSlack = 16;  // floats readable past the last absmax of a row

// Packed weights of one row, kRun columns of them, as a level's look-up takes them.
struct Run {
  const uint8_t* bytes;  // the run's first packed byte, `count` of them readable
  int64_t count;
  const float* absmax;  // of the run's first column; kAbsmaxSlack readable beyond the last
  int32_t phase;        // the first column's place in its block
  int shift;            // log2(blocksize)
};

// A dense stand-in for W: (n, k) row-major, multiplied by `scale` on the way in (lora_a, or s * lora_b).
struct DenseRows {
  const void* data;
  DType dtype;
  int64_t n, k;
  float scale;
};

// How the blocks of absmax lie in the runs of a weight, if it is known to be simple for all of them.
enum class Alignment {
  kHalves,  // a block ends only at a run's middle or end
  kWords,   // up to three blocks a run; they end only between 16-bit words
  kAny,
};

inline Alignment alignment_of(const Nf4Weight& w) {
  if (w.k % 64 == 0 && w.blocksize >= 64) return Alignment::kHalves;
  return w.k % 4 == 0 && w.blocksize >= 64 ? Alignment::kWords : Alignment::kAny;
}

// What a multiply does with C: kKeep leaves it in the tiles from one visit to the next.
enum class FromC { kZero, kLoad, kKeep };
struct Visit {
  FromC from;
  bool store;  // to memory, at the end
};

template <class L>
struct Gemm {
  using T = typename L::T;
  static constexpr int64_t kPerItem = L::kPerItem;
  static constexpr int64_t kPerVector = 16 * kPerItem;  // contraction steps of a block: 64 bytes of a row
  static constexpr int64_t kRun = L::kRun;
  static constexpr int64_t kVectors = kRun / kPerVector;
  static constexpr int64_t kRunPanels = kRun / kPanel;
  static constexpr int64_t kStripRows = L::kStripRows;
  static constexpr int64_t kStripBlockBytes = kStripRows * 64;
  static constexpr int64_t kGroup = L::kGroup;

  // Panels lie in groups of kGroup, of which the last two share evenly rather than leave one panel alone.
  static constexpr int64_t group_width(int64_t first, int64_t panels) {
    const int64_t left = panels - first;
    return left == kGroup + 1 && left > 2 ? (left + 1) / 2 : min64(kGroup, left);
  }

  // Where panel p of `panels` starts at block 0, and how far its next block is.
  struct PanelPlace {
    int64_t offset, block_stride;
  };
  static constexpr PanelPlace panel_place(int64_t p, int64_t panels, int64_t blocks) {
    int64_t first = 0;
    while (first + group_width(first, panels) <= p) first += group_width(first, panels);
    return {(first * blocks + p - first) * kTileBytes, group_width(first, panels) * kTileBytes};
  }
};

}  // namespace
}  // namespace fastlora::cpu
