// The ring between one warpgroup that copies and two that multiply, for the wgmma kernels of both directions.
//
// A stage is 64 steps of the contraction: 4 KiB of packed weights in 32 of the table's gaps, kColumns rows of x in
// the layout that products read (128 bytes a row, swizzled), and its scales. Full and empty mbarriers hand stages
// over; a copying thread hands one over when its own copies of it have landed, which it makes sure of kLag stages
// later.
#pragma once

#include "kernels.cuh"
#include "launch.cuh"
#include "nf4_linear.cuh"
#include "warpgroup.cuh"

namespace fastlora::cuda {

inline constexpr int kGroupThreads = 128;               // of a warpgroup: the first copies
inline constexpr int kRingThreads = 3 * kGroupThreads;  // the others multiply
inline constexpr int kDepth = 64;                       // steps in a stage
inline constexpr int kRingGaps = 32;                    // of W in a stage
inline constexpr int kRingWBytes = kRingGaps * kPairPitch;

template <int kColumns>
struct RingLayout {
  static constexpr int kXBytes = kColumns * 128;
  // Stages: as many as fit beside the table, for one block on a processor or, where x is narrow, for two.
  static constexpr int kStages = kColumns == 256 ? 4 : kColumns == 128 ? 6 : kColumns == 64 ? 4 : 6;
  static constexpr int kXAt = kPairTableBytes;
  static constexpr int kScaleBytes = 4 * 128 * 4;  // of a stage: up to four for each of 128 rows or columns
  static constexpr int kScalesAt = kXAt + kStages * kXBytes;
  static constexpr int kFactorsAt = kScalesAt + kStages * kScaleBytes;
  static constexpr int kBarriersAt = kFactorsAt + 256 * 4;
  static constexpr int kBytes = kBarriersAt + 2 * kStages * 8;
};

template <int kColumns>
struct Ring {
  using Layout = RingLayout<kColumns>;
  static constexpr int kStages = Layout::kStages;
  // Those who multiply free a stage when they have the next: so two stages are theirs, and the copies of the
  // others may be under way.
  static constexpr int kLag = kStages - 2;

  static FASTLORA_DEVICE uint64_t* full(int stage) { return shared_memory<uint64_t>(Layout::kBarriersAt) + stage; }
  static FASTLORA_DEVICE uint64_t* empty(int stage) { return full(kStages + stage); }
  static FASTLORA_DEVICE uint8_t* x(int stage) {
    return shared_memory<uint8_t>(Layout::kXAt + stage * Layout::kXBytes);
  }
  static FASTLORA_DEVICE uint32_t* scales(int stage) {
    return shared_memory<uint32_t>(Layout::kScalesAt + stage * Layout::kScaleBytes);
  }

  // By one thread, before a barrier of all.
  static FASTLORA_DEVICE void init() {
    for (int stage = 0; stage < kStages; ++stage) {
      memory_barrier_init(full(stage), kGroupThreads);
      memory_barrier_init(empty(stage), 2 * kGroupThreads);
    }
  }

  // ---- of the copying warpgroup

  // Waits until stage number `index` may be filled.
  static FASTLORA_DEVICE void acquire(int index) {
    if (index >= kStages) memory_barrier_wait(empty(index % kStages), (index / kStages + 1) % 2);
  }
  // All that this thread wrote or copied for stage `index` is on its way; an earlier one has landed and goes over.
  static FASTLORA_DEVICE void commit(int index) {
    copy_async_commit();
    if (index < kLag) return;
    copy_async_wait<kLag>();
    fence_async_proxy();
    memory_barrier_arrive(full((index - kLag) % kStages));
  }
  // The last stages, of `count` in all.
  static FASTLORA_DEVICE void drain(int count) {
    copy_async_wait<0>();
    fence_async_proxy();
    for (int index = count > kLag ? count - kLag : 0; index < count; ++index) {
      memory_barrier_arrive(full(index % kStages));
    }
  }

