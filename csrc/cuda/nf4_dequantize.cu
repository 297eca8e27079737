// nf4_dequantize on the device: packed codes to float32, bfloat16 or float16, absmax decoded on the way.
//
// A lane turns 8 codes (4 with float32) into 16 bytes, so that a warp reads and writes whole sectors in one
// instruction each. Codes are looked up in shared memory, one copy of the 16 values a bank: no conflicts.
#include "fastlora/cuda.h"
#include "kernels.cuh"
#include "launch.cuh"
#include "nf4_values.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // of a lane, under way at a time
constexpr int kSharedBytes = kValueBytes + 256 * 4;

struct DequantizeArgs {
  const uint8_t* packed;
  DeviceScales scales;
  const float* map;
  void* out;  // (rows, columns)
  int64_t k;  // of the whole weight
  int64_t first_row, rows, first_column, columns;
  int shift;  // log2(blocksize)
  Nf4Values values;
};

FASTLORA_DEVICE void fill_tables(const DequantizeArgs& args) {
  auto* map = shared_memory<float>(kValueBytes);
  fill_values<kThreads>(args.values);
  if (args.scales.nested != nullptr) {
    for (int i = thread_index(); i < 256; i += kThreads) store_shared(map + i, load_readonly(args.map + i));
  }
  sync_threads();
}

// Vectors of kPerVector elements, of which none is in two rows or in two scale blocks. All columns of W (kWhole),
// so that the elements lie in one piece, or some of them.
template <DType D, bool kWhole>
FASTLORA_KERNEL(kThreads, 4)
dequantize_flat(FASTLORA_PARAMETER DequantizeArgs args) {
  using E = Element<D>;
  constexpr int kPer = E::kPerVector;
  const auto* map = shared_memory<float>(kValueBytes);
  fill_tables(args);
  const int64_t count = args.rows * args.columns, vectors = count / kPer;
  const int64_t begin = args.first_row * args.k;
  // The flattened index in W of a vector of the output.
  const auto flat_of = [&](int64_t vector) {
    if constexpr (kWhole) {
      return begin + vector * kPer;
    } else {
      const int64_t row = vector / (args.columns / kPer), column = vector - row * (args.columns / kPer);
      return begin + row * args.k + args.first_column + column * kPer;
    }
  };
  const int64_t stride = static_cast<int64_t>(block_count()) * kThreads * kVectors;
  int64_t first = static_cast<int64_t>(block_index()) * kThreads * kVectors + thread_index();
  for (; first < vectors; first += stride) {
    uint32_t words[kVectors];
    float absmax[kVectors];
    FASTLORA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t vector = first + v * kThreads;
      if (vector >= vectors) break;
      const int64_t flat = flat_of(vector);
      if constexpr (kPer == 8) {
        words[v] = load_readonly(reinterpret_cast<const uint32_t*>(args.packed + flat / 2));
      } else {
        words[v] = load_readonly(reinterpret_cast<const uint16_t*>(args.packed + flat / 2));
      }
      absmax[v] = block_absmax(args.scales, map, flat >> args.shift);
    }
    FASTLORA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t vector = first + v * kThreads;
      if (vector >= vectors) break;
      float values[kPer];
      FASTLORA_UNROLL
      for (int i = 0; i < kPer; ++i) values[i] = multiply(value_of(code_of(words[v], i)), absmax[v]);
      store_global(static_cast<Words4*>(args.out) + vector, E::pack(values));
    }
  }
  // Fewer than a vector's are left; the first threads take one each.
  const int64_t rest = vectors * kPer + thread_index();
  if (block_index() == 0 && rest < count) {
    const int64_t flat = begin + rest;
    const uint32_t byte = load_readonly(args.packed + flat / 2);
    const float absmax = block_absmax(args.scales, map, flat >> args.shift);
    E::store(args.out, rest, multiply(value_of(rest % 2 == 0 ? byte >> 4 : byte & 15), absmax));
  }
}

