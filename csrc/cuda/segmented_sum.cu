// What surrounds the gradients of the pools: zeros for all rows before, as nothing says on the host which of them
// will be written; and after them, where segments were cut, the sums of their parts, in order.
#include "launch.cuh"
#include "segmented_kernels.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPer = 8;  // adjacent elements of a thread

FASTLORA_KERNEL(kThreads, 4)
segmented_zero(FASTLORA_PARAMETER GradientArgs args) {
  const PoolGradient& g = args.of[block_index_y()];
  const int64_t count = static_cast<int64_t>(g.pool_rows) * g.width;
  const int64_t step = static_cast<int64_t>(block_count()) * kThreads * kPer;
  float zeros[kPer] = {};
  for (int64_t at = (static_cast<int64_t>(block_index()) * kThreads + thread_index()) * kPer; at < count;
       at += step) {
    const int64_t left = count - at;
    store_row(g.pool, at, left < kPer ? static_cast<int>(left) : kPer, args.slices.dtype, args.pool_vectors,
              zeros);
  }
}

// Block x: the segment that begins among the positions of share x and goes on beyond them; there is at most one.
// Block y: one gradient, and z: kThreads * kPer of an adapter's elements, and every so many further on.
FASTLORA_KERNEL(kThreads, 4)
segmented_sum(FASTLORA_PARAMETER GradientArgs args) {
  const int share = block_index(), next = (share + 1) * args.row_share;
  // Segments that begin before `next`: the last of them.
  const int found =
      count_segments(args.segments, [next](int, int slot, int first) { return slot >= 0 && first < next; });
  if (found == 0) return;
  const Span span = segment_span(args.segments, found - 1);
  if (span.begin < next - args.row_share || span.end <= next) return;
  const PoolGradient& g = args.of[block_index_y()];
  const Adapter adapter = adapter_of(args.slices, g.slice, span.slot);
  const int64_t count = static_cast<int64_t>(adapter.rank) * g.width;
  const int last = (span.end - 1) / args.row_share;
  for (int64_t at = (static_cast<int64_t>(block_index_z()) * kThreads + thread_index()) * kPer; at < count;
       at += static_cast<int64_t>(args.sum_blocks) * kThreads * kPer) {
    const int left = count - at < kPer ? static_cast<int>(count - at) : kPer;
    float sums[kPer] = {};
    for (int s = share; s <= last; ++s) {
      const float* part = args.parts + (2 * s + (s == share ? 1 : 0)) * args.part_size + g.part_at + at;
      if (args.pool_vectors) {
        FASTLORA_UNROLL
        for (int i = 0; i < kPer; i += 4) {
          const Words4 four = load_global(reinterpret_cast<const Words4*>(part + i));
          FASTLORA_UNROLL
          for (int j = 0; j < 4; ++j) sums[i + j] = add(sums[i + j], float_of(four.w[j]));
        }
      } else {
        FASTLORA_UNROLL
        for (int i = 0; i < kPer; ++i) {
          if (i < left) sums[i] = add(sums[i], load_global(part + i));
        }
      }
    }
    store_row(g.pool, static_cast<int64_t>(adapter.first) * g.width + at, left, args.slices.dtype,
              args.pool_vectors, sums);
  }
}

}  // namespace

Status launch_segmented_zero(const GradientArgs& args, void* stream) {
  int64_t most = 1;
  for (int i = 0; i < args.count; ++i) {
    const int64_t count = static_cast<int64_t>(args.of[i].pool_rows) * args.of[i].width;
    most = count > most ? count : most;
  }
  const int64_t blocks = ceil_div(most, kThreads * kPer);
  const LaunchShape shape{
      .blocks = static_cast<int>(blocks < 1024 ? blocks : 1024), .blocks_y = args.count, .threads = kThreads};
  return FASTLORA_LAUNCH(segmented_zero, shape, args, stream);
}

Status launch_segmented_sum(const GradientArgs& args, void* stream) {
  const LaunchShape shape{.blocks = static_cast<int>(ceil_div(args.segments.m, args.row_share)),
                          .blocks_y = args.count,
                          .blocks_z = args.sum_blocks,
                          .threads = kThreads};
  return FASTLORA_LAUNCH(segmented_sum, shape, args, stream);
}

}  // namespace fastlora::cuda
