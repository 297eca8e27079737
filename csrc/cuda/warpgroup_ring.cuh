// The ring between one warpgroup that copies and two that multiply, for the wgmma kernels of both directions.
//
// A stage is 64 steps of the contraction: 4 KiB of packed weights in 32 of the table's gaps, kColumns rows of x in the
// layout that products read (128 bytes a row, swizzled), and its scales. Full and empty mbarriers hand stages over; a
// copying thread hands one over when its own copies of it have landed, which it makes sure of kLag stages later.
#pragma once

#include "nf4_linear.cuh"
#include "warpgroup.cuh"

namespace fastlora::cuda {

inline constexpr int kGroupThreads = 128;                // of a warpgroup: the first copies
inline constexpr int kRingThreads = 3 * kGroupThreads;   // the others multiply
inline constexpr int kDepth = 64;                        // steps in a stage
inline constexpr int kRingGaps = 32;                     // of W in a stage
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
  // Those who multiply free a stage when they have the next: so two stages are theirs, and the copies of the others
  // may be under way.
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

// Where 16 bytes of row `row` of x lie in a stage.
FASTLORA_DEVICE int ring_x_place(int row, int vector) { return row * 128 + (vector ^ row % 8) * 16; }

// Rows of x of a stage, by the copying warpgroup: `rows` and `steps` are what is left from the stage's first on.
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

}  // namespace fastlora::cuda
