// nf4_linear by warpgroup products, for compute capability 9.0a: tiles of 128 columns of y by 16 to 256 rows of x.
//
// Two warpgroups multiply 64 rows of W each; W is the left operand and comes from registers, so that it goes from
// packed bytes to the tensor cores without ever being in memory in another form. While one stage's products run,
// the next stage's operands are looked up. x is the right operand, read from shared memory by the tensor cores
// themselves. A third warpgroup copies, x in pairs: so that the order of k within a stage is the one in which a
// lane's 8 bytes of a row of W lie together. The low-rank steps are more stages, with u in the place of x.
#include "kernels.cuh"
#include "launch.cuh"
#include "warpgroup_ring.cuh"

namespace fastlora::cuda {
namespace {

// A row's 32 bytes of a stage: four rows in a gap. Of rows that are read at once, every second one of 8, no two
// are in the same quarter.
FASTLORA_DEVICE int row_place(int row) { return row / 4 * kPairPitch + kGapBytes + (row % 4 ^ row / 4 % 2) * 32; }

// The copying warpgroup's share of W: half a row and the one 64 rows on of a thread, and a row's scales, one of 64
// columns or two of 32.
template <DType D, int kColumns>
struct Weights {
  using R = Ring<kColumns>;
  static constexpr bool kInPairs = true;
  const ProductArgs& args;
  const RingTile& tile;
  const ScaleReader reader;
  const int row = thread_index() / 2, column = thread_index() % 2 * 32;  // in the tile
  const uint8_t* from;
  int first_scale;
  RawScale raw[2];  // of the next stage

  FASTLORA_DEVICE Weights(const ProductArgs& a, const RingTile& t)
      : args(a),
        tile(t),
        reader(a.scales),
        from(a.packed + (t.first + row) * a.row_bytes + (t.begin + column) / 2) {
    const int scale_row = t.first + thread_index() < a.n ? t.first + thread_index() : a.n - 1;
    first_scale = scale_row * (a.k >> a.shift);
    fetch(t.begin);
  }

  // Past the end of k, where x is zero, the last scale of the row again.
  FASTLORA_DEVICE void fetch(int first) {
    FASTLORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (i > 0 && args.shift > 5) break;
      const int c = first + 32 * i < args.k ? first + 32 * i : args.k - 1;
      raw[i] = reader.fetch(first_scale + (c >> args.shift));
    }
  }

  FASTLORA_DEVICE void copy(int index, int stage) {
    const int first = tile.begin + index * kDepth;
    FASTLORA_UNROLL
    for (int j = 0; j < 2; ++j) {  // 64 rows on are 16 gaps on
      const bool inside = tile.first + row + 64 * j < args.n && first + column < args.k;
      copy_async<16>(
          shared_memory<uint8_t>(stage * kRingWBytes + row_place(row) + column / 2 + j * 16 * kPairPitch),
          from + j * 64 * args.row_bytes, inside ? 16 : 0);
    }
    from += kDepth / 2;
    FASTLORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (i > 0 && args.shift > 5) break;
      const float scale = reader.decode(raw[i], shared_memory<float>(R::Layout::kFactorsAt), 1.0f / kStretch<D>);
      store_shared(R::scales(stage) + i * kRingTile + thread_index(), split_scale<D>(scale));
    }
    fetch(first + kDepth);
  }
};

template <DType D, int kColumns>
struct Operands {
  using R = Ring<kColumns>;
  const ProductArgs& args;
  const RingTile& tile;
  const int group = lane_index() / 4, quad = lane_index() % 4;
  // Rows 2 * group and the next of this warp's 16 are rows group and group + 8 of its operands.
  const int row = (thread_index() - kGroupThreads) / 32 * 16 + 2 * group;  // in the tile
  // Columns 16 * quad .. + 15 of the stage.
  const int spot[2] = {row_place(row) + 8 * quad, row_place(row + 1) + 8 * quad};
  const int scale_spot = (args.shift > 5 ? 0 : quad / 2 * kRingTile) + row;
  const uint32_t copy = 4 * static_cast<uint32_t>(lane_index());

  // A step takes two bytes of a lane, the left and the right half of its 16 columns of an operand.
  FASTLORA_DEVICE void make(int index, uint32_t (&a)[4][4]) const {
    const int stage = index % R::kStages;
    FASTLORA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Words2 words = load_shared(shared_memory<Words2>(stage * kRingWBytes + spot[h]));
      const PairScale scale = pair_scale(load_shared(R::scales(stage) + scale_spot + h));
      FASTLORA_UNROLL
      for (int step = 0; step < 4; ++step) {
        FASTLORA_UNROLL
        for (int i = 0; i < 2; ++i) {
          a[step][2 * i + h] = scaled<D>(look_up(words.w[step / 2], pick_byte(step % 2 * 2 + i), copy), scale);
        }
      }
    }
  }

  template <int kSteps>
  FASTLORA_DEVICE void make_factor(int r0, uint32_t (&a)[4][4]) const {
    FASTLORA_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      FASTLORA_UNROLL
      for (int j = 0; j < 4; ++j) {
        a[step][j] = factor_pair<D>(args, tile.first + row + j % 2, r0 + 16 * step + 2 * quad + j / 2 * 8);
      }
    }
  }
};

template <DType D, int kColumns>
FASTLORA_KERNEL(kRingThreads, kRingBlocks<kColumns>)
nf4_linear_sm90(FASTLORA_PARAMETER ProductArgs args) {
  const RingTile tile = ring_tile<kColumns>(args, args.k);
  start_ring<D, kColumns>(args);
  if (thread_index() < kGroupThreads) {
    take_few_registers<kColumns>();
    Weights<D, kColumns> weights(args, tile);
    copy_ring<D, kColumns>(args, tile, weights);
  } else {
    take_many_registers<kColumns>();
    const Operands<D, kColumns> operands{args, tile};
    float sums[kColumns / 2] = {};
    multiply_ring<D, kColumns>(args, tile, operands, sums);
    let_next_launch_begin();
    store_ring<D, kColumns>(args, tile, tile.first + operands.row, args.n, sums);
  }
}

template <DType D, int kColumns>
Status launch_as(const ProductArgs& args, bool overlaps, void* stream) {
  return FASTLORA_LAUNCH((nf4_linear_sm90<D, kColumns>), ring_shape<kColumns>(args, args.n, overlaps), args,
                         stream);
}

template <DType D>
Status launch_dtype(const ProductArgs& args, int columns, bool overlaps, void* stream) {
  switch (columns) {
    case 16: return launch_as<D, 16>(args, overlaps, stream);
    case 32: return launch_as<D, 32>(args, overlaps, stream);
    case 64: return launch_as<D, 64>(args, overlaps, stream);
    case 128: return launch_as<D, 128>(args, overlaps, stream);
    default: return launch_as<D, 256>(args, overlaps, stream);
  }
}

}  // namespace

Status launch_nf4_linear_sm90(const ProductArgs& args, DType dtype, int columns, bool overlaps, void* stream) {
  return dtype == DType::kBFloat16 ? launch_dtype<DType::kBFloat16>(args, columns, overlaps, stream)
                                   : launch_dtype<DType::kFloat16>(args, columns, overlaps, stream);
}

}  // namespace fastlora::cuda
