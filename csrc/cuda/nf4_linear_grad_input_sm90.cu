// nf4_linear_grad_input by warpgroup products, for compute capability 9.0a: tiles of 128 columns of dx by 16 to
// 256 rows of dy.
//
// As nf4_linear_sm90.cu, walked the other way: the contraction goes along the rows of W, whose packed bytes hold
// two columns each. A lane looks up one byte of every row, the two columns of dx that will be its own, and crosses
// the pairs of two rows into two words of the left operand (nf4_linear_grad_input_tile.cu does the same).
#include "kernels.cuh"
#include "launch.cuh"
#include "warpgroup_ring.cuh"

namespace fastlora::cuda {
namespace {

// The 32 bytes of row `row` of a stage that hold columns 64 * half and on of the tile: two rows in a gap. Rows
// that a warp reads at once differ by 2 and are in different quarters.
FASTLORA_DEVICE int row_place(int row, int half) {
  return row / 2 * kPairPitch + kGapBytes + ((row % 2 * 2 + half) ^ (row / 2 & 3)) * 32;
}

// The copying warpgroup's share of W: a quarter of a row and of the one 32 rows on of a thread; and the scales of
// a row and a half of the columns: one of 64 columns or two of 32.
template <DType D, int kColumns>
struct Weights {
  using R = Ring<kColumns>;
  static constexpr bool kInPairs = false;
  const ProductArgs& args;
  const RingTile& tile;
  const ScaleReader reader;
  const int row = thread_index() / 4, vector = thread_index() % 4;                   // in the tile
  const int scale_row = thread_index() / 2, scale_column = thread_index() % 2 * 64;  // in the tile
  const uint8_t* from;
  RawScale raw[2];  // of the next stage

  FASTLORA_DEVICE Weights(const ProductArgs& a, const RingTile& t)
      : args(a),
        tile(t),
        reader(a.scales),
        from(a.packed + (t.begin + row) * a.row_bytes + t.first / 2 + 16 * vector) {
    fetch(t.begin);
  }

  // Outside of W those of its last row and column: dy is zero there, or nothing is kept.
  FASTLORA_DEVICE void fetch(int first) {
    const int r = first + scale_row < args.n ? first + scale_row : args.n - 1;
    FASTLORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (i > 0 && args.shift > 5) break;
      const int column = tile.first + scale_column + 32 * i, c = column < args.k ? column : args.k - 1;
      raw[i] = reader.fetch(r * (args.k >> args.shift) + (c >> args.shift));
    }
  }

  FASTLORA_DEVICE void copy(int index, int stage) {
    const int first = tile.begin + index * kDepth;
    FASTLORA_UNROLL
    for (int j = 0; j < 2; ++j) {  // 32 rows on are 16 gaps on
      const bool inside = first + row + 32 * j < args.n && tile.first / 2 + 16 * vector < args.row_bytes;
      copy_async<16>(shared_memory<uint8_t>(stage * kRingWBytes + row_place(row, vector / 2) + vector % 2 * 16 +
                                            j * 16 * kPairPitch),
                     from + j * 32 * args.row_bytes, inside ? 16 : 0);
    }
    from += kDepth * args.row_bytes;
    FASTLORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (i > 0 && args.shift > 5) break;
      const float scale = reader.decode(raw[i], shared_memory<float>(R::Layout::kFactorsAt), 1.0f / kStretch<D>);
      const int which = args.shift > 5 ? scale_column / 64 : scale_column / 32 + i;
      store_shared(R::scales(stage) + which * kDepth + scale_row, split_scale<D>(scale));
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
  const int warp = (thread_index() - kGroupThreads) / 32, half = warp / 4;
  // Columns 2 * group and the next of this warp's 16 are rows group and group + 8 of its operands.
  const int column = 16 * warp + 2 * group;  // in the tile
  const int spot[2] = {row_place(2 * quad, half) + column % 64 / 2,
                       row_place(2 * quad + 1, half) + column % 64 / 2};
  const uint32_t copy = 4 * static_cast<uint32_t>(lane_index());
  const int scale_spot = (args.shift > 5 ? half : warp / 2) * kDepth + 2 * quad;

  FASTLORA_DEVICE void make(int index, uint32_t (&a)[4][4]) const {
    const int stage = index % R::kStages;
    FASTLORA_UNROLL
    for (int step = 0; step < 4; ++step) {
      uint32_t pairs[4];  // of rows 2t, 2t + 1, 2t + 8, 2t + 9
      FASTLORA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int first = 16 * step + 8 * i;  // two rows are a gap
        const Words2 scales = load_shared(reinterpret_cast<const Words2*>(R::scales(stage) + scale_spot + first));
        FASTLORA_UNROLL
        for (int odd = 0; odd < 2; ++odd) {
          const uint8_t byte =
              load_shared(shared_memory<uint8_t>(stage * kRingWBytes + spot[odd] + first / 2 * kPairPitch));
          pairs[2 * i + odd] = scaled<D>(look_up(byte, pick_byte(0), copy), pair_scale(scales.w[odd]));
        }
      }
      transpose_pairs(a[step], pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }

  template <int kSteps>
  FASTLORA_DEVICE void make_factor(int r0, uint32_t (&a)[4][4]) const {
    FASTLORA_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t pairs[4];
      FASTLORA_UNROLL
      for (int q = 0; q < 4; ++q) {
        const int row = r0 + 16 * step + 2 * quad + q % 2 + q / 2 * 8;
        float values[2] = {0.0f, 0.0f};
        FASTLORA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int c = tile.first + column + i;
          if (row < args.r && c < args.k) {
            values[i] = load_any(args.factor, static_cast<int64_t>(row) * args.k + c, args.factor_dtype);
          }
        }
        pairs[q] = pack_pair<D>(values[0], values[1]);
      }
      transpose_pairs(a[step], pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
};

template <DType D, int kColumns>
FASTLORA_KERNEL(kRingThreads, kRingBlocks<kColumns>)
nf4_linear_grad_input_sm90(FASTLORA_PARAMETER ProductArgs args) {
  const RingTile tile = ring_tile<kColumns>(args, args.n);
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
    store_ring<D, kColumns>(args, tile, tile.first + operands.column, args.k, sums);
  }
}

template <DType D, int kColumns>
Status launch_as(const ProductArgs& args, bool overlaps, void* stream) {
  return FASTLORA_LAUNCH((nf4_linear_grad_input_sm90<D, kColumns>), ring_shape<kColumns>(args, args.k, overlaps),
                         args, stream);
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

Status launch_nf4_linear_grad_input_sm90(const ProductArgs& args, DType dtype, int columns, bool overlaps,
                                         void* stream) {
  return dtype == DType::kBFloat16 ? launch_dtype<DType::kBFloat16>(args, columns, overlaps, stream)
                                   : launch_dtype<DType::kFloat16>(args, columns, overlaps, stream);
}

}  // namespace fastlora::cuda
