// The thin products of backward, each reading its large operand once:
//   v = s·dy·B and dB = s·dyᵀ·u   in one pass over dy       (kBoth; v alone: kProduct)
//   dA = vᵀ·x                     in one pass over x         (kGram)
//
// With `tall` (m, width) for dy or x: a block has kWidth columns of it and some rows, and goes through them in
// tiles of 64 rows by 128 columns, which cp.async brings. From a tile in shared memory the product takes its left
// operands as it lies, and the Gram matrix by ldmatrix's transposition. Sums over rows stay in registers to the
// end, sums over columns for 64 rows; both are parts, float32, which lora_sum adds in order.
//
// A tile in shared memory is also the cheapest place to take the widened copy of dy from, for the dense route
// (cuda.h): written here but for v, which lora_sum brings.
#include "kernels.cuh"
#include "launch.cuh"
#include "nf4_linear.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64, kColumns = 128;  // of a tile
constexpr int kTileBytes = kRows * kColumns * 2;

enum class Work { kProduct, kGram, kBoth };

struct ThinArgs {
  const void* tall;      // (m, width), 16-bit
  const void* small;     // (m, r), tall's dtype
  const void* factor;    // (width, r), factor_dtype
  float* product_parts;  // (blocks along width, m, r), or null
  float* gram_parts;     // (blocks along m, width, r), or (.., r, width) with rank_major, or null
  Wide wide;             // tall, and zeros to the ranks
  int m, width, r;
  int row_share;  // rows that one block goes through, a multiple of 64
  DType factor_dtype;
  bool rank_major;
  bool tall_vectors, small_vectors, factor_vectors;  // rows are whole 16-byte vectors, at such addresses
};

// kTiles: of 16 ranks. A block's columns, and its shared memory: the ring, `small` (u or v) of 64 rows in two
// buffers, the factor (B) of its columns, and the sums of the product's two halves.
template <int kTiles>
constexpr int kSubs = 4 / kTiles;
template <int kTiles>
constexpr int kWidth = kColumns * kSubs<kTiles>;
template <int kTiles>
constexpr int kStages = kTiles == 4 ? 3 : 4;
template <int kTiles>
constexpr int kSmallAt = kStages<kTiles> * kTileBytes;
template <int kTiles>
constexpr int kFactorAt = kSmallAt<kTiles> + 2 * kRows * 32 * kTiles;
template <int kTiles>
constexpr int kSumsAt = kFactorAt<kTiles> + kWidth<kTiles> * 32 * kTiles;
template <int kTiles>
constexpr int kSharedBytes = kSumsAt<kTiles> + kRows * 16 * kTiles * 4;

// Where 8 adjacent ranks of a row lie in a table of 16 * kTiles ranks a row: any 8 adjacent rows in different
// banks.
template <int kTiles>
FASTLORA_DEVICE int rank_place(int row, int vector) {
  constexpr int kVectors = 2 * kTiles, kShift = kTiles == 1 ? 2 : kTiles == 2 ? 1 : 0;
  return row * kVectors * 16 + (vector ^ (row >> kShift & (kVectors - 1))) * 16;
}

template <DType D, int kTiles, Work kWork>
struct Gradients {
  static constexpr int kRing = kStages<kTiles>;
  static constexpr bool kProduct = kWork != Work::kGram, kGram = kWork != Work::kProduct;

  const ThinArgs& args;
  const int warp = warp_index(), lane = lane_index(), group = lane / 4, quad = lane % 4;
  const int first_column = block_index() * kWidth<kTiles>, rank = block_index_z() * 16 * kTiles;
  const int begin = block_index_y() * args.row_share;
  const int end = begin + args.row_share < args.m ? begin + args.row_share : args.m;
  float gram[kSubs<kTiles>][2 * kTiles][4] = {};