  // ---- of the multiplying ones

  static FASTLORA_DEVICE void wait_full(int index) {
    memory_barrier_wait(full(index % kStages), index / kStages % 2);
  }
  static FASTLORA_DEVICE void release(int index) { memory_barrier_arrive(empty(index % kStages)); }
};

// ---- a block's tile -----------------------------------------------------------------------------------------

inline constexpr int kRingTile = 128;  // rows of W forward, columns of it for the input gradient

struct RingTile {
  int x_row, first;  // of x, and of the output's columns
  int split, begin, stages, inner_stages;
  int contraction;  // its whole length
};

template <int kColumns>
FASTLORA_DEVICE RingTile ring_tile(const ProductArgs& args, int contraction) {
  const int split = block_index_z(), begin = split * args.span;
  const int end = begin + args.span < contraction ? begin + args.span : contraction;
  return {.x_row = block_index() * kColumns,  // neighbouring blocks have the same part of W
          .first = block_index_y() * kRingTile,
          .split = split,
          .begin = begin,
          .stages = (end - begin + kDepth - 1) / kDepth,
          .inner_stages = split == 0 ? (args.r + kDepth - 1) / kDepth : 0,
          .contraction = contraction};
}

// What a launch of `width` columns of output looks like.
template <int kColumns>
LaunchShape ring_shape(const ProductArgs& args, int width, bool overlaps) {
  return {.blocks = static_cast<int>(ceil_div(args.m, kColumns)),
          .blocks_y = static_cast<int>(ceil_div(width, kRingTile)),
          .blocks_z = args.splits,
          .threads = kRingThreads,
          .shared_bytes = RingLayout<kColumns>::kBytes,
          .overlaps = overlaps};
}

// Barriers and tables, by all threads; then they part.
template <DType D, int kColumns>
FASTLORA_DEVICE void start_ring(const ProductArgs& args) {
  using R = Ring<kColumns>;
  if (thread_index() == 0) R::init();
  fill_pair_table<kRingThreads>(args.codes);
  fill_factors<kRingThreads>(shared_memory<float>(R::Layout::kFactorsAt),
                             args.scales.nested == nullptr ? nullptr : args.map, 1.0f / kStretch<D>);
  sync_threads();
}

// ---- the copying warpgroup ----------------------------------------------------------------------------------

// Where 16 bytes of row `row` of x lie in a stage.
FASTLORA_DEVICE int ring_x_place(int row, int vector) { return row * 128 + (vector ^ row % 8) * 16; }

// Rows of x of a stage: `rows` and `steps` are what is left from its first on; zeros past them.
template <int kColumns>
FASTLORA_DEVICE void copy_ring_x(uint8_t* to, const uint16_t* from, int width, int rows, int steps FASTLORA_AT) {
  const int row = thread_index() / 8, vector = thread_index() % 8;
  const uint16_t* lane_from = from + static_cast<int64_t>(row) * width + 8 * vector;
  FASTLORA_UNROLL
  for (int j = 0; j < kColumns / 16; ++j) {  // 16 rows on
    const bool inside = row + 16 * j < rows && 8 * vector < steps;
    copy_async<16>(to + ring_x_place(row, vector) + j * 2048, lane_from, inside ? 16 : 0 FASTLORA_HERE);
    lane_from += 16 * static_cast<int64_t>(width);
  }
}

// The same in the order of k in which a lane of a quad takes 8 adjacent bytes of a row of W: pair p of a row lies
// where pair p / 8 of the p % 8-th 8 steps would. A warp copies a whole row.
template <int kColumns>
FASTLORA_DEVICE void copy_ring_x_pairs(uint8_t* to, const uint16_t* from, int width, int rows,
                                       int steps FASTLORA_AT) {
  const int row = thread_index() / 32, pair = lane_index();
  const uint16_t* lane_from = from + static_cast<int64_t>(row) * width + 2 * pair;
  // Of this row and of 4 rows on; every 8 rows it is the same again.
  uint8_t* place[2] = {to + ring_x_place(row, pair % 8) + pair / 8 * 4,
                       to + ring_x_place(row + 4, pair % 8) + pair / 8 * 4};
  if (rows >= kColumns && steps >= kDepth) {
    FASTLORA_UNROLL
    for (int j = 0; j < kColumns / 4; ++j) {
      copy_async<4>(place[j % 2] + j / 2 * 1024, lane_from, 4 FASTLORA_HERE);
      lane_from += 4 * static_cast<int64_t>(width);
    }
    return;
  }
  for (int j = 0; j < kColumns / 4; ++j) {
    const bool inside = row + 4 * j < rows && 2 * pair < steps;
    copy_async<4>(place[j % 2] + j / 2 * 1024, lane_from, inside ? 4 : 0 FASTLORA_HERE);
    lane_from += 4 * static_cast<int64_t>(width);
  }
}

// The inner rows of x (u or v) from rank r0 on, as a stage of 16 steps where there are no more ranks, else of 64.
template <DType D, int kColumns>
FASTLORA_DEVICE void fill_ring_inner(const ProductArgs& args, uint8_t* to, int x_row, int r0 FASTLORA_AT) {
  const int pairs = args.r <= 16 ? 8 : kDepth / 2;
  for (int i = thread_index(); i < kColumns * pairs; i += kGroupThreads) {
    const int row = i / pairs, pair = i % pairs;
    store_shared(reinterpret_cast<uint32_t*>(to + ring_x_place(row, pair / 4)) + pair % 4,
                 inner_pair<D>(args, x_row + row, r0 + 2 * pair FASTLORA_HERE) FASTLORA_HERE);
  }
}

// All stages in turn. weights.copy(index, stage) brings W and its scales. Weights::kInPairs: x is wanted in the
// order of copy_ring_x_pairs.
template <DType D, int kColumns, class Weights>
FASTLORA_DEVICE void copy_ring(const ProductArgs& args, const RingTile& tile, Weights& weights) {
  using R = Ring<kColumns>;
  const auto* x_from =
      static_cast<const uint16_t*>(args.x) + static_cast<int64_t>(tile.x_row) * tile.contraction + tile.begin;
  for (int index = 0; index < tile.stages; ++index) {
    const int stage = index % R::kStages;
    R::acquire(index);
    const int rows = args.m - tile.x_row, steps = tile.contraction - tile.begin - index * kDepth;
    if constexpr (Weights::kInPairs) {
      copy_ring_x_pairs<kColumns>(R::x(stage), x_from, tile.contraction, rows, steps);
    } else {
      copy_ring_x<kColumns>(R::x(stage), x_from, tile.contraction, rows, steps);
    }
    weights.copy(index, stage);
    R::commit(index);
    x_from += kDepth;
  }
  wait_for_previous_launch();
  for (int i = 0; i < tile.inner_stages; ++i) {
    const int index = tile.stages + i;
    R::acquire(index);
    fill_ring_inner<D, kColumns>(args, R::x(index % R::kStages), tile.x_row, i * kDepth);
    R::commit(index);
  }
  R::drain(tile.stages + tile.inner_stages);
}

// ---- the multiplying ones -----------------------------------------------------------------------------------

// sums += the products of stage `index` with a.
template <DType D, int kColumns, int kSteps>
FASTLORA_DEVICE void multiply_stage(float (&sums)[kColumns / 2], int index, uint32_t (&a)[4][4]) {
  using R = Ring<kColumns>;
  keep_registers(sums);
  FASTLORA_UNROLL
  for (int step = 0; step < kSteps; ++step) keep_registers(a[step]);
  fence_warpgroup();
  FASTLORA_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    multiply_warpgroup<D, kColumns>(sums, a[step], R::x(index % R::kStages), step);
  }
  commit_warpgroup();
}

