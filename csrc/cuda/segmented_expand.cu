// y += s·u·B, and dx += v·A, where every row has an adapter of its own: the second of the two thin products. y is
// read once and written once; rows without an adapter are not touched.
//
// A warp has 64 adjacent columns of y, as in nf4_linear_grad_input_tile.cu: a lane takes eight adjacent columns of
// the pool's rows, so that it ends with eight adjacent columns of y, and both are whole sectors. u is the right
// operand, straight from global memory. A product takes 16 ranks; those past the adapter's own are not read.
//
// Slices write to columns of their own (forward), or all to the same ones (backward, where they are slices of dy).
#include "launch.cuh"
#include "segmented_kernels.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpColumns = 64;
constexpr int kBlockColumns = kWarps * kWarpColumns;

struct Range {
  int first_slice, slices;  // that this block adds up
  int column;               // the block's first, of a pool's row
};
FASTLORA_DEVICE Range block_range(const ExpandArgs& args, int per) {
  if (args.same_columns) return {0, args.slices.count, block_index_y() * per};
  const SliceBlock at =
      slice_block(args.slices, block_index_y(), per, [](const SliceView& slice) { return slice.width; });
  return {at.slice, 1, at.first};
}

// y[index ..] += scale * sums, of which `valid` are columns of y.
template <DType D, int kCount>
FASTLORA_DEVICE void add_to(void* y, int64_t index, int valid, bool vectors, float scale,
                            const float (&sums)[kCount]) {
  constexpr int kPer = Element<D>::kPerVector;
  static_assert(kCount % kPer == 0);
  if (vectors && valid >= kCount) {
    FASTLORA_UNROLL
    for (int v = 0; v < kCount / kPer; ++v) {
      auto* at = reinterpret_cast<Words4*>(static_cast<uint8_t*>(y) + index * Element<D>::kBytes) + v;
      float values[kPer];
      Element<D>::unpack(load_global(at), values);
      FASTLORA_UNROLL
      for (int i = 0; i < kPer; ++i) values[i] = multiply_add(scale, sums[v * kPer + i], values[i]);
      store_global(at, Element<D>::pack(values));
    }
    return;
  }
  FASTLORA_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (i >= valid) break;
    const float before = load_element<D>(y, index + i);
    Element<D>::store(y, index + i, multiply_add(scale, sums[i], before));
  }
}

template <DType D, int kColumns>
struct Expand {
  const ExpandArgs& args;
  const Unit tile;
  const Range range;
  const int group = lane_index() / 4, quad = lane_index() % 4;
  const int column = range.column + warp_index() * kWarpColumns + 8 * group;  // the lane's first
  float sums[4][kColumns][4] = {};

  // Eight columns of ranks r0 + 4 * quad and the next three: any order of ranks will do, if u has the same.
  FASTLORA_DEVICE void load_factor(const SliceView& slice, const Adapter& adapter, int r0,
                                   Words4 (&out)[4]) const {
    FASTLORA_UNROLL
    for (int q = 0; q < 4; ++q) {
      const int rank = r0 + 4 * quad + q;
      out[q] = load_octet<D>(slice.pool, static_cast<int64_t>(adapter.first + rank) * slice.width + column,
                             rank < adapter.rank ? slice.width - column : 0, args.slices.dtype,
                             args.slices.vectors, 1.0f);
    }
  }

  FASTLORA_DEVICE void multiply_step(const SliceView& slice, const Adapter& adapter, int r0,
                                     const Words4 (&factor)[4]) {
    uint32_t a[4][4];
    FASTLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      transpose_pairs(a[i], factor[0].w[i], factor[1].w[i], factor[2].w[i], factor[3].w[i]);
    }
    FASTLORA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if (c > 0 && 8 * c >= tile.count) break;
      const int row = 8 * c + group, rank = r0 + 4 * quad;
      const auto* from = static_cast<const uint16_t*>(args.u) +
                         static_cast<int64_t>(tile.begin + row) * args.slices.ranks + slice.rank_at + rank;
      uint32_t b[2];
      load_ranks(from, row < tile.count ? adapter.rank - rank : 0, args.u_quads, b);
      FASTLORA_UNROLL
      for (int i = 0; i < 4; ++i) multiply_tile<D>(sums[i][c], a[i], b);
    }
  }

  FASTLORA_DEVICE void run() {
    Adapter adapter = adapter_of(args.slices, range.first_slice, tile.slot);
    Words4 factor[4];
    if (adapter.rank > 0) load_factor(args.slices.of[range.first_slice], adapter, 0, factor);
    wait_for_previous_launch();  // u is there
    bool any = false;
    for (int j = 0; j < range.slices; ++j) {
      const SliceView& slice = args.slices.of[range.first_slice + j];
      if (j > 0) {
        adapter = adapter_of(args.slices, range.first_slice + j, tile.slot);
        if (adapter.rank > 0) load_factor(slice, adapter, 0, factor);
      }
      any = any || adapter.rank > 0;
      for (int r0 = 0; r0 < adapter.rank; r0 += 16) {
        Words4 next[4];
        load_factor(slice, adapter, r0 + 16, next);
        multiply_step(slice, adapter, r0, factor);
        FASTLORA_UNROLL
        for (int q = 0; q < 4; ++q) factor[q] = next[q];
      }
    }
    if (any) store(args.same_columns ? 1.0f : adapter.scale);
  }

  FASTLORA_DEVICE void store(float scale) const {
    const SliceView& slice = args.slices.of[range.first_slice];
    FASTLORA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      FASTLORA_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int in_tile = 8 * c + 2 * quad + j;
        const int row = in_tile < tile.count ? row_at(args.segments, tile.begin + in_tile) : -1;
        if (row < 0) continue;
        float values[8];
        FASTLORA_UNROLL
        for (int i = 0; i < 8; ++i) values[i] = sums[i / 2][c][j + i % 2 * 2];
        const int first = args.same_columns ? 0 : slice.column;
        add_to<D>(args.y, static_cast<int64_t>(row) * args.width + first + column, slice.width - column,
                  args.y_vectors, scale, values);
      }
    }
  }
};