  static FASTLORA_DEVICE int tile_place(int row, int vector) {
    return vector / 8 * kRows * 128 + row * 128 + (vector % 8 ^ row % 8) * 16;
  }

  // Tile number `index`: its rows go with index / kSubs.
  FASTLORA_DEVICE void copy_tile(int index) const {
    const int row = begin + index / kSubs<kTiles> * kRows,
              column = first_column + index % kSubs<kTiles> * kColumns;
    if (row < end) {
      FASTLORA_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int i = thread_index() + kThreads * j, r = row + i / 16, c = column + i % 16 * 8;
        const int left = r < end ? args.width - c : 0;
        const auto* from = static_cast<const uint16_t*>(args.tall) + static_cast<int64_t>(r) * args.width + c;
        auto* to = shared_memory<uint8_t>(index % kRing * kTileBytes + tile_place(i / 16, i % 16));
        if (args.tall_vectors) {
          copy_async<16>(to, from, left > 0 ? 16 : 0);
        } else {
          store_shared(reinterpret_cast<Words4*>(to), load_halves(from, left, false));
        }
      }
    }
    copy_async_commit();
  }

  // What copy_tile brought, once it is there. An octet that begins inside has zeros behind the width.
  FASTLORA_DEVICE void widen_tile(int index) const {
    const int row = begin + index / kSubs<kTiles> * kRows,
              column = first_column + index % kSubs<kTiles> * kColumns;
    FASTLORA_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int i = thread_index() + kThreads * j, r = row + i / 16, c = column + i % 16 * 8;
      if (r >= end || c >= args.width) continue;
      const auto* from = shared_memory<Words4>(index % kRing * kTileBytes + tile_place(i / 16, i % 16));
      auto* to = args.wide.rows + static_cast<int64_t>(r) * args.wide.size + c;
      store_global(reinterpret_cast<Words4*>(to), load_shared(from));
    }
  }

  // Eight ranks of a row of `small`, a thread's share of 64 rows.
  static constexpr int kSmallShare = (kRows * 2 * kTiles + kThreads - 1) / kThreads;
  FASTLORA_DEVICE void load_small(int row, Words4 (&out)[kSmallShare]) const {
    FASTLORA_UNROLL
    for (int j = 0; j < kSmallShare; ++j) {
      const int i = thread_index() + kThreads * j, r = row + i / (2 * kTiles), q = rank + i % (2 * kTiles) * 8;
      const bool inside = r < end && i < kRows * 2 * kTiles;
      const auto* from = static_cast<const uint16_t*>(args.small) + static_cast<int64_t>(r) * args.r + q;
      out[j] = load_halves(from, inside ? args.r - q : 0, args.small_vectors);
    }
  }
  FASTLORA_DEVICE void store_small(int turn, const Words4 (&values)[kSmallShare]) const {
    FASTLORA_UNROLL
    for (int j = 0; j < kSmallShare; ++j) {
      const int i = thread_index() + kThreads * j;
      if (i >= kRows * 2 * kTiles) break;
      store_shared(shared_memory<Words4>(kSmallAt<kTiles> + turn % 2 * kRows * 32 * kTiles +
                                         rank_place<kTiles>(i / (2 * kTiles), i % (2 * kTiles))),
                   values[j]);
    }
  }

  FASTLORA_DEVICE void fill_factor() const {
    for (int i = thread_index(); i < kWidth<kTiles> * 2 * kTiles; i += kThreads) {
      const int c = i / (2 * kTiles), q = rank + i % (2 * kTiles) * 8;
      const Words4 eight = load_octet<D>(args.factor, static_cast<int64_t>(first_column + c) * args.r + q,
                                         first_column + c < args.width ? args.r - q : 0, args.factor_dtype,
                                         args.factor_vectors, 1.0f);
      store_shared(shared_memory<Words4>(kFactorAt<kTiles> + rank_place<kTiles>(c, i % (2 * kTiles))), eight);
    }
  }

  // 16 steps by 16 ranks of a table, two right operands, transposed from how they lie: lane i names row i % 16 and
  // eight ranks i / 16.
  FASTLORA_DEVICE void load_ranks(int table, int row, int tile, uint32_t (&b)[4]) const {
    load_matrix<4, true>(
        b, shared_memory<uint8_t>(table + rank_place<kTiles>(row + lane % 16, 2 * tile + lane / 16)));
  }

  // Columns 16 * warp .. + 15 of a tile by all ranks.
  FASTLORA_DEVICE void add_gram(int stage, int turn, float (&sums)[2 * kTiles][4]) const {
    const int small = kSmallAt<kTiles> + turn % 2 * kRows * 32 * kTiles;
    FASTLORA_UNROLL
    for (int step = 0; step < kRows / 16; ++step) {
      uint32_t a[4];
      // Matrices by rows 0-7 and columns 0-7, then columns 8-15, then rows 8-15: transposed, a left operand.
      const int row = 16 * step + lane / 16 * 8 + lane % 8, vector = 2 * warp + lane / 8 % 2;
      load_matrix<4, true>(a, shared_memory<uint8_t>(stage * kTileBytes + tile_place(row, vector)));
      FASTLORA_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t b[4];
        load_ranks(small, 16 * step, tile, b);
        FASTLORA_UNROLL
        for (int j = 0; j < 2; ++j) {
          const uint32_t right[2] = {b[2 * j], b[2 * j + 1]};
          multiply_tile<D>(sums[2 * tile + j], a, right);
        }
      }
    }
  }

  // Rows 16 * (warp % 4) .. + 15 of a tile, over half of its columns.
  FASTLORA_DEVICE void add_product(int stage, int sub, float (&sums)[2 * kTiles][4]) const {
    FASTLORA_UNROLL
    for (int step = 0; step < 4; ++step) {
      const int column = warp / 4 * 64 + 16 * step;
      uint32_t a[4];
      load_matrix<4, false>(a, shared_memory<uint8_t>(stage * kTileBytes + tile_place(warp % 4 * 16 + lane % 16,
                                                                                      column / 8 + lane / 16)));
      FASTLORA_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t b[4];
        load_ranks(kFactorAt<kTiles>, sub * kColumns + column, tile, b);
        FASTLORA_UNROLL
        for (int j = 0; j < 2; ++j) {
          const uint32_t right[2] = {b[2 * j], b[2 * j + 1]};
          multiply_tile<D>(sums[2 * tile + j], a, right);
        }
      }
    }
  }

  // The two halves of 64 rows' product, added, to this block's part.
  FASTLORA_DEVICE void store_product(int row, const float (&sums)[2 * kTiles][4]) const {
    auto* all = shared_memory<float>(kSumsAt<kTiles>);
    const auto place = [&](int tile, int j) {
      return (warp % 4 * 16 + group + j / 2 * 8) * 16 * kTiles + 8 * tile + 2 * quad + j % 2;
    };
    if (warp >= 4) {
      FASTLORA_UNROLL
      for (int tile = 0; tile < 2 * kTiles; ++tile) {
        FASTLORA_UNROLL
        for (int j = 0; j < 4; ++j) store_shared(all + place(tile, j), sums[tile][j]);
      }
    }
    sync_threads();
    if (warp >= 4) return;
    FASTLORA_UNROLL
    for (int tile = 0; tile < 2 * kTiles; ++tile) {
      FASTLORA_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int r = row + warp * 16 + group + j / 2 * 8, q = rank + 8 * tile + 2 * quad + j % 2;
        const float sum = add(sums[tile][j], load_shared(all + place(tile, j)));
        if (r >= end || q >= args.r) continue;
        store_global(args.product_parts + (static_cast<int64_t>(block_index()) * args.m + r) * args.r + q, sum);
      }
    }
  }

  FASTLORA_DEVICE void store_gram() const {
    FASTLORA_UNROLL
    for (int sub = 0; sub < kSubs<kTiles>; ++sub) {
      FASTLORA_UNROLL
      for (int tile = 0; tile < 2 * kTiles; ++tile) {
        FASTLORA_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int c = first_column + sub * kColumns + warp * 16 + group + j / 2 * 8;
          const int q = rank + 8 * tile + 2 * quad + j % 2;
          if (c >= args.width || q >= args.r) continue;
          const int64_t index =
              args.rank_major ? static_cast<int64_t>(q) * args.width + c : static_cast<int64_t>(c) * args.r + q;
          const int64_t part = static_cast<int64_t>(block_index_y()) * args.width * args.r;
          store_global(args.gram_parts + part + index, gram[sub][tile][j]);
        }
      }
    }
  }

  FASTLORA_DEVICE void run() {
    constexpr int kSub = kSubs<kTiles>;
    FASTLORA_UNROLL
    for (int i = 0; i < kRing - 1; ++i) copy_tile(i);
    Words4 small[kSmallShare];
    if constexpr (kGram) load_small(begin, small);
    if constexpr (kProduct) fill_factor();
    int index = 0, turn = 0;
    for (int row = begin; row < end; row += kRows, ++turn) {
      if constexpr (kGram) {
        store_small(turn, small);
        load_small(row + kRows, small);
      }
      float product[2 * kTiles][4] = {};
      FASTLORA_UNROLL
      for (int sub = 0; sub < kSub; ++sub, ++index) {
        copy_async_wait<kRing - 2>();
        sync_threads();  // and all are done with the tile before, whose stage is filled next
        copy_tile(index + kRing - 1);
        if constexpr (kProduct) {
          if (args.wide.rows != nullptr && block_index_z() == 0) widen_tile(index);
        }
        if constexpr (kProduct) add_product(index % kRing, sub, product);
        if constexpr (kGram) add_gram(index % kRing, turn, gram[sub]);
      }
      if constexpr (kProduct) store_product(row, product);
    }
    copy_async_wait<0>();
    if constexpr (kGram) store_gram();
  }
};

