// nf4_linear for up to 8 rows of x, where reading W is all that takes time.
//
// A block of 4 warps makes kRows = 16 or 32 columns of y from all of k. The warps share nothing on the way: each
// takes every fourth chunk of k, has its own ring of packed weights, and meets no barrier wider than itself; their
// sums are added at the end in a fixed order. A chunk is 2 KiB of W: 16 rows by 256 columns, or 32 by 128.
//
// The order of k within a block of 64 columns is free where W and x keep the same one. Lane t of a quad takes
// columns 16t .. 16t + 15: 8 packed bytes and 32 bytes of x, each of them contiguous, and a quad takes a sector.
// Sums of 64 columns are scaled as sums, four multiplications instead of 32. Rows are dealt out so that a lane
// ends with adjacent columns of y.
#pragma once

#include "nf4_routed.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTurn = 2;                      // chunks that a warp takes in a turn
constexpr int kChunkBytes = 16 * kPairPitch;  // 16 gaps of the table, 2 KiB of W
constexpr int kRing = 2 * kTurn;              // a warp's, of chunks: it fills its quarter of the gaps
constexpr int kTurnScales = kTurn * 64;       // rows by blocks of 64 columns
constexpr int kScalesAt = kPairTableBytes;    // (warps, 2, kTurnScales) float32
constexpr int kFactorsAt = kScalesAt + kWarps * 2 * kTurnScales * 4;
constexpr int kSumsAt = kFactorsAt + 256 * 4;  // (warps, 8 rows of x, rows) float32

template <int kTiles>
constexpr int kSharedBytes = kSumsAt + kWarps * 8 * 16 * kTiles * 4;

// kTiles: left operands of 16 rows that a warp has.
template <DType D, int kTiles, class Args = ProductArgs>
struct Decode {
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kBlocks = 4 / kTiles;  // of 64 columns in a chunk
  static constexpr int kChunk = 64 * kBlocks;
  static constexpr int kVectors = 2 * kBlocks;     // of 16 bytes, of a row of W in a chunk
  static constexpr int kCopyRows = 32 / kVectors;  // that the lanes of a warp copy at once
  static constexpr float kUnstretch = 1.0f / kStretch<D>;
  // Row h + 2i + 2 * kTiles * g of the block is row g (h = 0) or g + 8 (h = 1) of operand i.
  static FASTLORA_DEVICE int row_of(int tile, int half) {
    return 2 * kTiles * (lane_index() / 4) + 2 * tile + half;
  }
  // Where a row's 32 bytes of a block lie in a stage. Rows that a warp reads at once are in different quarters of
  // a gap: those of lanes g and g + 1 differ by 2 * kTiles.
  static FASTLORA_DEVICE int place(int row, int block) {
    const int piece = row * kBlocks + block;
    return piece / 4 * kPairPitch + kGapBytes + ((piece % 4) ^ (row >> kTiles & 3)) * 32;
  }

  const Args& args;
  const int warp = warp_index(), lane = lane_index();
  const int group = lane / 4, quad = lane % 4;
  const int first_row = block_index() * kRows;
  const uint32_t copy = 4 * static_cast<uint32_t>(lane);
  // A warp takes the chunks warp, warp + kWarps, ..., two in a turn. What a lane copies, loads and fetches next:
  const uint8_t* copy_from;  // W
  const uint16_t* load_from;
  int copy_column, load_column, scale_column;  // of the first turn
  int copy_rows, copy_to[2], read_from[4];     // the latter two within a chunk
  int first_scale, scale_to, scale_from;
  ScaleReader reader;
  Words4 x[kBlocks][2];  // of one chunk: columns 16 * quad .. + 15 of row `group`; past row m - 1, that one again
  RawScale raw[4];       // of one turn: blocks of one row, two adjacent ones of a chunk and two of the next
  float sums[kTiles][4] = {};

  explicit FASTLORA_DEVICE Decode(const Args& a) : args(a), reader(a.scales) {
    const int copy_row = lane / kVectors;
    copy_column = warp * kChunk + lane % kVectors * 32;
    copy_rows = args.n - first_row - copy_row;
    copy_from = args.packed + (first_row + copy_row) * args.row_bytes + copy_column / 2;
    load_column = warp * kChunk + 16 * quad;
    load_from = static_cast<const uint16_t*>(args.x) + load_column +
                static_cast<int64_t>(source_row(args, group < args.m ? group : args.m - 1)) * args.k;
    const int scale_row = lane * 2 / kBlocks, scale_block = lane * 2 % kBlocks;
    scale_column = warp * kChunk + 64 * scale_block;
    first_scale = (first_row + scale_row < args.n ? first_row + scale_row : args.n - 1) * (args.k >> args.shift);
    // (halves, pairs of blocks, tiles, 8 rows, 2 blocks, 2 rows): what a lane reads for two blocks is adjacent.
    scale_to =
        kScalesAt + warp * 2 * kTurnScales * 4 +
        (((scale_block / 2 * kTiles + scale_row / 2 % kTiles) * 8 + (scale_row >> kTiles)) * 4 + scale_row % 2) *
            4;
    scale_from = kScalesAt + warp * 2 * kTurnScales * 4 + group * 16;
    const int ring = warp * kRing * kChunkBytes;
    FASTLORA_UNROLL
    for (int j = 0; j < 2; ++j) {
      copy_to[j] = ring + place(copy_row + kCopyRows * j, lane % kVectors / 2) + lane % 2 * 16;
    }
    FASTLORA_UNROLL
    for (int j = 0; j < 4; ++j) {
      read_from[j] = ring + place(row_of(0, kTiles == 2 ? j / 2 : 0), kTiles == 2 ? j % 2 : j) + 8 * quad;
    }
  }