template <DType D, int kColumns, int kSteps, class Operands>
FASTLORA_DEVICE void multiply_inner(const RingTile& tile, const Operands& operands, float (&sums)[kColumns / 2],
                                    uint32_t (&a)[4][4]) {
  using R = Ring<kColumns>;
  for (int i = 0; i < tile.inner_stages; ++i) {
    operands.template make_factor<kSteps>(i * kDepth, a);
    R::wait_full(tile.stages + i);
    multiply_stage<D, kColumns, kSteps>(sums, tile.stages + i, a);
    wait_warpgroup<0>();
    keep_registers(sums);
    R::release(tile.stages + i);
  }
}

// All stages in turn. operands.make(index, a) looks up the left operands of a stage, four steps of 16;
// make_factor<kSteps>(r0, a) loads those of the low-rank steps from r0 on.
template <DType D, int kColumns, class Operands>
FASTLORA_DEVICE void multiply_ring(const ProductArgs& args, const RingTile& tile, const Operands& operands,
                                   float (&sums)[kColumns / 2]) {
  using R = Ring<kColumns>;
  uint32_t a[2][4][4];
  int index = 0;
  // Two stages a trip, so that the operands' two sets of registers have names. While the products of one are under
  // way, the other is made.
  for (; index + 1 < tile.stages; index += 2) {
    FASTLORA_UNROLL
    for (int set = 0; set < 2; ++set) {
      R::wait_full(index + set);
      operands.make(index + set, a[set]);
      multiply_stage<D, kColumns, 4>(sums, index + set, a[set]);
      wait_warpgroup<1>();  // the stage before is done
      if (index + set > 0) R::release(index + set - 1);
    }
  }
  if (index < tile.stages) {
    R::wait_full(index);
    operands.make(index, a[0]);
    multiply_stage<D, kColumns, 4>(sums, index, a[0]);
  }
  wait_warpgroup<0>();
  keep_registers(sums);
  if (tile.stages > 1 && index < tile.stages) R::release(tile.stages - 2);
  if (tile.stages > 0) R::release(tile.stages - 1);
  wait_for_previous_launch();
  if (args.r <= 16) {
    multiply_inner<D, kColumns, 1>(tile, operands, sums, a[0]);
  } else {
    multiply_inner<D, kColumns, 4>(tile, operands, sums, a[0]);
  }
}