template <DType D, int kTiles, Work kWork>
FASTLORA_KERNEL(kThreads, 1)
lora_gradients(FASTLORA_PARAMETER ThinArgs args) {
  let_next_launch_begin();
  Gradients<D, kTiles, kWork> gradients{args};
  gradients.run();
}

template <DType D, int kTiles, Work kWork>
Status launch_as(const ThinArgs& args, void* stream) {
  const LaunchShape shape{.blocks = static_cast<int>(ceil_div(args.width, kWidth<kTiles>)),
                          .blocks_y = static_cast<int>(ceil_div(args.m, args.row_share)),
                          .blocks_z = static_cast<int>(ceil_div(args.r, 16 * kTiles)),
                          .threads = kThreads,
                          .shared_bytes = kSharedBytes<kTiles>};
  return FASTLORA_LAUNCH((lora_gradients<D, kTiles, kWork>), shape, args, stream);
}

template <DType D, int kTiles>
Status launch_work(const ThinArgs& args, void* stream) {
  if (args.gram_parts == nullptr) return launch_as<D, kTiles, Work::kProduct>(args, stream);
  if (args.product_parts == nullptr) return launch_as<D, kTiles, Work::kGram>(args, stream);
  return launch_as<D, kTiles, Work::kBoth>(args, stream);
}