  // The chunks of a turn; zeros outside of W. kRowsInside: none of the rows is.
  template <bool kRowsInside>
  FASTLORA_DEVICE void copy_weights(int turn) {
    FASTLORA_UNROLL
    for (int half = 0; half < kTurn; ++half) {
      const uint8_t* from = copy_from + half * kWarps * kChunk / 2;
      const bool inside = (turn * kTurn + half) * kWarps * kChunk < args.k - copy_column;
      const int chunk = (turn * kTurn % kRing + half) * kChunkBytes;
      FASTLORA_UNROLL
      for (int j = 0; j < 4; ++j) {
        // 2 * kCopyRows rows further on is 8 gaps further on.
        copy_async<16>(shared_memory<uint8_t>(chunk + copy_to[j % 2] + j / 2 * 8 * kPairPitch), from,
                       inside && (kRowsInside || kCopyRows * j < copy_rows) ? 16 : 0);
        from += kCopyRows * args.row_bytes;
      }
    }
    copy_async_commit();
    copy_from += kTurn * kWarps * kChunk / 2;
  }

  // Two blocks of 64 columns of the chunk after. Past the end of k zeros, unless kInside.
  template <bool kInside>
  FASTLORA_DEVICE void load_x(int number, int block) {
    FASTLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int column = 64 * (block + i / 2);
      const auto* from = reinterpret_cast<const Words4*>(load_from + column) + i % 2;
      const bool inside = kInside || number * kWarps * kChunk + column < args.k - load_column;
      x[block + i / 2][i % 2] = inside ? load_readonly(from) : Words4{};
    }
    if (block == kBlocks - 2) load_from += kWarps * kChunk;
  }

  // Past the end of k, where x is zero, the last scale of the row again.
  template <bool kInside>
  FASTLORA_DEVICE void fetch_scales(int turn) {
    FASTLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      // In the second of two adjacent blocks of 64 no longer block begins.
      const int column = scale_column + (turn * kTurn + i / 2) * kWarps * kChunk,
                last = (args.k >> args.shift) - 1;
      int block = (column >> args.shift) + i % 2 * (64 >> args.shift);
      if (!kInside && block > last) block = last;
      raw[i] = reader.fetch(first_scale + block);
    }
  }

  FASTLORA_DEVICE void store_scales(int turn) const {
    auto* to = shared_memory<float>(turn % 2 * kTurnScales * 4 + scale_to);
    FASTLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      store_shared(to + i / 2 * 64 + i % 2 * 2,
                   reader.decode(raw[i], shared_memory<float>(kFactorsAt), kUnstretch));
    }
  }

  // Two blocks of 64 columns, from `block` on.
  FASTLORA_DEVICE void multiply_blocks(int turn, int half, int block) {
    const int chunk = (turn * kTurn % kRing + half) * kChunkBytes;
    FASTLORA_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      const Words4 scale = load_shared(shared_memory<Words4>(turn % 2 * kTurnScales * 4 + scale_from +
                                                             ((half * kBlocks + block) / 2 * kTiles + i) * 128));
      FASTLORA_UNROLL
      for (int second = 0; second < 2; ++second) {
        Words2 words[2];
        FASTLORA_UNROLL
        for (int h = 0; h < 2; ++h) {
          // place(row_of(i, h), block + second), of which all but the lane's part is known here.
          const int q = block + second;
          const int at = kTiles == 2 ? read_from[2 * h + q] + i * kPairPitch : read_from[q] + h * kPairPitch;
          words[h] = load_shared(shared_memory<Words2>(chunk + at));
        }
        float part[4];
        FASTLORA_UNROLL
        for (int step = 0; step < 4; ++step) {
          uint32_t a[4];
          FASTLORA_UNROLL
          for (int j = 0; j < 4; ++j) {
            a[j] = look_up(words[j % 2].w[step / 2], pick_byte(step % 2 * 2 + j / 2), copy);
          }
          const Words4& columns = x[block + second][step / 2];
          const uint32_t b[2] = {columns.w[step % 2 * 2], columns.w[step % 2 * 2 + 1]};
          if (step == 0) {
            multiply_tile<D>(part, a, b, {0.0f, 0.0f, 0.0f, 0.0f});
          } else {
            multiply_tile<D>(part, a, b);
          }
        }
        FASTLORA_UNROLL
        for (int j = 0; j < 4; ++j) {
          sums[i][j] = multiply_add(part[j], float_of(scale.w[2 * second + j / 2]), sums[i][j]);
        }
      }
    }
  }

  template <bool kInside>
  FASTLORA_DEVICE void multiply_chunk(int turn, int half) {
    FASTLORA_UNROLL
    for (int block = 0; block < kBlocks; block += 2) {
      multiply_blocks(turn, half, block);
      load_x<kInside>(turn * kTurn + half + 1, block);
    }
  }

  // kInside: none of the rows is outside, nor are the columns of the next turn.
  template <bool kInside>
  FASTLORA_DEVICE void take_turn(int turn) {
    fetch_scales<kInside>(turn + 1);
    multiply_chunk<kInside>(turn, 0);
    multiply_chunk<kInside>(turn, 1);
    copy_async_wait<0>();
    store_scales(turn + 1);
    sync_warp();  // the next turn's are there, and this turn's read
    copy_weights<kInside>(turn + 2);
  }

  FASTLORA_DEVICE void multiply_base() {
    // The same number of turns for all warps; in the full ones none of them passes the end of k.
    constexpr int kColumns = kTurn * kWarps * kChunk;
    const int turns = (args.k + kColumns - 1) / kColumns;
    const int full_turns = first_row + kRows <= args.n ? args.k / kColumns : 0;
    copy_weights<false>(0);
    copy_weights<false>(1);
    fetch_scales<false>(0);
    FASTLORA_UNROLL
    for (int block = 0; block < kBlocks; block += 2) load_x<false>(0, block);
    fill_pair_table<kThreads>(args.codes);
    fill_factors<kThreads>(shared_memory<float>(kFactorsAt), args.scales.nested == nullptr ? nullptr : args.map,
                           kUnstretch);
    copy_async_wait<1>();
    sync_threads();
    store_scales(0);
    sync_warp();
    int turn = 0;
    for (; turn + 1 < full_turns; ++turn) take_turn<true>(turn);
    for (; turn < turns; ++turn) take_turn<false>(turn);
    copy_async_wait<0>();
  }

  // Warps take the steps of r in turns.
  FASTLORA_DEVICE void multiply_factor() {
    for (int r0 = 16 * warp; r0 < args.r; r0 += 16 * kWarps) {
      uint32_t b[2];
      inner_operand<D>(args, 0, r0, b);
      FASTLORA_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        uint32_t a[4];
        FASTLORA_UNROLL
        for (int j = 0; j < 4; ++j) {
          a[j] = factor_pair<D>(args, first_row + row_of(i, j % 2), r0 + 2 * quad + j / 2 * 8);
        }
        multiply_tile<D>(sums[i], a, b);
      }
    }
  }

  // The same where every row has an adapter of its own.
  FASTLORA_DEVICE void multiply_adapters() {
    LowRankWalk walk(args, 0, args.m, first_row, kRows);
    for (int number = 0;; ++number) {
      const LowRankStep step = walk.next();
      if (step.ranks == 0) return;
      if (number % kWarps != warp) continue;
      uint32_t pairs[4][kTiles], b[2];
      load_factor<D, 2 * kTiles>(args, step, first_row + row_of(0, 0), pairs);
      adapter_operand(args, step, 0, b);
      FASTLORA_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        uint32_t a[4];
        transpose_pairs(a, pairs[0][i], pairs[1][i], pairs[2][i], pairs[3][i]);
        multiply_tile<D>(sums[i], a, b);
      }
    }
  }

  FASTLORA_DEVICE void store() {
    auto* all = shared_memory<float>(kSumsAt);
    FASTLORA_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      FASTLORA_UNROLL
      for (int j = 0; j < 4; ++j) {
        store_shared(all + (warp * 8 + 2 * quad + j % 2) * kRows + row_of(i, j / 2), sums[i][j]);
      }
    }
    sync_threads();
    for (int i = thread_index(); i < 8 * kRows / 2; i += kThreads) {
      const int row = i / (kRows / 2), column = i % (kRows / 2) * 2;
      float values[2] = {0.0f, 0.0f};
      for (int w = 0; w < kWarps; ++w) {
        FASTLORA_UNROLL
        for (int j = 0; j < 2; ++j)
          values[j] = add(values[j], load_shared(all + (w * 8 + row) * kRows + column + j));
      }
      store_results<D, 2>(args, 0, result_row(args, row), first_row + column, args.n, values);
    }
  }
};

}  // namespace
}  // namespace fastlora::cuda
