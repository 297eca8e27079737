// nf4_linear by warpgroup products, for compute capability 9.0a: tiles of 128 columns of y by 16 to 256 rows of x.
//
// Two warpgroups multiply 64 rows of W each; W is the left operand and comes from registers, so that it goes from
// packed bytes to the tensor cores without ever being in memory in another form. While one stage's products run, the
// next stage's operands are looked up. x is the right operand, read from shared memory by the tensor cores themselves,
// in its own order of k: a lane reads the whole 32 bytes of its rows and picks the bytes that are its columns.
// A third warpgroup copies. The low-rank steps are more stages, with u in the place of x.
#include "kernels.cuh"
#include "launch.cuh"
#include "warpgroup_ring.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kRows = 128;  // columns of y in a tile

template <int kColumns>
constexpr int kBlocksPerProcessor = kColumns <= 64 ? 2 : 1;
// Registers of a copying and of a multiplying thread, where the even share is not the right one.
template <int kColumns>
constexpr bool kUneven = kColumns == 256 || kColumns <= 64;
template <int kColumns>
constexpr int kFewRegisters = kColumns == 256 ? 56 : 40;
template <int kColumns>
constexpr int kManyRegisters = kColumns == 256 ? 224 : 96;

struct TilePlace {
  int x_row, w_row, split, begin, end, stages, inner_stages;
};

template <int kColumns>
FASTLORA_DEVICE TilePlace place_of(const ProductArgs& args) {
  TilePlace at;
  at.x_row = block_index() * kColumns;  // neighbouring blocks have the same rows of W
  at.w_row = block_index_y() * kRows;
  at.split = block_index_z();
  at.begin = at.split * args.span;
  at.end = at.begin + args.span < args.k ? at.begin + args.span : args.k;
  at.stages = (at.end - at.begin + kDepth - 1) / kDepth;
  at.inner_stages = at.split == 0 ? (args.r + kDepth - 1) / kDepth : 0;
  return at;
}

// ---- the copying warpgroup ----------------------------------------------------------------------------------

template <DType D, int kColumns>
FASTLORA_DEVICE void copy_stages(const ProductArgs& args, const TilePlace& at) {
  using R = Ring<kColumns>;
  const ScaleReader reader(args.scales);
  const auto* factors = shared_memory<float>(R::Layout::kFactorsAt);
  const int thread = thread_index(), row_scales = args.k >> args.shift;
  // A thread has the scales of one row of W: of 64 columns, or two of 32.
  const int w_row = at.w_row + thread < args.n ? at.w_row + thread : args.n - 1;
  const auto fetch = [&](int column) {
    return reader.fetch(w_row * row_scales + ((column < args.k ? column : args.k - 1) >> args.shift));
  };
  const auto store = [&](int stage, int which, const RawScale& raw) {
    store_shared(R::scales(stage) + which * kRows + thread,
                 split_scale<D>(reader.decode(raw, factors, 1.0f / kStretch<D>)));
  };
  RawScale raw[2] = {fetch(at.begin), fetch(at.begin + 32)};
  const uint8_t* w_from = args.packed + (at.w_row + thread / 2) * args.row_bytes + at.begin / 2 + thread % 2 * 16;
  const uint16_t* x_from = static_cast<const uint16_t*>(args.x) + static_cast<int64_t>(at.x_row) * args.k + at.begin;
  for (int index = 0; index < at.stages; ++index) {
    const int stage = index % R::kStages, left = args.k - at.begin - index * kDepth;
    R::acquire(index);
    FASTLORA_UNROLL
    for (int j = 0; j < 2; ++j) {  // 64 rows on are 16 gaps on
      const int row = thread / 2;
      const bool inside = at.w_row + row + 64 * j < args.n && thread % 2 * 32 < left;
      copy_async<16>(gap(stage * kRingGaps + row / 4) + row % 4 * 32 + thread % 2 * 16 + j * 16 * kPairPitch,
                     w_from + j * 64 * args.row_bytes, inside ? 16 : 0);
    }
    copy_ring_x<kColumns>(R::x(stage), x_from, args.k, args.m - at.x_row, left);
    store(stage, 0, raw[0]);
    if (args.shift == 5) store(stage, 1, raw[1]);
    raw[0] = fetch(at.begin + (index + 1) * kDepth);
    if (args.shift == 5) raw[1] = fetch(at.begin + (index + 1) * kDepth + 32);
    R::commit(index);
    w_from += kDepth / 2;
    x_from += kDepth;
  }
  wait_for_previous_launch();
  for (int i = 0; i < at.inner_stages; ++i) {
    const int index = at.stages + i;
    R::acquire(index);
    fill_ring_inner<D, kColumns>(args, R::x(index % R::kStages), at.x_row, i * kDepth);
    R::commit(index);
  }
  R::drain(at.stages + at.inner_stages);
}

// ---- a multiplying one --------------------------------------------------------------------------------------

template <DType D, int kColumns>
struct Multiplier {
  using R = Ring<kColumns>;
  const ProductArgs& args;
  const TilePlace& at;
  const int group = lane_index() / 4, quad = lane_index() % 4;
  // Rows 2 * group and the next of this warp's 16 are rows group and group + 8 of its operands.
  const int row = (thread_index() - kGroupThreads) / 32 * 16 + 2 * group;
  const int w_spot = row / 4 * kPairPitch + kGapBytes + row % 4 * 32;
  const uint32_t copy = 4 * static_cast<uint32_t>(lane_index()), picked = pick_byte(static_cast<uint32_t>(quad));
  float sums[kColumns / 2] = {};