template <DType D, int kColumns>
FASTLORA_KERNEL(kThreads, kColumns == 1 ? 4 : 2)
segmented_expand(FASTLORA_PARAMETER ExpandArgs args) {
  const Range range = block_range(args, kBlockColumns);
  for (int unit = block_index(); !past_units(args.segments, unit, 8 * kColumns); unit += block_count()) {
    const Unit tile = find_tile(args.segments, unit, 8 * kColumns);
    if (tile.count == 0 || tile.slot < 0) continue;
    Expand<D, kColumns> expand{args, tile, range};
    expand.run();
  }
  wait_for_previous_launch();  // every block has to
}

// ---- float32 ------------------------------------------------------------------------------------------------

constexpr int kPlainRows = 8, kPlainColumns = 4 * kThreads;

// A thread has four adjacent columns of 8 rows.
FASTLORA_DEVICE void expand_rows(const ExpandArgs& args, const Unit& tile, const Range& range) {
  const int column = range.column + 4 * thread_index();
  float sums[kPlainRows][4] = {};
  Adapter adapter{0, 0, 0.0f};
  bool any = false;
  for (int j = 0; j < range.slices; ++j) {
    const SliceView& slice = args.slices.of[range.first_slice + j];
    adapter = adapter_of(args.slices, range.first_slice + j, tile.slot);
    any = any || adapter.rank > 0;
    for (int rank = 0; rank < adapter.rank; ++rank) {
      float b[4];
      load_quad(slice.pool, static_cast<int64_t>(adapter.first + rank) * slice.width + column,
                slice.width - column, args.slices.dtype, args.slices.vectors, b);
      FASTLORA_UNROLL
      for (int row = 0; row < kPlainRows; ++row) {
        if (row >= tile.count) break;
        const float u =
            load_global(static_cast<const float*>(args.u) +
                        static_cast<int64_t>(tile.begin + row) * args.slices.ranks + slice.rank_at + rank);
        FASTLORA_UNROLL
        for (int i = 0; i < 4; ++i) sums[row][i] = multiply_add(u, b[i], sums[row][i]);
      }
    }
  }
  if (!any) return;
  const SliceView& slice = args.slices.of[range.first_slice];
  const int first = args.same_columns ? 0 : slice.column;
  FASTLORA_UNROLL
  for (int i = 0; i < kPlainRows; ++i) {
    const int row = i < tile.count ? row_at(args.segments, tile.begin + i) : -1;
    if (row < 0) continue;
    add_to<DType::kFloat32>(args.y, static_cast<int64_t>(row) * args.width + first + column, slice.width - column,
                            args.y_vectors, args.same_columns ? 1.0f : adapter.scale, sums[i]);
  }
}

FASTLORA_KERNEL(kThreads, 4)
segmented_expand_float(FASTLORA_PARAMETER ExpandArgs args) {
  const Range range = block_range(args, kPlainColumns);
  wait_for_previous_launch();
  for (int unit = block_index(); !past_units(args.segments, unit, kPlainRows); unit += block_count()) {
    const Unit tile = find_tile(args.segments, unit, kPlainRows);
    if (tile.count > 0 && tile.slot >= 0) expand_rows(args, tile, range);
  }
}

// ---- launches -----------------------------------------------------------------------------------------------

int column_blocks(const ExpandArgs& args, int per) {
  if (args.same_columns) return static_cast<int>(ceil_div(args.width, per));
  int blocks = 0;
  for (int j = 0; j < args.slices.count; ++j) blocks += static_cast<int>(ceil_div(args.slices.of[j].width, per));
  return blocks;
}

template <DType D, int kColumns>
Status launch_as(const ExpandArgs& args, void* stream) {
  const int columns = column_blocks(args, kBlockColumns);
  const LaunchShape shape{.blocks = unit_blocks(args.segments, 8 * kColumns, columns),
                          .blocks_y = columns,
                          .threads = kThreads,
                          .overlaps = true};
  return FASTLORA_LAUNCH((segmented_expand<D, kColumns>), shape, args, stream);
}

template <DType D>
Status launch_dtype(const ExpandArgs& args, void* stream) {
  return args.segments.m <= kFewRows ? launch_as<D, 1>(args, stream) : launch_as<D, 4>(args, stream);
}

}  // namespace

Status launch_segmented_expand(const ExpandArgs& args, DType dtype, void* stream) {
  if (dtype == DType::kBFloat16) return launch_dtype<DType::kBFloat16>(args, stream);
  if (dtype == DType::kFloat16) return launch_dtype<DType::kFloat16>(args, stream);
  const int columns = column_blocks(args, kPlainColumns);
  const LaunchShape shape{.blocks = unit_blocks(args.segments, kPlainRows, columns),
                          .blocks_y = columns,
                          .threads = kThreads,
                          .overlaps = true};
  return FASTLORA_LAUNCH(segmented_expand_float, shape, args, stream);
}

}  // namespace fastlora::cuda