// Anything else: a thread a byte, whose two elements may lie in different blocks.
template <DType D>
FASTLORA_KERNEL(kThreads, 4)
dequantize_ragged(FASTLORA_PARAMETER DequantizeArgs args) {
  const auto* map = shared_memory<float>(kValueBytes);
  fill_tables(args);
  const int64_t bytes = (args.columns + 1) / 2, row_bytes = (args.k + 1) / 2;
  const int64_t stride = static_cast<int64_t>(block_count()) * kThreads;
  int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  for (; i < args.rows * bytes; i += stride) {
    const int64_t row = i / bytes, column = (i - row * bytes) * 2, to = row * args.columns + column;
    const int64_t flat = (args.first_row + row) * args.k + args.first_column + column;
    const uint32_t byte =
        load_readonly(args.packed + (args.first_row + row) * row_bytes + (args.first_column + column) / 2);
    const float absmax = block_absmax(args.scales, map, flat >> args.shift);
    Element<D>::store(args.out, to, multiply(value_of(byte >> 4), absmax));
    if (column + 1 < args.columns) {
      const float next = block_absmax(args.scales, map, (flat + 1) >> args.shift);
      Element<D>::store(args.out, to + 1, multiply(value_of(byte & 15), next));
    }
  }
}

template <DType D>
Status dequantize(const Nf4DequantizeCudaArgs& a) {
  constexpr int kPer = Element<D>::kPerVector;
  const DequantizeArgs args{.packed = a.weight.packed,
                            .scales = {a.weight.scales.codes, a.weight.scales.nested},
                            .map = a.map,
                            .out = a.out,
                            .k = a.weight.k,
                            .first_row = a.first_row,
                            .rows = a.rows,
                            .first_column = a.first_column,
                            .columns = a.columns,
                            .shift = __builtin_ctzll(static_cast<unsigned long long>(a.weight.blocksize)),
                            .values = nf4_values()};
  const bool whole =
      args.columns == args.k && (args.k % 2 == 0 || a.weight.n == 1) && args.first_row * args.k % 32 == 0;
  const bool vectors = args.k % kPer == 0 && args.first_column % kPer == 0 && args.columns % kPer == 0;
  const bool in_place = aligned(a.weight.packed, kPer / 2) && aligned(a.out, 16);
  const int64_t bytes = args.rows * ((args.columns + 1) / 2);
  const auto launch_as = [&](auto kernel, int64_t items, auto start) {
    const int64_t wanted = ceil_div(items, kThreads), most = resident_blocks(kernel, kThreads, kSharedBytes);
    if (most == 0) return Status::kDeviceError;
    return start(LaunchShape{.blocks = static_cast<int>(wanted < most ? wanted : most),
                             .threads = kThreads,
                             .shared_bytes = kSharedBytes});
  };
  const int64_t items = args.rows * args.columns / kPer / kVectors + 1;
  if (whole && in_place) {
    return launch_as(dequantize_flat<D, true>, items, [&](const LaunchShape& shape) {
      return FASTLORA_LAUNCH((dequantize_flat<D, true>), shape, args, a.stream);
    });
  }
  if (vectors && in_place) {
    return launch_as(dequantize_flat<D, false>, items, [&](const LaunchShape& shape) {
      return FASTLORA_LAUNCH((dequantize_flat<D, false>), shape, args, a.stream);
    });
  }
  return launch_as(dequantize_ragged<D>, bytes, [&](const LaunchShape& shape) {
    return FASTLORA_LAUNCH(dequantize_ragged<D>, shape, args, a.stream);
  });
}

}  // namespace
}  // namespace fastlora::cuda

namespace fastlora {

Status nf4_dequantize_cuda(const Nf4DequantizeCudaArgs& args) {
  const Nf4Weight& w = args.weight;
  if (w.n < 0 || w.k < 0 || w.blocksize < kMinBlocksize || args.first_row < 0 || args.rows < 0 ||
      args.first_column < 0 || args.columns < 0 || args.first_row + args.rows > w.n ||
      args.first_column + args.columns > w.k || args.first_column % 2 != 0) {
    return Status::kBadArgument;
  }
  if (args.rows == 0 || args.columns == 0) return Status::kOk;
  switch (args.dtype) {
    case DType::kFloat32: return cuda::dequantize<DType::kFloat32>(args);
    case DType::kBFloat16: return cuda::dequantize<DType::kBFloat16>(args);
    case DType::kFloat16: return cuda::dequantize<DType::kFloat16>(args);
  }
  return Status::kBadArgument;
}

}  // namespace fastlora
