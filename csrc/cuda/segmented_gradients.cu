// dA = Σ v[p]ᵀ·x[order[p]] and dB = s·Σ u[p]ᵀ·dy[order[p]] over the rows of every adapter: one product for both,
// in one launch, into rows of the pools.
//
// As lora_gradients does it: a block has 128 columns of the tall operand, up to 64 ranks, and the rows of one
// segment, which it goes through 64 at a time: cp.async gathers them into a ring in shared memory, from where
// ldmatrix takes both operands transposed. Sums over rows stay in registers to the end, and leave by way of shared
// memory as whole rows of the pool. Rows are added in their order. Long segments may be cut where positions pass a
// multiple of row_share; segmented_sum adds their parts.
#include "launch.cuh"
#include "segmented_kernels.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64, kColumns = 128;  // of a tile
constexpr int kTileBytes = kRows * kColumns * 2;
constexpr int kRing = 4;
constexpr int kSmallAt = kRing * kTileBytes;
constexpr int kSumPitch = kColumns + 4;  // of a rank's sums in the end: a quad's ranks in different banks

template <int kTiles>
constexpr int kSmallBytes = kRows * 32 * kTiles;
static_assert(64 * kSumPitch * 4 <= kSmallAt);
template <int kTiles>
constexpr int kSharedBytes = kSmallAt + 2 * kSmallBytes<kTiles>;

// What a block does: which gradient, from which column and rank of it on, and of which rows.
struct Work {
  const PoolGradient* gradient;
  Adapter adapter;
  Span segment;
  int column, rank;  // the block's first
  int begin, end;    // positions
};

// Of unit `number`. False where there is nothing to do.
FASTLORA_DEVICE bool find_work(const GradientArgs& args, int number, int columns, int ranks, Work* out) {
  const Unit unit = find_unit<false>(args.segments, number, args.row_share, &out->segment);
  if (unit.count == 0 || unit.slot < 0) return false;
  int block = block_index_y(), which = 0;
  for (; which + 1 < args.count; ++which) {
    const PoolGradient& g = args.of[which];
    const int blocks = ((g.width + columns - 1) / columns) * ((g.ranks + ranks - 1) / ranks);
    if (block < blocks) break;
    block -= blocks;
  }
  out->gradient = &args.of[which];
  const int column_blocks = (out->gradient->width + columns - 1) / columns;
  out->column = block % column_blocks * columns;
  out->rank = block / column_blocks * ranks;
  out->adapter = adapter_of(args.slices, out->gradient->slice, unit.slot);
  out->begin = unit.begin;
  out->end = unit.begin + unit.count;
  return out->rank < out->adapter.rank;
}

// `kCount` adjacent sums of rank `rank` from `column` on: to the pool, or to the part that they are.
template <int kCount>
FASTLORA_DEVICE void store_gradient(const GradientArgs& args, const Work& work, int rank, int column,
                                    float (&sums)[kCount]) {
  const PoolGradient& g = *work.gradient;
  const float scale = g.scaled ? work.adapter.scale : 1.0f;
  FASTLORA_UNROLL
  for (int i = 0; i < kCount; ++i) sums[i] = multiply(sums[i], scale);
  if (work.begin > work.segment.begin || work.end < work.segment.end) {
    const int64_t part = 2 * (work.begin / args.row_share) + (work.begin == work.segment.begin ? 1 : 0);
    float* to = args.parts + part * args.part_size + g.part_at + static_cast<int64_t>(rank) * g.width + column;
    store_row(to, 0, g.width - column, DType::kFloat32, args.pool_vectors, sums);
    return;
  }
  const int64_t index = static_cast<int64_t>(work.adapter.first + rank) * g.width + column;
  store_row(g.pool, index, g.width - column, args.slices.dtype, args.pool_vectors, sums);
}

template <DType D, int kTiles>
struct Gradients {
  static constexpr int kVectors = 2 * kTiles;  // of 8 ranks, of a row of small
  const GradientArgs& args;
  const Work& work;
  const int warp = warp_index(), lane = lane_index();

  static FASTLORA_DEVICE int tile_place(int row, int vector) {
    return vector / 8 * kRows * 128 + row * 128 + (vector % 8 ^ row % 8) * 16;
  }
  static FASTLORA_DEVICE int small_place(int row, int vector) {
    constexpr int kShift = kTiles == 1 ? 2 : kTiles == 2 ? 1 : 0;
    return row * kVectors * 16 + (vector ^ (row >> kShift & (kVectors - 1))) * 16;
  }

