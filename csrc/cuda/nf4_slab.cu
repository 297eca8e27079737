// W dequantised for torch's product: a part of it, in 16 bits, with the low-rank factor and the bias beside it
// where the contraction holds them too (cuda.h). What it writes is read once, by the next launch, from the L2
// cache.
//
// A warp turns 1024 columns of a row at a time, a lane 8 codes into 16 bytes, as nf4_dequantize does. What lies
// beside W is small: it is written element by element.
#include "fastlora/cuda.h"
#include "kernels.cuh"
#include "launch.cuh"
#include "nf4_values.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;                  // of a lane, under way at a time
constexpr int kColumns = 32 * 8 * kVectors;  // of a warp's piece of a row
constexpr int kSharedBytes = kValueBytes + 256 * 4;

struct SlabArgs {
  const uint8_t* packed;
  DeviceScales scales;
  const float* map;
  void* out;  // (.., out_stride)
  int64_t k, row_bytes, out_stride;
  int64_t first_row, first_column;
  uint32_t rows, columns;
  uint32_t row_pieces, pieces;  // in a row, and in all
  int shift;                    // log2(blocksize)
  // What lies beside W: a rectangle of the output `side_width` wide, right of the columns or below the rows.
  // `rank_at` is where the factor's ranks begin, along the contraction; they are `rank_stride` apart in memory,
  // and what differs along the other direction `outer_stride`.
  const void* factor;
  const void* bias;
  int64_t outer_stride, rank_stride;
  uint32_t side_width, side_count;
  int rank_at, r;
  float scaling;
  bool below;
  DType factor_dtype;
  Nf4Values values;
};

// A piece in vectors, none of which is in two scale blocks. All of a lane's loads are under way before it decodes
// the first scale.
template <DType D>
FASTLORA_DEVICE void turn_vectors(const SlabArgs& args, const ScaleReader& scales, const float* factors,
                                  int64_t row, uint32_t first) {
  const int64_t begin = (args.first_row + row) * args.k + args.first_column;
  auto* out = static_cast<uint16_t*>(args.out) + row * args.out_stride;
  const auto column_of = [&](int v) { return first + 8 * (32 * v + static_cast<uint32_t>(lane_index())); };
  uint32_t words[kVectors];
  RawScale raw[kVectors];
  FASTLORA_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    if (column_of(v) >= args.columns) break;
    const int64_t flat = begin + column_of(v);
    words[v] = load_readonly(reinterpret_cast<const uint32_t*>(args.packed + flat / 2));
    raw[v] = scales.fetch(flat >> args.shift);
  }
  FASTLORA_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const uint32_t column = column_of(v);
    if (column >= args.columns) break;
    const float absmax = scales.decode_exactly(raw[v], factors);
    float values[8];
    FASTLORA_UNROLL
    for (int i = 0; i < 8; ++i) values[i] = multiply(value_of(code_of(words[v], i)), absmax);
    store_global(reinterpret_cast<Words4*>(out + column), Element<D>::pack(values));
  }
}

// A piece in bytes, whose two elements may lie in different blocks.
template <DType D>
FASTLORA_DEVICE void turn_bytes(const SlabArgs& args, const float* map, int64_t row, uint32_t first) {
  const int64_t begin = (args.first_row + row) * args.k + args.first_column, to = row * args.out_stride;
  const uint8_t* packed = args.packed + (args.first_row + row) * args.row_bytes + args.first_column / 2;
  const uint32_t end = first + kColumns < args.columns ? first + kColumns : args.columns;
  for (uint32_t column = first + 2 * lane_index(); column < end; column += 64) {
    const uint32_t byte = load_readonly(packed + column / 2);
    const float absmax = block_absmax(args.scales, map, (begin + column) >> args.shift);
    Element<D>::store(args.out, to + column, multiply(value_of(byte >> 4), absmax));
    if (column + 1 < args.columns) {
      const float next = block_absmax(args.scales, map, (begin + column + 1) >> args.shift);
      Element<D>::store(args.out, to + column + 1, multiply(value_of(byte & 15), next));
    }
  }
}

// Element `i` of what lies beside W.
template <DType D>
FASTLORA_DEVICE void fill_beside(const SlabArgs& args, uint32_t i) {
  const uint32_t down = i / args.side_width, along = i - down * args.side_width;
  const int64_t row = args.below ? args.rows + down : down, column = args.below ? along : args.columns + along;
  const int64_t outer = args.below ? args.first_column + column : args.first_row + row;
  const int64_t rank = (args.below ? row : column) - args.rank_at;
  float value = 0.0f;
  if (rank >= 0 && rank < args.r) {
    value = load_any(args.factor, outer * args.outer_stride + rank * args.rank_stride, args.factor_dtype);
    value = multiply(value, args.scaling);
  } else if (rank == args.r && args.bias != nullptr) {
    value = Element<D>::load(args.bias, outer);
  }
  Element<D>::store(args.out, row * args.out_stride + column, value);
}

