// u = x·Aᵀ, and v = s·dy·B, where every row has an adapter of its own: the first of the two thin products.
//
// As lora_project, for the rows of one adapter: a warp holds 16 or more rows of the pool as left operands and 8 or
// 32 rows of x, gathered, as right ones, and takes every eighth block of 64 columns; the block's warps are added
// in order. Operands come straight from global memory, 16 bytes at a time: a quad reads whole sectors. Of a tile's
// ranks and rows those that are not there cost nothing. What a row's sum is does not depend on which rows it
// shares a tile with. Where few blocks would read for too long, the contraction is split over more of them, and
// lora_sum adds the parts.
//
// float32 has a kernel of its own, without tensor instructions.
#include "launch.cuh"
#include "segmented_kernels.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

// The warps' sums: (warps, rows of x, rows of A), rows of kPitch, so that a quad's rows are in different banks.
template <int kTiles>
constexpr int kPitch = 16 * kTiles + 4;
template <int kColumns, int kTiles>
constexpr int kSharedBytes = kWarps * kPitch<kTiles> * 8 * kColumns * 4;

// Which slice a block has, and the first of its `per` ranks.
FASTLORA_DEVICE SliceBlock rank_block(const Slices& slices, int per) {
  return slice_block(slices, block_index_y(), per, [](const SliceView& slice) { return slice.ranks; });
}

// Where the result for a position and a slice's rank goes: rounded, or, in float32, to the split's part.
template <DType D>
FASTLORA_DEVICE void store_inner(const ShrinkArgs& args, int split, int position, int column, float value) {
  const int64_t index = static_cast<int64_t>(position) * args.slices.ranks + column;
  if (args.parts == nullptr) {
    Element<D>::store(args.u, index, value);
  } else {
    store_global(args.parts + static_cast<int64_t>(split) * args.segments.m * args.slices.ranks + index, value);
  }
}

template <DType D, int kColumns, int kTiles>
FASTLORA_DEVICE void shrink_tile(const ShrinkArgs& args, const Unit& tile) {
  constexpr int kXRows = 8 * kColumns, kARows = 16 * kTiles;
  const SliceBlock at = rank_block(args.slices, kARows);
  const SliceView& slice = args.slices.of[at.slice];
  const Adapter adapter = adapter_of(args.slices, at.slice, tile.slot);
  const int split = block_index_z(), group = lane_index() / 4, quad = lane_index() % 4;
  const int ranks = adapter.rank - at.first;  // from the block's first on
  const int width = slice.width;
  const int blocks = ranks > 0 ? (width + 63) / 64 : 0, share = (blocks + args.splits - 1) / args.splits;
  const int end = (split + 1) * share < blocks ? (split + 1) * share : blocks;

  int64_t x_from[kColumns];  // where rows of x begin, or -1
  FASTLORA_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const int row = 8 * c + group < tile.count ? row_at(args.segments, tile.begin + 8 * c + group) : -1;
    x_from[c] = row < 0 ? -1 : static_cast<int64_t>(row) * args.width + slice.column;
  }
  float sums[kTiles][kColumns][4] = {};
  for (int block = split * share + warp_index(); block < end; block += kWarps) {
    const int column = 64 * block + 8 * quad;
    Words4 x[kColumns][2];
    FASTLORA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      FASTLORA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int first = column + 32 * i, valid = x_from[c] < 0 ? 0 : width - first;
        x[c][i] = load_octet<D>(args.x, x_from[c] + first, valid, D, args.x_vectors, 1.0f);
      }
    }
    FASTLORA_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      if (t > 0 && 16 * t >= ranks) break;
      Words4 a[2][2];
      FASTLORA_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int rank = 16 * t + 8 * h + group;
        const int64_t from = static_cast<int64_t>(adapter.first + at.first + rank) * slice.width;
        FASTLORA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int first = column + 32 * i, valid = rank < ranks ? width - first : 0;
          a[h][i] = load_octet<D>(slice.pool, from + first, valid, args.slices.dtype, args.slices.vectors, 1.0f);
        }
      }
      FASTLORA_UNROLL
      for (int step = 0; step < 4; ++step) {
        const int i = step / 2, w = step % 2 * 2;
        const uint32_t left[4] = {a[0][i].w[w], a[1][i].w[w], a[0][i].w[w + 1], a[1][i].w[w + 1]};
        FASTLORA_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          if (c > 0 && 8 * c >= tile.count) break;
          const uint32_t right[2] = {x[c][i].w[w], x[c][i].w[w + 1]};
          multiply_tile<D>(sums[t][c], left, right);
        }
      }
    }
  }

  auto* all = shared_memory<float>(0);
  FASTLORA_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    FASTLORA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      FASTLORA_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int row = 8 * c + 2 * quad + j % 2, rank = 16 * t + group + j / 2 * 8;
        store_shared(all + (warp_index() * kXRows + row) * kPitch<kTiles> + rank, sums[t][c][j]);
      }
    }
  }
  sync_threads();
  for (int i = thread_index(); i < kXRows * kARows; i += kThreads) {
    // Two rows that a warp reads at once, where a row is half a warp, are 4 apart: in different banks.
    const int rank = i % kARows;
    const int row = kTiles > 1 ? i / kARows : i / 128 * 8 + i / 16 % 2 * 4 + i / 32 % 4;
    if (row >= tile.count || at.first + rank >= slice.ranks) continue;
    float sum = 0.0f;
    for (int w = 0; rank < ranks && w < kWarps; ++w) {
      sum = add(sum, load_shared(all + (w * kXRows + row) * kPitch<kTiles> + rank));
    }
    if (rank < ranks) sum = multiply(sum, adapter.scale);
    store_inner<D>(args, split, tile.begin + row, slice.rank_at + at.first + rank, sum);
  }
}