  FASTLORA_DEVICE void copy_tile(int index) const {
    const PoolGradient& g = *work.gradient;
    const int begin = work.begin + index * kRows;
    if (begin < work.end) {
      FASTLORA_UNROLL
      for (int j = 0; j < kRows * 16 / kThreads; ++j) {
        const int i = thread_index() + kThreads * j, position = begin + i / 16, c = work.column + i % 16 * 8;
        const int row = position < work.end ? row_at(args.segments, position) : -1;
        const int left = row < 0 ? 0 : g.width - c;
        const auto* from = static_cast<const uint16_t*>(g.tall) +
                           static_cast<int64_t>(row < 0 ? 0 : row) * g.tall_width + g.column + c;
        auto* to = shared_memory<uint8_t>(index % kRing * kTileBytes + tile_place(i / 16, i % 16));
        if (g.vectors) {
          copy_async<16>(to, from, left > 0 ? 16 : 0);
        } else {
          store_shared(reinterpret_cast<Words4*>(to), load_halves(from, left, false));
        }
      }
    }
    copy_async_commit();
  }

  // Eight ranks of a row of small, a thread's share of 64 rows.
  static constexpr int kShare = (kRows * kVectors + kThreads - 1) / kThreads;
  FASTLORA_DEVICE void load_small(int index, Words4 (&out)[kShare]) const {
    FASTLORA_UNROLL
    for (int j = 0; j < kShare; ++j) {
      const int i = thread_index() + kThreads * j, position = work.begin + index * kRows + i / kVectors;
      const int rank = work.rank + i % kVectors * 8;
      const bool inside = position < work.end && i < kRows * kVectors;
      const auto* from = static_cast<const uint16_t*>(work.gradient->small) +
                         static_cast<int64_t>(position) * args.ranks + work.gradient->rank_at + rank;
      // Columns past the slice are another's.
      out[j] = load_halves(from, inside ? work.adapter.rank - rank : 0, args.small_vectors);
    }
  }
  FASTLORA_DEVICE void store_small(int turn, const Words4 (&values)[kShare]) const {
    FASTLORA_UNROLL
    for (int j = 0; j < kShare; ++j) {
      const int i = thread_index() + kThreads * j;
      if (i >= kRows * kVectors) break;
      store_shared(shared_memory<Words4>(kSmallAt + turn % 2 * kSmallBytes<kTiles> +
                                         small_place(i / kVectors, i % kVectors)),
                   values[j]);
    }
  }

  // Columns 16 * warp .. + 15 of a tile by all ranks.
  FASTLORA_DEVICE void multiply_rows(int index, int tiles, float (&sums)[2 * kTiles][4]) const {
    const int small = kSmallAt + index % 2 * kSmallBytes<kTiles>;
    FASTLORA_UNROLL
    for (int step = 0; step < kRows / 16; ++step) {
      uint32_t a[4];
      const int row = 16 * step + lane / 16 * 8 + lane % 8, vector = 2 * warp + lane / 8 % 2;
      load_matrix<4, true>(a, shared_memory<uint8_t>(index % kRing * kTileBytes + tile_place(row, vector)));
      FASTLORA_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile >= tiles) break;
        uint32_t b[4];
        load_matrix<4, true>(
            b, shared_memory<uint8_t>(small + small_place(16 * step + lane % 16, 2 * tile + lane / 16)));
        FASTLORA_UNROLL
        for (int j = 0; j < 2; ++j) {
          const uint32_t right[2] = {b[2 * j], b[2 * j + 1]};
          multiply_tile<D>(sums[2 * tile + j], a, right);
        }
      }
    }
  }

  // By way of shared memory, (ranks, columns) float32, of rows that are whole vectors of the pool.
  FASTLORA_DEVICE void store(int tiles, const float (&sums)[2 * kTiles][4]) const {
    auto* all = shared_memory<float>(0);
    const int group = lane / 4, quad = lane % 4;
    FASTLORA_UNROLL
    for (int tile = 0; tile < 2 * kTiles; ++tile) {
      FASTLORA_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int rank = 8 * tile + 2 * quad + j % 2, column = 16 * warp + group + j / 2 * 8;
        store_shared(all + rank * kSumPitch + column, sums[tile][j]);
      }
    }
    sync_threads();
    for (int i = thread_index(); i < 16 * tiles * kColumns / 8; i += kThreads) {
      const int rank = work.rank + i / (kColumns / 8), column = i % (kColumns / 8) * 8;
      if (rank >= work.adapter.rank || work.column + column >= work.gradient->width) continue;
      // Four lanes take their second half first, so that eight of them meet in no bank.
      const auto* from = reinterpret_cast<const Words4*>(all + i / (kColumns / 8) * kSumPitch + column);
      const bool swapped = lane / 4 % 2 == 1;
      const Words4 one = load_shared(from + (swapped ? 1 : 0)), two = load_shared(from + (swapped ? 0 : 1));
      float eight[8];
      FASTLORA_UNROLL
      for (int j = 0; j < 4; ++j) {
        eight[j] = float_of(swapped ? two.w[j] : one.w[j]);
        eight[4 + j] = float_of(swapped ? one.w[j] : two.w[j]);
      }
      store_gradient<8>(args, work, rank, work.column + column, eight);
    }
  }

  FASTLORA_DEVICE void run() const {
    const int left = (work.adapter.rank - work.rank + 15) / 16, tiles = left < kTiles ? left : kTiles;
    float sums[2 * kTiles][4] = {};
    FASTLORA_UNROLL
    for (int i = 0; i < kRing - 1; ++i) copy_tile(i);
    Words4 small[kShare];
    load_small(0, small);
    const int turns = (work.end - work.begin + kRows - 1) / kRows;
    for (int turn = 0; turn < turns; ++turn) {
      store_small(turn, small);
      load_small(turn + 1, small);
      copy_async_wait<kRing - 2>();
      sync_threads();  // and all are done with the tile before, whose stage is filled next
      copy_tile(turn + kRing - 1);
      multiply_rows(turn, tiles, sums);
    }
    copy_async_wait<0>();
    sync_threads();
    store(tiles, sums);
  }
};