  // The operands of a stage, four steps of 16. A step is two words of a row: of one a lane takes its byte for columns
  // 2t and 2t + 1, of the other for those 8 on.
  FASTLORA_DEVICE void make_operands(int index, uint32_t (&a)[4][4]) const {
    const int stage = index % R::kStages;
    FASTLORA_UNROLL
    for (int h = 0; h < 2; ++h) {
      Words4 words[2];
      FASTLORA_UNROLL
      for (int i = 0; i < 2; ++i) {
        words[i] = load_shared(shared_memory<Words4>(stage * kRingWBytes + w_spot + h * 32 + i * 16));
      }
      const uint32_t* scales = R::scales(stage) + row + h;
      PairScale scale = pair_scale(load_shared(scales));
      FASTLORA_UNROLL
      for (int step = 0; step < 4; ++step) {
        if (step == 2 && args.shift == 5) scale = pair_scale(load_shared(scales + kRows));
        FASTLORA_UNROLL
        for (int i = 0; i < 2; ++i) {
          a[step][2 * i + h] = scaled<D>(look_up(words[step / 2].w[step % 2 * 2 + i], picked, copy), scale);
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
        a[step][j] = factor_pair<D>(args, at.w_row + row + j % 2, r0 + 16 * step + 2 * quad + j / 2 * 8);
      }
    }
  }

  template <int kSteps>
  FASTLORA_DEVICE void multiply(int index, uint32_t (&a)[4][4]) {
    keep_registers(sums);
    fence_warpgroup();
    FASTLORA_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      multiply_warpgroup<D, kColumns>(sums, a[step], R::x(index % R::kStages), step);
    }
    commit_warpgroup();
  }

  template <int kSteps>
  FASTLORA_DEVICE void multiply_factor(uint32_t (&a)[4][4]) {
    for (int i = 0; i < at.inner_stages; ++i) {
      make_factor<kSteps>(i * kDepth, a);
      R::wait_full(at.stages + i);
      multiply<kSteps>(at.stages + i, a);
      wait_warpgroup<0>();
      keep_registers(sums);
      R::release(at.stages + i);
    }
  }

  FASTLORA_DEVICE void run() {
    uint32_t a[2][4][4];
    int index = 0;
    // Two stages a trip, so that the operands' two sets of registers have names. While the products of one are under
    // way, the other is made.
    for (; index + 1 < at.stages; index += 2) {
      FASTLORA_UNROLL
      for (int set = 0; set < 2; ++set) {
        R::wait_full(index + set);
        make_operands(index + set, a[set]);
        multiply<4>(index + set, a[set]);
        wait_warpgroup<1>();  // the stage before is done
        if (index + set > 0) R::release(index + set - 1);
      }
    }
    if (index < at.stages) {
      R::wait_full(index);
      make_operands(index, a[0]);
      multiply<4>(index, a[0]);
    }
    wait_warpgroup<0>();
    keep_registers(sums);
    // Stages that the copying warpgroup still fills need those before them.
    if (at.stages > 1 && index < at.stages) R::release(at.stages - 2);
    if (at.stages > 0) R::release(at.stages - 1);
    wait_for_previous_launch();
    if (args.r <= 16) {
      multiply_factor<1>(a[0]);
    } else {
      multiply_factor<4>(a[0]);
    }
  }

  FASTLORA_DEVICE void store() {
    FASTLORA_UNROLL
    for (int c = 0; c < kColumns / 8; ++c) {
      FASTLORA_UNROLL
      for (int j = 0; j < 2; ++j) {
        float values[2] = {sums[4 * c + j], sums[4 * c + j + 2]};
        store_results<D, 2>(args, at.split, at.x_row + 8 * c + 2 * quad + j, at.w_row + row, args.n, values);
      }
    }
  }
};

template <DType D, int kColumns>
FASTLORA_KERNEL(kRingThreads, kBlocksPerProcessor<kColumns>)
nf4_linear_sm90(FASTLORA_PARAMETER ProductArgs args) {
  using R = Ring<kColumns>;
  const TilePlace at = place_of<kColumns>(args);
  if (thread_index() == 0) R::init();
  fill_pair_table<kRingThreads>(args.codes);
  fill_factors<kRingThreads>(shared_memory<float>(R::Layout::kFactorsAt),
                             args.scales.nested == nullptr ? nullptr : args.map, 1.0f / kStretch<D>);
  sync_threads();
  if (thread_index() < kGroupThreads) {
    if constexpr (kUneven<kColumns>) lower_registers<kFewRegisters<kColumns>>();
    copy_stages<D, kColumns>(args, at);
  } else {
    if constexpr (kUneven<kColumns>) raise_registers<kManyRegisters<kColumns>>();
    Multiplier<D, kColumns> multiplier{args, at};
    multiplier.run();
    let_next_launch_begin();
    multiplier.store();
  }
}

template <DType D, int kColumns>
Status launch_as(const ProductArgs& args, bool overlaps, void* stream) {
  const LaunchShape shape{.blocks = static_cast<int>(ceil_div(args.m, kColumns)),
                          .blocks_y = static_cast<int>(ceil_div(args.n, kRows)),
                          .blocks_z = args.splits,
                          .threads = kRingThreads,
                          .shared_bytes = RingLayout<kColumns>::kBytes,
                          .overlaps = overlaps};
  return FASTLORA_LAUNCH((nf4_linear_sm90<D, kColumns>), shape, args, stream);
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
