// nf4_linear_grad_input on any device and for any shape: tiles of 128 columns of dx by 8 to 64 rows of dy.
//
// The contraction goes along the rows of W, and a packed byte holds two columns of one row. So two rows are looked
// up and their pairs crossed: the low halves of both are an operand's word, and so are the high ones. A lane takes
// 4 adjacent bytes of each of its rows, which gives it 8 adjacent columns of dx in four operands.
//
// Eight warps: two halves of the tile's columns by four groups, each of which takes 32 of the 128 rows of W in a
// step; the groups' sums are added at the end in order. dy is read as right operands by ldmatrix. Weights are
// scaled, for every row of W has its own scale.
#pragma once

#include "nf4_routed.cuh"
#include "nf4_tile.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kSwizzle = 1;  // rows that a warp reads at once differ by 2

template <DType D, int kColumns, bool kRagged, class Args = ProductArgs>
struct Tile {
  static constexpr float kUnstretch = 1.0f / kStretch<D>;
  static constexpr int kRing = kStages<kColumns>;

  const Args& args;
  const int group = lane_index() / 4, quad = lane_index() % 4;
  const int half = warp_index() % 2;  // of the tile's columns
  const int team = warp_index() / 2;  // which quarter of a step
  const uint32_t copy = 4 * static_cast<uint32_t>(lane_index());
  const int x_row = block_index() * 8 * kColumns, column = block_index_y() * kTileStep, split = block_index_z();
  // What a lane reads of a stage: its bytes of rows 2 * quad and + 1 of its team's 32; their scales; its row of
  // the right operands of either 16 steps.
  const int w_spot[2] = {weight_place<kSwizzle>(32 * team + 2 * quad, half) + 4 * group,
                         weight_place<kSwizzle>(32 * team + 2 * quad + 1, half) + 4 * group};
  const int x_spot[2] = {kXAt + operand_place(0), kXAt + operand_place(1)};
  StageScales<D, kColumns, true> scales;
  float sums[4][kColumns][4];

  explicit FASTLORA_DEVICE Tile(const Args& a) : args(a), scales(a) {}

  FASTLORA_DEVICE int operand_place(int step) const {
    const int lane = lane_index();
    return x_place<kColumns>(lane / 16 * 8 + lane % 8, team / 2, team % 2 * 4 + 2 * step + lane / 8 % 2);
  }

  // The left operands of one step of 16 rows of W: operand i has columns 8g + 2i and the next.
  FASTLORA_DEVICE void make_operands(int stage, int row, int turn, int step, uint32_t (&a)[4][4]) const {
    uint32_t pairs[4][4];  // of rows 2t, 2t + 1, 2t + 8, 2t + 9
    FASTLORA_UNROLL
    for (int q = 0; q < 4; ++q) {
      const int in_team = 16 * step + q / 2 * 8;  // two rows are a gap
      const uint32_t word =
          load_shared(shared_memory<uint32_t>(stage * kWStageBytes + w_spot[q % 2] + in_team / 2 * kPairPitch));
      FASTLORA_UNROLL
      for (int i = 0; i < 4; ++i) pairs[q][i] = look_up(word, pick_byte(i), copy);
      const int in_stage = 32 * team + in_team + 2 * quad + q % 2;
      if constexpr (kRagged) {
        const RunScales<D> run(args, scales.reader(), shared_memory<float>(kFactorsAt<kColumns>), kUnstretch,
                               row + in_stage, column + 64 * half + 8 * group, 8);
        FASTLORA_UNROLL
        for (int i = 0; i < 4; ++i) pairs[q][i] = scaled<D>(pairs[q][i], run.of_pair(i));
      } else {
        const int which = args.shift == 5 ? 2 * half + group / 4 : half;
        const auto scale = pair_scale(load_shared(scales.of(args, turn) + which * kTileStep + in_stage));
        FASTLORA_UNROLL
        for (int i = 0; i < 4; ++i) pairs[q][i] = scaled<D>(pairs[q][i], scale);
      }
    }
    FASTLORA_UNROLL
    for (int i = 0; i < 4; ++i) transpose_pairs(a[i], pairs[0][i], pairs[1][i], pairs[2][i], pairs[3][i]);
  }