template <DType D, int kColumns, int kTiles>
FASTLORA_KERNEL(kThreads, 1)
segmented_shrink(FASTLORA_PARAMETER ShrinkArgs args) {
  let_next_launch_begin();
  for (int unit = block_index(); !past_units(args.segments, unit, 8 * kColumns); unit += block_count()) {
    const Unit tile = find_tile(args.segments, unit, 8 * kColumns);
    if (tile.count == 0) continue;
    shrink_tile<D, kColumns, kTiles>(args, tile);
    sync_threads();  // the sums have been read
  }
}

// ---- float32 ------------------------------------------------------------------------------------------------

constexpr int kPlainRanks = 16;

// A warp has one row of x and kPlainRanks rows of the pool; lanes take every 32nd four columns, or columns.
FASTLORA_DEVICE void shrink_row(const ShrinkArgs& args, const Unit& tile) {
  const SliceBlock at = rank_block(args.slices, kPlainRanks);
  const SliceView& slice = args.slices.of[at.slice];
  const Adapter adapter = adapter_of(args.slices, at.slice, tile.slot);
  const int position = tile.begin + warp_index(), row = row_at(args.segments, position);
  const int ranks = row < 0 ? 0 : adapter.rank - at.first;
  const int width = ranks > 0 ? slice.width : 0;
  const int split = block_index_z(), share = (width + args.splits - 1) / args.splits / 128 * 128 + 128;
  const int end = (split + 1) * share < width ? (split + 1) * share : width;
  const int64_t x_from = static_cast<int64_t>(row) * args.width + slice.column;
  const bool vectors = args.x_vectors && args.slices.vectors;

  float sums[kPlainRanks] = {};
  for (int column = split * share + 4 * lane_index(); column < end; column += 128) {
    float x[4], a[4];
    load_quad(args.x, x_from + column, width - column, DType::kFloat32, vectors, x);
    FASTLORA_UNROLL
    for (int rank = 0; rank < kPlainRanks; ++rank) {
      if (rank >= ranks) break;
      const int64_t from = static_cast<int64_t>(adapter.first + at.first + rank) * slice.width + column;
      load_quad(slice.pool, from, width - column, args.slices.dtype, vectors, a);
      FASTLORA_UNROLL
      for (int i = 0; i < 4; ++i) sums[rank] = multiply_add(x[i], a[i], sums[rank]);
    }
  }
  FASTLORA_UNROLL
  for (int rank = 0; rank < kPlainRanks; ++rank) {
    for (int by = 16; by > 0; by /= 2) {
      sums[rank] = add(sums[rank], float_of(shuffle_xor(bits_of(sums[rank]), by, kAllLanes)));
    }
    if (lane_index() == 0 && at.first + rank < slice.ranks) {
      const float sum = rank < ranks ? multiply(sums[rank], adapter.scale) : 0.0f;
      store_inner<DType::kFloat32>(args, split, position, slice.rank_at + at.first + rank, sum);
    }
  }
}

FASTLORA_KERNEL(kThreads, 1)
segmented_shrink_float(FASTLORA_PARAMETER ShrinkArgs args) {
  let_next_launch_begin();
  for (int unit = block_index(); !past_units(args.segments, unit, kWarps); unit += block_count()) {
    const Unit tile = find_tile(args.segments, unit, kWarps);
    if (warp_index() < tile.count) shrink_row(args, tile);
  }
}

// ---- launches -----------------------------------------------------------------------------------------------

int rank_blocks(const Slices& slices, int per) {
  int blocks = 0;
  for (int j = 0; j < slices.count; ++j) blocks += static_cast<int>(ceil_div(slices.of[j].ranks, per));
  return blocks;
}

template <DType D, int kColumns, int kTiles>
Status launch_as(const ShrinkArgs& args, void* stream) {
  const int ranks = rank_blocks(args.slices, 16 * kTiles);
  const LaunchShape shape{.blocks = unit_blocks(args.segments, 8 * kColumns, ranks * args.splits),
                          .blocks_y = ranks,
                          .blocks_z = args.splits,
                          .threads = kThreads,
                          .shared_bytes = kSharedBytes<kColumns, kTiles>};
  return FASTLORA_LAUNCH((segmented_shrink<D, kColumns, kTiles>), shape, args, stream);
}

template <DType D>
Status launch_dtype(const ShrinkArgs& args, void* stream) {
  int widest = 0;
  for (int j = 0; j < args.slices.count; ++j) {
    if (args.slices.of[j].ranks > widest) widest = args.slices.of[j].ranks;
  }
  if (args.segments.m <= kFewRows) {
    return widest <= 16 ? launch_as<D, 1, 1>(args, stream) : launch_as<D, 1, 4>(args, stream);
  }
  return widest <= 16 ? launch_as<D, 4, 1>(args, stream) : launch_as<D, 4, 2>(args, stream);
}

}  // namespace

Status launch_segmented_shrink(const ShrinkArgs& args, DType dtype, void* stream) {
  if (dtype == DType::kBFloat16) return launch_dtype<DType::kBFloat16>(args, stream);
  if (dtype == DType::kFloat16) return launch_dtype<DType::kFloat16>(args, stream);
  const int ranks = rank_blocks(args.slices, kPlainRanks);
  const LaunchShape shape{.blocks = unit_blocks(args.segments, kWarps, ranks * args.splits),
                          .blocks_y = ranks,
                          .blocks_z = args.splits,
                          .threads = kThreads};
  return FASTLORA_LAUNCH(segmented_shrink_float, shape, args, stream);
}

}  // namespace fastlora::cuda