template <DType D, int kTiles>
FASTLORA_KERNEL(kThreads, 1)
segmented_gradients(FASTLORA_PARAMETER GradientArgs args) {
  for (int unit = block_index(); !past_units(args.segments, unit, args.row_share); unit += block_count()) {
    Work work;
    if (!find_work(args, unit, kColumns, 16 * kTiles, &work)) continue;
    const Gradients<D, kTiles> gradients{args, work};
    gradients.run();
    sync_threads();  // the sums have been read
  }
}

// ---- float32 ------------------------------------------------------------------------------------------------

constexpr int kPlainRanks = 8;

// A thread has a column and kPlainRanks ranks.
FASTLORA_DEVICE void add_rows(const GradientArgs& args, const Work& work) {
  const PoolGradient& g = *work.gradient;
  const int column = work.column + thread_index(), ranks = work.adapter.rank - work.rank;
  if (column >= g.width) return;
  float sums[kPlainRanks] = {};
  for (int position = work.begin; position < work.end; ++position) {
    const int row = row_at(args.segments, position);
    if (row < 0) continue;
    const float value = load_readonly(static_cast<const float*>(g.tall) +
                                      static_cast<int64_t>(row) * g.tall_width + g.column + column);
    const float* small =
        static_cast<const float*>(g.small) + static_cast<int64_t>(position) * args.ranks + g.rank_at + work.rank;
    FASTLORA_UNROLL
    for (int q = 0; q < kPlainRanks; ++q) {
      if (q < ranks) sums[q] = multiply_add(load_readonly(small + q), value, sums[q]);
    }
  }
  FASTLORA_UNROLL
  for (int q = 0; q < kPlainRanks; ++q) {
    float one[1] = {sums[q]};
    if (q < ranks) store_gradient<1>(args, work, work.rank + q, column, one);
  }
}

FASTLORA_KERNEL(kThreads, 2)
segmented_gradients_float(FASTLORA_PARAMETER GradientArgs args) {
  for (int unit = block_index(); !past_units(args.segments, unit, args.row_share); unit += block_count()) {
    Work work;
    if (find_work(args, unit, kThreads, kPlainRanks, &work)) add_rows(args, work);
  }
}

// ---- launches -----------------------------------------------------------------------------------------------

int work_blocks(const GradientArgs& args, int columns, int ranks) {
  int64_t blocks = 0;
  for (int i = 0; i < args.count; ++i) {
    blocks += ceil_div(args.of[i].width, columns) * ceil_div(args.of[i].ranks, ranks);
  }
  return static_cast<int>(blocks);
}

template <DType D, int kTiles>
Status launch_as(const GradientArgs& args, void* stream) {
  const int work = work_blocks(args, kColumns, 16 * kTiles);
  const LaunchShape shape{.blocks = unit_blocks(args.segments, args.row_share, work),
                          .blocks_y = work,
                          .threads = kThreads,
                          .shared_bytes = kSharedBytes<kTiles>};
  return FASTLORA_LAUNCH((segmented_gradients<D, kTiles>), shape, args, stream);
}

template <DType D>
Status launch_dtype(const GradientArgs& args, void* stream) {
  int widest = 0;
  for (int i = 0; i < args.count; ++i) widest = args.of[i].ranks > widest ? args.of[i].ranks : widest;
  return widest <= 16 ? launch_as<D, 1>(args, stream) : launch_as<D, 4>(args, stream);
}

}  // namespace

Status launch_segmented_gradients(const GradientArgs& args, DType dtype, void* stream) {
  if (dtype == DType::kBFloat16) return launch_dtype<DType::kBFloat16>(args, stream);
  if (dtype == DType::kFloat16) return launch_dtype<DType::kFloat16>(args, stream);
  const int work = work_blocks(args, kThreads, kPlainRanks);
  const LaunchShape shape{
      .blocks = unit_blocks(args.segments, args.row_share, work), .blocks_y = work, .threads = kThreads};
  return FASTLORA_LAUNCH(segmented_gradients_float, shape, args, stream);
}

}  // namespace fastlora::cuda