  FASTLORA_DEVICE void multiply_stage(int stage, int row, int turn) {
    FASTLORA_UNROLL
    for (int step = 0; step < 2; ++step) {
      uint32_t a[4][4];
      make_operands(stage, row, turn, step, a);
      const int from = stage * kXStageBytes<kColumns> + x_spot[step];
      if constexpr (kColumns == 1) {
        uint32_t b[2];
        load_matrix<2, false>(b, shared_memory<uint8_t>(from));
        FASTLORA_UNROLL
        for (int i = 0; i < 4; ++i) multiply_tile<D>(sums[i][0], a[i], b);
      } else {
        FASTLORA_UNROLL
        for (int c = 0; c < kColumns; c += 2) {
          uint32_t two[4];
          load_matrix<4, false>(two, shared_memory<uint8_t>(from + c * 1024));
          FASTLORA_UNROLL
          for (int j = 0; j < 2; ++j) {
            const uint32_t b[2] = {two[2 * j], two[2 * j + 1]};
            FASTLORA_UNROLL
            for (int i = 0; i < 4; ++i) multiply_tile<D>(sums[i][c + j], a[i], b);
          }
        }
      }
    }
  }

  FASTLORA_DEVICE void multiply_base() {
    const int begin = split * args.span, end = begin + args.span < args.n ? begin + args.span : args.n;
    TileCopy<kColumns, kSwizzle, true, !kRagged, Args> tile(args, x_row, begin, column);
    FASTLORA_UNROLL
    for (int stage = 0; stage < kRing - 1; ++stage) {
      if (begin + stage * kTileStep < end) tile.next(stage);
      copy_async_commit();
    }
    if constexpr (!kRagged) scales.fetch(args, begin, column);
    fill_pair_table<kTileThreads>(args.codes);
    fill_factors<kTileThreads>(shared_memory<float>(kFactorsAt<kColumns>),
                               args.scales.nested == nullptr ? nullptr : args.map, kUnstretch);
    sync_threads();
    FASTLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      FASTLORA_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        FASTLORA_UNROLL
        for (int j = 0; j < 4; ++j) sums[i][c][j] = 0.0f;
      }
    }
    int turn = 0;
    for (int row = begin; row < end; row += kTileStep, ++turn) {
      copy_async_wait<kRing - 2>();
      if constexpr (!kRagged) scales.store(args, turn, kUnstretch);
      sync_threads();  // and all are done with the step before, whose stage is filled next
      if (row + (kRing - 1) * kTileStep < end) tile.next((turn + kRing - 1) % kRing);
      copy_async_commit();
      if constexpr (!kRagged) scales.fetch(args, row + kTileStep, column);
      multiply_stage(turn % kRing, row, turn);
    }
    copy_async_wait<0>();
    sync_threads();
  }

  // A team keeps kKept of the right operands: it adds all teams' sums of them, in order. Where there are fewer
  // than teams, the last ones keep none.
  static constexpr int kKept = kColumns >= 4 ? kColumns / 4 : 1;
  float kept[4][kKept][4];

  FASTLORA_DEVICE bool keeps() const { return kKept * team < kColumns; }
  FASTLORA_DEVICE int kept_row(int c) const { return x_row + 8 * (kKept * team + c); }

  FASTLORA_DEVICE void add_teams() {
    const auto place = [this](int from, int owner) {
      return shared_memory<float>(0) + ((from * 2 + half) * kColumns / kKept + owner) * 16 * 32 + lane_index();
    };
    FASTLORA_UNROLL
    for (int c = 0; c < kKept; ++c) {
      if (c > 0) sync_threads();
      FASTLORA_UNROLL
      for (int owner = 0; owner < kColumns / kKept; ++owner) {
        FASTLORA_UNROLL
        for (int i = 0; i < 16; ++i) {
          store_shared(place(team, owner) + i * 32, sums[i / 4][kKept * owner + c][i % 4]);
        }
      }
      sync_threads();
      if (!keeps()) continue;
      FASTLORA_UNROLL
      for (int i = 0; i < 16; ++i) {
        float sum = 0.0f;
        FASTLORA_UNROLL
        for (int from = 0; from < 4; ++from) sum = add(sum, load_shared(place(from, team) + i * 32));
        kept[i / 4][c][i % 4] = sum;
      }
    }
  }

  FASTLORA_DEVICE void multiply_factor() {
    if (split != 0 || !keeps()) return;
    const int first = column + 64 * half + 8 * group;
    for (int r0 = 0; r0 < args.r; r0 += 16) {
      Words4 pairs[4];
      FASTLORA_UNROLL
      for (int q = 0; q < 4; ++q) {
        const int row = r0 + 2 * quad + q % 2 + q / 2 * 8;
        pairs[q] = load_octet<D>(args.factor, static_cast<int64_t>(row) * args.k + first,
                                 row < args.r ? args.k - first : 0, args.factor_dtype, args.factor_vectors, 1.0f);
      }
      uint32_t a[4][4];
      FASTLORA_UNROLL
      for (int i = 0; i < 4; ++i)
        transpose_pairs(a[i], pairs[0].w[i], pairs[1].w[i], pairs[2].w[i], pairs[3].w[i]);
      FASTLORA_UNROLL
      for (int c = 0; c < kKept; ++c) {
        uint32_t b[2];
        inner_operand<D>(args, kept_row(c), r0, b);
        FASTLORA_UNROLL
        for (int i = 0; i < 4; ++i) multiply_tile<D>(kept[i][c], a[i], b);
      }
    }
  }

  // The same where every row has an adapter of its own.
  FASTLORA_DEVICE void multiply_adapters() {
    if (split != 0 || !keeps()) return;
    LowRankWalk walk(args, kept_row(0), kept_row(kKept), 0, 0);
    constexpr int kAtOnce = 2;  // whose operands are loaded before the first is used
    for (bool more = true; more;) {
      LowRankStep steps[kAtOnce];
      uint32_t pairs[kAtOnce][4][4], b[kAtOnce][kKept][2];
      FASTLORA_UNROLL
      for (int s = 0; s < kAtOnce; ++s) {
        steps[s] = more ? walk.next() : LowRankStep{};
        more = steps[s].ranks > 0;
        if (!more) continue;
        load_factor<D, 8>(args, steps[s], column + 64 * half + 8 * group, pairs[s]);
        FASTLORA_UNROLL
        for (int c = 0; c < kKept; ++c) {
          if (steps[s].meets(kept_row(c))) adapter_operand(args, steps[s], kept_row(c), b[s][c]);
        }
      }
      FASTLORA_UNROLL
      for (int s = 0; s < kAtOnce; ++s) {
        if (steps[s].ranks == 0) break;
        uint32_t a[4][4];
        FASTLORA_UNROLL
        for (int i = 0; i < 4; ++i) {
          transpose_pairs(a[i], pairs[s][0][i], pairs[s][1][i], pairs[s][2][i], pairs[s][3][i]);
        }
        FASTLORA_UNROLL
        for (int c = 0; c < kKept; ++c) {
          if (!steps[s].meets(kept_row(c))) continue;
          FASTLORA_UNROLL
          for (int i = 0; i < 4; ++i) multiply_tile<D>(kept[i][c], a[i], b[s][c]);
        }
      }
    }
  }

  FASTLORA_DEVICE void store() {
    if (!keeps()) return;
    FASTLORA_UNROLL
    for (int c = 0; c < kKept; ++c) {
      FASTLORA_UNROLL
      for (int j = 0; j < 2; ++j) {
        float values[8];
        FASTLORA_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = kept[i / 2][c][j + i % 2 * 2];
        store_results<D, 8>(args, split, result_row(args, kept_row(c) + 2 * quad + j),
                            column + 64 * half + 8 * group, args.k, values);
      }
    }
  }
};

static_assert(4 * 2 * 4 * 16 * 32 * 4 <= kPairTableBytes, "the teams' sums");

}  // namespace
}  // namespace fastlora::cuda