template <DType D>
Status launch_dtype(const ThinArgs& args, void* stream) {
  if (args.r <= 16) return launch_work<D, 1>(args, stream);
  if (args.r <= 32) return launch_work<D, 2>(args, stream);
  return launch_work<D, 4>(args, stream);
}

}  // namespace

}  // namespace fastlora::cuda

namespace fastlora {
namespace {

using namespace cuda;

struct Parts {
  int64_t product, gram;  // of the product, over columns of the tall operand; of the Gram matrix, over its rows
  int row_share;
};

// About one block for every processor.
bool parts_of(const LoraGradientsCudaArgs& a, Parts* out) {
  const DeviceTraits* traits = device_traits();
  if (traits == nullptr) return false;
  const int width = a.r <= 16 ? kWidth<1> : a.r <= 32 ? kWidth<2> : kWidth<4>;
  const int64_t columns = ceil_div(a.width, width), steps = ceil_div(a.m, kRows);
  int64_t shares = traits->processors / (columns * ceil_div(a.r, 64));
  if (shares < 1) shares = 1;
  if (shares > steps) shares = steps;
  const int64_t row_share = ceil_div(steps, shares) * kRows;
  *out = {columns, ceil_div(a.m, row_share), static_cast<int>(row_share)};
  return true;
}

bool bad(const LoraGradientsCudaArgs& a) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return a.dtype == DType::kFloat32 || a.m < 1 || a.width < 1 || a.r < 1 || a.m > kMost || a.width > kMost ||
         a.r > kMost;
}

int64_t product_bytes(const LoraGradientsCudaArgs& a, const Parts& parts) {
  return a.product == nullptr ? 0 : (4 * parts.product * a.m * a.r + 255) / 256 * 256;
}

}  // namespace

