// nf4_dequantize on the device: packed codes to float32, bfloat16 or float16, absmax decoded on the way.
//
// A lane turns 8 codes (4 with float32) into 16 bytes, so that a warp reads and writes whole sectors in one
// instruction each. Codes are looked up in shared memory, one copy of the 16 values a bank: no conflicts.
#include "fastlora/cuda.h"
#include "launch.cuh"
#include "nf4.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // of a lane, under way at a time
constexpr int kTableBytes = 16 * 32 * 4;
constexpr int kSharedBytes = kTableBytes + 256 * 4;

struct DequantizeArgs {
  const uint8_t* packed;
  DeviceScales scales;
  const float* map;
  void* out;
  int64_t rows, cols;
  int shift;  // log2(blocksize)
  float nf4_codes[16];
};

// Eight codes of a word, the even ones in high nibbles; code i of four or eight.
FASTLORA_DEVICE uint32_t code_of(uint32_t word, int i) {
  return word >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0)) & 15;
}

FASTLORA_DEVICE void fill_tables(const DequantizeArgs& args) {
  auto* table = shared_memory<float>(0);
  auto* map = shared_memory<float>(kTableBytes);
  for (int i = thread_index(); i < 16 * 32; i += kThreads) store_shared(table + i, args.nf4_codes[i / 32]);
  if (args.scales.nested != nullptr) {
    for (int i = thread_index(); i < 256; i += kThreads) store_shared(map + i, load_readonly(args.map + i));
  }
  sync_threads();
}

FASTLORA_DEVICE float value_of(uint32_t code) {
  return load_shared(shared_memory<float>(0) + code * 32 + static_cast<uint32_t>(lane_index()));
}

// Packed bytes without a nibble between rows: element i is in byte i / 2.
template <DType D>
FASTLORA_KERNEL(kThreads, 4)
dequantize_flat(FASTLORA_PARAMETER DequantizeArgs args) {
  using E = Element<D>;
  constexpr int kPer = E::kPerVector;
  const auto* map = shared_memory<float>(kTableBytes);
  fill_tables(args);
  const int64_t count = args.rows * args.cols, vectors = count / kPer;
  const int64_t stride = static_cast<int64_t>(block_count()) * kThreads * kVectors;
  int64_t first = static_cast<int64_t>(block_index()) * kThreads * kVectors + thread_index();
  for (; first < vectors; first += stride) {
    uint32_t words[kVectors];
    float absmax[kVectors];
    FASTLORA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t vector = first + v * kThreads;
      if (vector >= vectors) break;
      if constexpr (kPer == 8) {
        words[v] = load_readonly(reinterpret_cast<const uint32_t*>(args.packed) + vector);
      } else {
        words[v] = load_readonly(reinterpret_cast<const uint16_t*>(args.packed) + vector);
      }
      absmax[v] = block_absmax(args.scales, map, vector * kPer >> args.shift);
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
    const uint32_t byte = load_readonly(args.packed + rest / 2);
    const float absmax = block_absmax(args.scales, map, rest >> args.shift);
    E::store(args.out, rest, multiply(value_of(rest % 2 == 0 ? byte >> 4 : byte & 15), absmax));
  }
}

// Rows of an odd length: a thread a byte, whose two elements may lie in different blocks.
template <DType D>
FASTLORA_KERNEL(kThreads, 4)
dequantize_ragged(FASTLORA_PARAMETER DequantizeArgs args) {
  const auto* map = shared_memory<float>(kTableBytes);
  fill_tables(args);
  const int64_t row_bytes = (args.cols + 1) / 2, bytes = args.rows * row_bytes;
  const int64_t stride = static_cast<int64_t>(block_count()) * kThreads;
  for (int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index(); i < bytes; i += stride) {
    const int64_t row = i / row_bytes, col = (i - row * row_bytes) * 2, flat = row * args.cols + col;
    const uint32_t byte = load_readonly(args.packed + i);
    const float absmax = block_absmax(args.scales, map, flat >> args.shift);
    Element<D>::store(args.out, flat, multiply(value_of(byte >> 4), absmax));
    if (col + 1 < args.cols) {
      const float next = block_absmax(args.scales, map, (flat + 1) >> args.shift);
      Element<D>::store(args.out, flat + 1, multiply(value_of(byte & 15), next));
    }
  }
}

template <DType D>
Status dequantize(const Nf4DequantizeCudaArgs& a) {
  DequantizeArgs args{.packed = a.weight.packed,
                      .scales = {a.weight.scales.codes, a.weight.scales.nested},
                      .map = a.map,
                      .out = a.out,
                      .rows = a.weight.n,
                      .cols = a.weight.k,
                      .shift = __builtin_ctzll(static_cast<unsigned long long>(a.weight.blocksize)),
                      .nf4_codes = {}};
  for (int i = 0; i < 16; ++i) args.nf4_codes[i] = kNf4Codes[i];
  const bool flat = args.cols % 2 == 0 || args.rows == 1;
  const auto kernel = flat ? dequantize_flat<D> : dequantize_ragged<D>;
  const int64_t items =
      flat ? args.rows * args.cols / Element<D>::kPerVector / kVectors + 1 : args.rows * ((args.cols + 1) / 2);
  const int64_t wanted = (items + kThreads - 1) / kThreads, most = resident_blocks(kernel, kThreads, kSharedBytes);
  if (most == 0) return Status::kDeviceError;
  const LaunchShape shape{.blocks = static_cast<int>(wanted < most ? wanted : most),
                          .threads = kThreads,
                          .shared_bytes = kSharedBytes};
  return flat ? FASTLORA_LAUNCH(dequantize_flat<D>, shape, args, a.stream)
              : FASTLORA_LAUNCH(dequantize_ragged<D>, shape, args, a.stream);
}

}  // namespace
}  // namespace fastlora::cuda

namespace fastlora {

Status nf4_dequantize_cuda(const Nf4DequantizeCudaArgs& args) {
  if (args.weight.n < 0 || args.weight.k < 0 || args.weight.blocksize < kMinBlocksize) return Status::kBadArgument;
  if (args.weight.n == 0 || args.weight.k == 0) return Status::kOk;
  switch (args.dtype) {
    case DType::kFloat32: return cuda::dequantize<DType::kFloat32>(args);
    case DType::kBFloat16: return cuda::dequantize<DType::kBFloat16>(args);
    case DType::kFloat16: return cuda::dequantize<DType::kFloat16>(args);
  }
  return Status::kBadArgument;
}

}  // namespace fastlora