// A lane's sums: two adjacent columns of the output from `column` on, for 2 rows of x in each 8.
template <DType D, int kColumns>
FASTLORA_DEVICE void store_ring(const ProductArgs& args, const RingTile& tile, int column, int width,
                                const float (&sums)[kColumns / 2]) {
  const int quad = lane_index() % 4;
  FASTLORA_UNROLL
  for (int c = 0; c < kColumns / 8; ++c) {
    FASTLORA_UNROLL
    for (int j = 0; j < 2; ++j) {
      float values[2] = {sums[4 * c + j], sums[4 * c + j + 2]};
      store_results<D, 2>(args, tile.split, tile.x_row + 8 * c + 2 * quad + j, column, width, values);
    }
  }
}

// ---- registers ----------------------------------------------------------------------------------------------

template <int kColumns>
inline constexpr int kRingBlocks = kColumns <= 64 ? 2 : 1;  // on a processor
// Of a copying and of a multiplying thread, where the even share is not the right one.
template <int kColumns>
inline constexpr bool kUneven = kColumns != 128;
template <int kColumns>
inline constexpr int kFewRegisters = kColumns == 256 ? 56 : 48;
template <int kColumns>
inline constexpr int kManyRegisters = kColumns == 256 ? 224 : 96;

template <int kColumns>
FASTLORA_DEVICE void take_few_registers() {
  if constexpr (kUneven<kColumns>) lower_registers<kFewRegisters<kColumns>>();
}
template <int kColumns>
FASTLORA_DEVICE void take_many_registers() {
  if constexpr (kUneven<kColumns>) raise_registers<kManyRegisters<kColumns>>();
}

}  // namespace fastlora::cuda