int64_t lora_gradients_cuda_scratch(const LoraGradientsCudaArgs& a) {
  Parts parts;
  if (bad(a) || !parts_of(a, &parts)) return 0;
  return product_bytes(a, parts) + (a.gram == nullptr ? 0 : 4 * parts.gram * a.width * a.r);
}

Status lora_gradients_cuda(const LoraGradientsCudaArgs& a) {
  if (bad(a) || (a.product == nullptr && (a.gram == nullptr || a.wide != nullptr)) || !aligned(a.wide, 16)) {
    return Status::kBadArgument;
  }
  Parts parts;
  if (!parts_of(a, &parts)) return Status::kDeviceError;
  auto* scratch = static_cast<uint8_t*>(a.scratch);
  ThinArgs args{
      .tall = a.tall,
      .small = a.small,
      .factor = a.factor,
      .product_parts = a.product == nullptr ? nullptr : reinterpret_cast<float*>(scratch),
      .gram_parts = a.gram == nullptr ? nullptr : reinterpret_cast<float*>(scratch + product_bytes(a, parts)),
      .wide = wide_of(a.wide, a.width, a.r, false),
      .m = static_cast<int>(a.m),
      .width = static_cast<int>(a.width),
      .r = static_cast<int>(a.r),
      .row_share = parts.row_share,
      .factor_dtype = a.lora_dtype,
      .rank_major = a.rank_major,
      .tall_vectors = whole_vectors(a.tall, 2 * a.width),
      .small_vectors = whole_vectors(a.small, 2 * a.r),
      .factor_vectors = whole_vectors(a.factor, bytes_of(a.lora_dtype) * a.r)};
  const Status status = a.dtype == DType::kBFloat16 ? launch_dtype<DType::kBFloat16>(args, a.stream)
                                                    : launch_dtype<DType::kFloat16>(args, a.stream);
  if (status != Status::kOk) return status;
  const PartSum product{.parts = args.product_parts,
                        .out = a.product,
                        .wide = args.wide,
                        .count = a.product == nullptr ? 0 : a.m * a.r,
                        .splits = static_cast<int>(parts.product),
                        .scaling = a.scaling,
                        .dtype = a.dtype};
  const PartSum gram{.parts = args.gram_parts,
                     .out = a.gram,
                     .wide = {},
                     .count = a.gram == nullptr ? 0 : a.width * a.r,
                     .splits = static_cast<int>(parts.gram),
                     .scaling = a.scaling,
                     .dtype = a.lora_dtype};
  return launch_lora_sum(product, gram, a.stream);
}

}  // namespace fastlora
