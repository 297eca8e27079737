// nf4_linear for more rows of x, on any device and for any shape: tiles of 128 columns of y by 16 to 96 rows of x.
//
// Eight warps: four have 32 rows of W each, and all rows of x of the tile; two such teams halve every step of 128
// columns of k between them, and their sums are added at the end. W goes from packed bytes straight into left
// operands in registers and is never in memory in another form; x is read from shared memory as right operands. A
// lane takes the same columns of k, and ends with the same adjacent columns of y, as in nf4_linear_decode.cu.
//
// Where a tile is narrow, sums of 64 columns of k are scaled (kSums); from 64 rows of x on the weights are
// (kWeights), which costs two instructions a pair whatever the number of rows; kRagged is that with scale blocks
// that straddle rows of W, and with W at any address.
#pragma once

#include "nf4_routed.cuh"
#include "nf4_tile.cuh"

namespace fastlora::cuda {
namespace {

enum class Scaling { kSums, kWeights, kRagged };

constexpr int kSwizzle = 2;  // rows that a warp reads at once differ by 4

template <DType D, int kColumns, Scaling kScaling, class Args = ProductArgs>
struct Tile {
  static constexpr float kUnstretch = 1.0f / kStretch<D>;
  static constexpr int kRing = kStages<kColumns>;
  // Row h + 2i + 4g of a warp's 32 is row g (h = 0) or g + 8 (h = 1) of operand i.
  static FASTLORA_DEVICE int row_of(int tile, int half) { return 4 * (lane_index() / 4) + 2 * tile + half; }

  const Args& args;
  const int group = lane_index() / 4, quad = lane_index() % 4;
  const int team = warp_index() / 4;           // which half of a step
  const int warp_row = warp_index() % 4 * 32;  // within the tile
  const uint32_t copy = 4 * static_cast<uint32_t>(lane_index());
  // Of the tile. Neighbouring blocks have the same rows of W.
  const int x_row = block_index() * 8 * kColumns, w_row = block_index_y() * kTileStep, split = block_index_z();
  // What a lane reads of a stage: its bytes of row row_of(0, h) of W, its vectors of row `group` of x.
  const int w_spot[2] = {weight_place<kSwizzle>(warp_row + row_of(0, 0), team) + 8 * quad,
                         weight_place<kSwizzle>(warp_row + row_of(0, 1), team) + 8 * quad};
  const int x_spot[2] = {kXAt + x_place<kColumns>(group, team, 2 * quad),
                         kXAt + x_place<kColumns>(group, team, 2 * quad + 1)};
  StageScales<D, kColumns, kScaling == Scaling::kWeights> scales;
  float sums[2][kColumns][4];

  explicit FASTLORA_DEVICE Tile(const Args& a) : args(a), scales(a) {}

  // Packed bytes of this team's 64 columns of a stage: [tile][half of the operand's rows].
  FASTLORA_DEVICE void load_words(int stage, Words2 (&words)[2][2]) const {
    FASTLORA_UNROLL
    for (int i = 0; i < 2; ++i) {  // two rows are a gap
      FASTLORA_UNROLL
      for (int h = 0; h < 2; ++h) {
        words[i][h] = load_shared(shared_memory<Words2>(stage * kWStageBytes + w_spot[h] + i * kPairPitch));
      }
    }
  }

  // The left operands of the 32 columns whose packed bytes are a lane's words `half`: [tile][step of 16].
  FASTLORA_DEVICE void make_operands(const Words2 (&words)[2][2], int column, int turn, int half,
                                     uint32_t (&a)[2][2][4]) const {
    FASTLORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      FASTLORA_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + row_of(i, h);
        uint32_t pairs[4];
        FASTLORA_UNROLL
        for (int e = 0; e < 4; ++e) pairs[e] = look_up(words[i][h].w[half], pick_byte(e), copy);
        if constexpr (kScaling == Scaling::kWeights) {
          const int which = args.shift == 5 ? 2 * team + quad / 2 : team;
          const auto scale = pair_scale(load_shared(scales.of(args, turn) + which * kTileStep + row));
          FASTLORA_UNROLL
          for (int e = 0; e < 4; ++e) pairs[e] = scaled<D>(pairs[e], scale);
        } else if constexpr (kScaling == Scaling::kRagged) {
          const RunScales<D> run(args, scales.reader(), shared_memory<float>(kFactorsAt<kColumns>), kUnstretch,
                                 w_row + row, column + 64 * team + 16 * quad + 8 * half, 8);
          FASTLORA_UNROLL
          for (int e = 0; e < 4; ++e) pairs[e] = scaled<D>(pairs[e], run.of_pair(e));
        }
        FASTLORA_UNROLL
        for (int e = 0; e < 4; ++e) a[i][e / 2][e % 2 * 2 + h] = pairs[e];
      }
    }
  }