template <DType D, bool kInVectors>
FASTLORA_KERNEL(kThreads, 4)
nf4_slab(FASTLORA_PARAMETER SlabArgs args) {
  auto* factors = shared_memory<float>(kValueBytes);
  fill_values<kThreads>(args.values);
  fill_factors<kThreads>(factors, args.scales.nested == nullptr ? nullptr : args.map, 1.0f);
  const ScaleReader scales(args.scales);
  sync_threads();
  const auto block = static_cast<uint32_t>(block_index()), blocks = static_cast<uint32_t>(block_count());
  constexpr uint32_t kWarps = kThreads / 32;
  for (uint32_t piece = block * kWarps + warp_index(); piece < args.pieces; piece += blocks * kWarps) {
    const uint32_t row = piece / args.row_pieces, first = (piece - row * args.row_pieces) * kColumns;
    if constexpr (kInVectors) {
      turn_vectors<D>(args, scales, factors, row, first);
    } else {
      turn_bytes<D>(args, factors, row, first);
    }
  }
  // By the last blocks first, which may have had a piece less.
  for (uint32_t i = (blocks - 1 - block) * kThreads + thread_index(); i < args.side_count;
       i += blocks * kThreads) {
    fill_beside<D>(args, i);
  }
}

template <DType D>
Status launch_slab(const Nf4SlabCudaArgs& a, const SlabArgs& args) {
  const bool in_vectors = a.weight.k % 8 == 0 && a.first_column % 8 == 0 && a.columns % 8 == 0 &&
                          a.out_stride % 8 == 0 && aligned(a.weight.packed, 4) && aligned(a.out, 16);
  const auto launch_as = [&](auto kernel, auto start) {
    const int64_t most = resident_blocks(kernel, kThreads, kSharedBytes);
    if (most == 0) return Status::kDeviceError;
    const int64_t pieces = ceil_div(args.pieces, kThreads / 32), beside = ceil_div(args.side_count, kThreads);
    const int64_t wanted = pieces > beside ? pieces : beside;
    return start(LaunchShape{.blocks = static_cast<int>(wanted < most ? wanted : most),
                             .threads = kThreads,
                             .shared_bytes = kSharedBytes});
  };
  if (in_vectors) {
    return launch_as(nf4_slab<D, true>, [&](const LaunchShape& shape) {
      return FASTLORA_LAUNCH((nf4_slab<D, true>), shape, args, a.stream);
    });
  }
  return launch_as(nf4_slab<D, false>, [&](const LaunchShape& shape) {
    return FASTLORA_LAUNCH((nf4_slab<D, false>), shape, args, a.stream);
  });
}

}  // namespace
}  // namespace fastlora::cuda

namespace fastlora {

Status nf4_slab_cuda(const Nf4SlabCudaArgs& a) {
  const Nf4Weight& w = a.weight;
  if (w.n < 0 || w.k < 0 || w.blocksize < kMinBlocksize || a.first_row < 0 || a.rows < 0 || a.first_column < 0 ||
      a.columns < 0 || a.first_row + a.rows > w.n || a.first_column + a.columns > w.k || a.first_column % 2 != 0 ||
      a.out_stride < a.columns || a.r < 0 || (a.bias != nullptr && (a.below || a.r == 0))) {
    return Status::kBadArgument;
  }
  const int64_t wide = wide_size(a.below ? a.rows : a.columns, a.r, a.bias != nullptr);
  if (a.r > 0 && (a.factor == nullptr || (!a.below && a.out_stride != wide))) return Status::kBadArgument;
  if (a.rows == 0 || a.columns == 0) return Status::kOk;
  const int64_t side_width = a.below ? a.columns : wide - a.columns;
  const int64_t side_height = a.below ? wide - a.rows : a.rows;
  const int64_t row_pieces = cuda::ceil_div(a.columns, cuda::kColumns);
  constexpr int64_t kMost = int64_t{1} << 30;
  if (a.rows > kMost || row_pieces * a.rows > kMost || (a.r > 0 && side_width * side_height > kMost)) {
    return Status::kBadArgument;
  }
  const cuda::SlabArgs args{.packed = w.packed,
                            .scales = {w.scales.codes, w.scales.nested},
                            .map = a.map,
                            .out = a.out,
                            .k = w.k,
                            .row_bytes = (w.k + 1) / 2,
                            .out_stride = a.out_stride,
                            .first_row = a.first_row,
                            .first_column = a.first_column,
                            .rows = static_cast<uint32_t>(a.rows),
                            .columns = static_cast<uint32_t>(a.columns),
                            .row_pieces = static_cast<uint32_t>(row_pieces),
                            .pieces = static_cast<uint32_t>(row_pieces * a.rows),
                            .shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize)),
                            .factor = a.factor,
                            .bias = a.bias,
                            .outer_stride = a.below ? 1 : a.r,
                            .rank_stride = a.below ? w.k : 1,
                            .side_width = static_cast<uint32_t>(side_width),
                            .side_count = a.r > 0 ? static_cast<uint32_t>(side_width * side_height) : 0,
                            .rank_at = static_cast<int>(wide_rank_at(a.below ? a.rows : a.columns)),
                            .r = static_cast<int>(a.r),
                            .scaling = a.scaling,
                            .below = a.below,
                            .factor_dtype = a.lora_dtype,
                            .values = cuda::nf4_values()};
  switch (a.dtype) {
    case DType::kBFloat16: return cuda::launch_slab<DType::kBFloat16>(a, args);
    case DType::kFloat16: return cuda::launch_slab<DType::kFloat16>(a, args);
    case DType::kFloat32: break;
  }
  return Status::kBadArgument;
}

}  // namespace fastlora