  FASTLORA_DEVICE void multiply_stage(int stage, int column, int turn) {
    Words2 words[2][2];
    load_words(stage, words);
    if constexpr (kScaling == Scaling::kSums) {
      multiply_then_scale(words, stage, column, turn);
    } else {
      FASTLORA_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t a[2][2][4];
        make_operands(words, column, turn, half, a);
        FASTLORA_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          const Words4 x = load_operand(stage, c, half);
          FASTLORA_UNROLL
          for (int step = 0; step < 2; ++step) {
            const uint32_t b[2] = {x.w[2 * step], x.w[2 * step + 1]};
            FASTLORA_UNROLL
            for (int i = 0; i < 2; ++i) multiply_tile<D>(sums[i][c], a[i][step], b);
          }
        }
      }
    }
  }

  FASTLORA_DEVICE void multiply_then_scale(const Words2 (&words)[2][2], int stage, int column, int turn) {
    uint32_t a[2][2][2][4];
    FASTLORA_UNROLL
    for (int half = 0; half < 2; ++half) make_operands(words, column, turn, half, a[half]);
    Words2 scale[2];
    FASTLORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      scale[i] = load_shared(
          reinterpret_cast<const Words2*>(scales.of(args, turn) + team * kTileStep + warp_row + row_of(i, 0)));
    }
    FASTLORA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const Words4 x[2] = {load_operand(stage, c, 0), load_operand(stage, c, 1)};
      FASTLORA_UNROLL
      for (int i = 0; i < 2; ++i) {
        float part[4];
        FASTLORA_UNROLL
        for (int step = 0; step < 4; ++step) {
          const uint32_t b[2] = {x[step / 2].w[step % 2 * 2], x[step / 2].w[step % 2 * 2 + 1]};
          if (step == 0) {
            multiply_tile<D>(part, a[0][i][0], b, {0.0f, 0.0f, 0.0f, 0.0f});
          } else {
            multiply_tile<D>(part, a[step / 2][i][step % 2], b);
          }
        }
        FASTLORA_UNROLL
        for (int j = 0; j < 4; ++j) {
          sums[i][c][j] = multiply_add(part[j], float_of(scale[i].w[j / 2]), sums[i][c][j]);
        }
      }
    }
  }

  // Two steps of 16 for 8 rows of x.
  FASTLORA_DEVICE Words4 load_operand(int stage, int c, int half) const {
    return load_shared(shared_memory<Words4>(stage * kXStageBytes<kColumns> + x_spot[half] + c * 1024));
  }

  FASTLORA_DEVICE void multiply_base() {
    const int begin = split * args.span, end = begin + args.span < args.k ? begin + args.span : args.k;
    TileCopy<kColumns, kSwizzle, false, kScaling != Scaling::kRagged, Args> tile(args, x_row, w_row, begin);
    FASTLORA_UNROLL
    for (int stage = 0; stage < kRing - 1; ++stage) {
      if (begin + stage * kTileStep < end) tile.next(stage);
      copy_async_commit();
    }
    if constexpr (kScaling != Scaling::kRagged) scales.fetch(args, w_row, begin);
    fill_pair_table<kTileThreads>(args.codes);
    fill_factors<kTileThreads>(shared_memory<float>(kFactorsAt<kColumns>),
                               args.scales.nested == nullptr ? nullptr : args.map, kUnstretch);
    sync_threads();
    FASTLORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      FASTLORA_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        FASTLORA_UNROLL
        for (int j = 0; j < 4; ++j) sums[i][c][j] = 0.0f;
      }
    }
    int turn = 0;
    for (int column = begin; column < end; column += kTileStep, ++turn) {
      copy_async_wait<kRing - 2>();
      if constexpr (kScaling != Scaling::kRagged) scales.store(args, turn, kUnstretch);
      sync_threads();  // and all are done with the step before, whose stage is filled next
      if (column + (kRing - 1) * kTileStep < end) tile.next((turn + kRing - 1) % kRing);
      copy_async_commit();
      if constexpr (kScaling != Scaling::kRagged) scales.fetch(args, w_row, column + kTileStep);
      multiply_stage(turn % kRing, column, turn);
    }
    copy_async_wait<0>();
    sync_threads();
  }

  // Each team keeps half of the tile's rows of x: it hands the sums of the others over and takes those of its own.
  static constexpr int kKept = kColumns / 2;
  FASTLORA_DEVICE void add_teams() {
    auto* all = shared_memory<float>(0);
    const auto place = [all](int owner, int i, int c, int j) {
      return all + (((owner * 2 + i) * kKept + c) * 4 + j) * (kTileThreads / 2) +
             thread_index() % (kTileThreads / 2);
    };
    FASTLORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      FASTLORA_UNROLL
      for (int c = 0; c < kKept; ++c) {
        FASTLORA_UNROLL
        for (int j = 0; j < 4; ++j) {
          store_shared(place(1 - team, i, c, j), team == 0 ? sums[i][kKept + c][j] : sums[i][c][j]);
        }
      }
    }
    sync_threads();
    FASTLORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      FASTLORA_UNROLL
      for (int c = 0; c < kKept; ++c) {
        FASTLORA_UNROLL
        for (int j = 0; j < 4; ++j) {
          const float mine = team == 0 ? sums[i][c][j] : sums[i][kKept + c][j];
          sums[i][c][j] = add(mine, load_shared(place(team, i, c, j)));
        }
      }
    }
  }

  FASTLORA_DEVICE void multiply_factor() {
    if (split != 0) return;
    for (int r0 = 0; r0 < args.r; r0 += 16) {
      uint32_t a[2][4];
      FASTLORA_UNROLL
      for (int i = 0; i < 2; ++i) {
        FASTLORA_UNROLL
        for (int j = 0; j < 4; ++j) {
          a[i][j] = factor_pair<D>(args, w_row + warp_row + row_of(i, j % 2), r0 + 2 * quad + j / 2 * 8);
        }
      }
      FASTLORA_UNROLL
      for (int c = 0; c < kKept; ++c) {
        uint32_t b[2];
        inner_operand<D>(args, x_row + 8 * (team * kKept + c), r0, b);
        FASTLORA_UNROLL
        for (int i = 0; i < 2; ++i) multiply_tile<D>(sums[i][c], a[i], b);
      }
    }
  }

  // The same where every row has an adapter of its own: steps of all adapters whose rows are among the team's.
  FASTLORA_DEVICE void multiply_adapters() {
    if (split != 0) return;
    const int first = x_row + 8 * team * kKept;
    LowRankWalk walk(args, first, first + 8 * kKept, w_row, kTileStep);
    constexpr int kAtOnce = kKept > 2 ? 2 : 4;  // whose operands are loaded before the first is used
    for (bool more = true; more;) {
      LowRankStep steps[kAtOnce];
      uint32_t pairs[kAtOnce][4][2], b[kAtOnce][kKept][2];
      FASTLORA_UNROLL
      for (int s = 0; s < kAtOnce; ++s) {
        steps[s] = more ? walk.next() : LowRankStep{};
        more = steps[s].ranks > 0;
        if (!more) continue;
        load_factor<D, 4>(args, steps[s], w_row + warp_row + 4 * group, pairs[s]);
        FASTLORA_UNROLL
        for (int c = 0; c < kKept; ++c) {
          if (steps[s].meets(first + 8 * c)) adapter_operand(args, steps[s], first + 8 * c, b[s][c]);
        }
      }
      FASTLORA_UNROLL
      for (int s = 0; s < kAtOnce; ++s) {
        if (steps[s].ranks == 0) break;
        uint32_t a[2][4];
        FASTLORA_UNROLL
        for (int i = 0; i < 2; ++i) {
          transpose_pairs(a[i], pairs[s][0][i], pairs[s][1][i], pairs[s][2][i], pairs[s][3][i]);
        }
        FASTLORA_UNROLL
        for (int c = 0; c < kKept; ++c) {
          if (!steps[s].meets(first + 8 * c)) continue;
          FASTLORA_UNROLL
          for (int i = 0; i < 2; ++i) multiply_tile<D>(sums[i][c], a[i], b[s][c]);
        }
      }
    }
  }

  FASTLORA_DEVICE void store() {
    FASTLORA_UNROLL
    for (int c = 0; c < kKept; ++c) {
      FASTLORA_UNROLL
      for (int j = 0; j < 2; ++j) {
        float values[4] = {sums[0][c][j], sums[0][c][j + 2], sums[1][c][j], sums[1][c][j + 2]};
        store_results<D, 4>(args, split, result_row(args, x_row + 8 * (team * kKept + c) + 2 * quad + j),
                            w_row + warp_row + 4 * group, args.n, values);
      }
    }
  }
};

}  // namespace
}  // namespace fastlora::cuda
