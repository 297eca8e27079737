// nf4_quantize on the device: a weight to packed codes and absmax, the absmax quantised again in the same launch.
//
// A warp takes 32 vectors of 16 bytes (256 elements; 128 of float32) or a whole block, whichever is more. A code
// is found by one look-up: s = w / absmax is mapped, by one FMA whose rounding leaves an integer in the low bits,
// to one of 32 cells with at most one midpoint in each; the cell's entry says how many midpoints lie below it and
// which one lies in it. The midpoints' cells come from the same FMA, so its rounding cannot matter.
//
// The mean of the absmax values is summed to about 106 bits, so that its rounding to float32 is the same in any
// order of summation, and the same as the CPU's.
#include "fastlora/cuda.h"
#include "launch.cuh"
#include "nf4.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr float kTinyAbsmax = 1e-38f;  // a smaller one divides as if it were this
constexpr uint32_t kInfinity = 0x7f800000u;

// Shared memory: the cells' entries, a copy a bank pair (16 of 8 bytes are a row of banks); sums of the block's
// warps; the bounds of the dynamic map.
struct Cell {
  float midpoint;  // above every s where there is none
  uint32_t below;
};
constexpr int kCopies = 16;
constexpr int kCellBytes = 32 * kCopies * 8;
constexpr int kSumsAt = kCellBytes;
constexpr int kMapAt = kSumsAt + kWarps * 16;
constexpr int kSharedBytes = kMapAt + 256 * 4 + 16;

struct QuantizeArgs {
  const void* weight;
  uint8_t* packed;
  float* absmax;
  uint8_t* codes;
  float* nested;
  double* partials;
  const float* map;
  uint32_t* not_finite;
  int64_t rows, cols, count, blocks;
  int shift;  // log2(blocksize)
  float nf4_codes[16];
};

// ---- one code -----------------------------------------------------------------------------------------------

// Rises with s; 0..31 for s in [-1, 1], 15.4 cells to a unit, where midpoints are 0.08 apart.
FASTLORA_DEVICE uint32_t cell_of(float s) { return bits_of(multiply_add(s, 15.4f, 8388608.0f + 15.5f)) & 31; }

FASTLORA_DEVICE void fill_cells(const QuantizeArgs& args) {
  auto* cells = shared_memory<Cell>(0);
  for (int i = thread_index(); i < 32 * kCopies; i += kThreads) {
    const auto index = static_cast<uint32_t>(i / kCopies);
    Cell cell{2.0f, 0};
    for (int j = 0; j < 15; ++j) {
      const float midpoint = multiply(add(args.nf4_codes[j], args.nf4_codes[j + 1]), 0.5f);
      const uint32_t its = cell_of(midpoint);
      if (its < index) cell.below += 1;
      if (its == index) cell.midpoint = midpoint;
    }
    store_shared(cells + i, cell);
  }
  sync_threads();
}

// How many midpoints lie strictly below s: the nearest code, a tie to the lower one.
FASTLORA_DEVICE uint32_t code_of(float s) {
  const Cell cell = load_shared(shared_memory<Cell>(0) + cell_of(s) * kCopies + lane_index() % kCopies);
  return cell.below + (s > cell.midpoint ? 1 : 0);
}

// The largest magnitude as bits, in which Inf and then NaN come after every number.
FASTLORA_DEVICE uint32_t magnitude(float w) { return bits_of(w) & 0x7fffffffu; }
FASTLORA_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// s of an element. Every full block is multiplied by a rounded inverse; a last block that is not full is divided.
struct Scale {
  float factor;
  bool divides;
  FASTLORA_DEVICE float of(float w) const { return divides ? divide(w, factor) : multiply(w, factor); }
};
FASTLORA_DEVICE Scale scale_of(const QuantizeArgs& args, float absmax, int64_t block) {
  const float divisor = absmax < kTinyAbsmax ? kTinyAbsmax : absmax;
  const bool partial = ((block + 1) << args.shift) > args.count;
  return {partial ? divisor : divide(1.0f, divisor), partial};
}

// ---- sums to about 106 bits ---------------------------------------------------------------------------------

struct Sum {
  double high = 0.0, low = 0.0;
  FASTLORA_DEVICE void plus(double value) {
    const double next = add(high, value), shadow = add(next, -high);
    low = add(low, add(add(high, -add(next, -shadow)), add(value, -shadow)));
    high = next;
  }
};

FASTLORA_DEVICE double shuffle_double(double value, int by) {
  const uint64_t bits = bits_of(value);
  const uint32_t low = shuffle_xor(static_cast<uint32_t>(bits), by, kAllLanes);
  const uint32_t high = shuffle_xor(static_cast<uint32_t>(bits >> 32), by, kAllLanes);
  return double_of((static_cast<uint64_t>(high) << 32) | low);
}

FASTLORA_DEVICE void sum_lanes(Sum& sum) {
  for (int by = 16; by > 0; by /= 2) {
    const double high = shuffle_double(sum.high, by), low = shuffle_double(sum.low, by);
    sum.plus(high);
    sum.low = add(sum.low, low);
  }
}

// ---- the second quantisation: groups of 256 absmax values, a warp each --------------------------------------

FASTLORA_DEVICE void double_quantize(const QuantizeArgs& args, Sum sum) {
  auto* sums = shared_memory<double>(kSumsAt);
  auto* bounds = shared_memory<float>(kMapAt);
  auto* offset = shared_memory<float>(kMapAt + 256 * 4);
  sum_lanes(sum);
  if (lane_index() == 0) {
    store_shared(sums + 2 * warp_index(), sum.high);
    store_shared(sums + 2 * warp_index() + 1, sum.low);
  }
  // The largest float32 that does not exceed the midpoint of entries i and i + 1; none is above the last.
  for (int i = thread_index(); i < 256; i += kThreads) {
    float bound = 2.0f;
    if (i < 255) {
      const double midpoint = add(static_cast<double>(load_readonly(args.map + i)),
                                  static_cast<double>(load_readonly(args.map + i + 1))) *
                              0.5;
      bound = static_cast<float>(midpoint);
      if (static_cast<double>(bound) > midpoint) {  // one step towards minus infinity
        bound = float_of(bound > 0.0f ? bits_of(bound) - 1 : bits_of(bound) + 1);
      }
    }
    store_shared(bounds + i, bound);
  }
  sync_threads();
  if (thread_index() == 0) {
    Sum block;
    for (int w = 0; w < kWarps; ++w) {
      block.plus(load_shared(sums + 2 * w));
      block.low = add(block.low, load_shared(sums + 2 * w + 1));
    }
    store_global(args.partials + 2 * block_index(), block.high);
    store_global(args.partials + 2 * block_index() + 1, block.low);
  }
  sync_grid();

  if (warp_index() == 0) {
    Sum all;
    for (int b = lane_index(); b < block_count(); b += 32) {
      all.plus(load_global(args.partials + 2 * b));
      all.low = add(all.low, load_global(args.partials + 2 * b + 1));
    }
    sum_lanes(all);
    if (lane_index() == 0) {
      const auto mean = static_cast<float>(divide(add(all.high, all.low), static_cast<double>(args.blocks)));
      store_shared(offset, mean);
      if (block_index() == 0) store_global(args.nested, mean);
    }
  }
  sync_threads();
  const float mean = load_shared(offset);

  constexpr int kPerLane = static_cast<int>(kNestedBlocksize) / 32;
  const int64_t groups = (args.blocks + kNestedBlocksize - 1) / kNestedBlocksize;
  const int64_t warps = static_cast<int64_t>(block_count()) * kWarps;
  for (int64_t group = static_cast<int64_t>(block_index()) * kWarps + warp_index(); group < groups;
       group += warps) {
    const int64_t first = group * kNestedBlocksize + lane_index();
    float residual[kPerLane];
    uint32_t largest = 0;
    FASTLORA_UNROLL
    for (int i = 0; i < kPerLane; ++i) {
      residual[i] = first + i * 32 < args.blocks ? add(load_global(args.absmax + first + i * 32), -mean) : 0.0f;
      largest = larger(largest, magnitude(residual[i]));
    }
    for (int by = 16; by > 0; by /= 2) largest = larger(largest, shuffle_xor(largest, by, kAllLanes));
    if (lane_index() == 0) store_global(args.nested + 1 + group, float_of(largest));
    const float divisor = largest == 0 ? 1.0f : float_of(largest);
    FASTLORA_UNROLL
    for (int i = 0; i < kPerLane; ++i) {
      if (first + i * 32 >= args.blocks) break;
      const float scaled = divide(residual[i], divisor);
      int code = 0;  // how many bounds lie strictly below, of 255
      FASTLORA_UNROLL
      for (int step = 128; step > 0; step /= 2) code += scaled > load_shared(bounds + code + step - 1) ? step : 0;
      store_global(args.codes + first + i * 32, static_cast<uint8_t>(code));
    }
  }
}

// ---- rows whose packed bytes are flat -----------------------------------------------------------------------

// Elements [first, first + kPerVector), zeros past the end.
template <DType D, bool kAligned>
FASTLORA_DEVICE void load_vector(const QuantizeArgs& args, int64_t first, float (&out)[Element<D>::kPerVector]) {
  constexpr int kPer = Element<D>::kPerVector;
  if (kAligned && first + kPer <= args.count) {
    Element<D>::unpack(load_readonly(reinterpret_cast<const Words4*>(static_cast<const uint8_t*>(args.weight) +
                                                                     first * Element<D>::kBytes)),
                       out);
    return;
  }
  FASTLORA_UNROLL
  for (int i = 0; i < kPer; ++i) out[i] = first + i < args.count ? Element<D>::load(args.weight, first + i) : 0.0f;
}

template <DType D>
FASTLORA_DEVICE void store_codes(const QuantizeArgs& args, int64_t first, const Scale& scale,
                                 const float (&w)[Element<D>::kPerVector]) {
  constexpr int kPer = Element<D>::kPerVector;
  uint32_t word = 0;
  FASTLORA_UNROLL
  for (int i = 0; i < kPer; ++i) word |= code_of(scale.of(w[i])) << (8 * (i / 2) + (i % 2 == 0 ? 4 : 0));
  if (first + kPer <= args.count) {
    if constexpr (kPer == 8) {
      store_global(reinterpret_cast<uint32_t*>(args.packed + first / 2), word);
    } else {
      store_global(reinterpret_cast<uint16_t*>(args.packed + first / 2), static_cast<uint16_t>(word));
    }
    return;
  }
  // Zeros past the end have code 7, which is what a last low nibble holds.
  for (int i = 0; i < kPer && first + i < args.count; i += 2) {
    store_global(args.packed + (first + i) / 2, static_cast<uint8_t>(word >> (4 * i)));
  }
}

template <DType D, bool kAligned>
FASTLORA_DEVICE void quantize_flat(const QuantizeArgs& args, Sum& sum, bool& finite) {
  constexpr int kPer = Element<D>::kPerVector, kStep = 32 * kPer;
  const int64_t blocksize = int64_t{1} << args.shift;
  const int64_t span = blocksize > kStep ? blocksize : kStep;  // of a warp: whole blocks, whole steps
  const int lanes = blocksize < kStep ? static_cast<int>(blocksize) / kPer : 32;  // that share a block
  const int64_t stride = static_cast<int64_t>(block_count()) * kWarps * span;
  int64_t begin = (static_cast<int64_t>(block_index()) * kWarps + warp_index()) * span;
  for (; begin < args.count; begin += stride) {
    float w[kPer];
    uint32_t largest = 0;
    for (int64_t step = 0; step < span; step += kStep) {
      load_vector<D, kAligned>(args, begin + step + lane_index() * kPer, w);
      FASTLORA_UNROLL
      for (int i = 0; i < kPer; ++i) largest = larger(largest, magnitude(w[i]));
    }
    for (int by = 1; by < lanes; by *= 2) largest = larger(largest, shuffle_xor(largest, by, kAllLanes));
    finite = finite && largest < kInfinity;
    const int64_t mine = begin + lane_index() * kPer, block = mine >> args.shift;
    const float absmax = float_of(largest);
    if (lane_index() % lanes == 0 && mine < args.count) {
      store_global(args.absmax + block, absmax);
      sum.plus(static_cast<double>(absmax));
    }
    const Scale scale = scale_of(args, absmax, block);
    for (int64_t step = 0; step < span; step += kStep) {
      if (span > kStep) load_vector<D, kAligned>(args, mine + step, w);  // from cache
      store_codes<D>(args, mine + step, scale, w);
    }
  }
}

// ---- rows of an odd length: a nibble of padding each, so bytes and blocks do not line up ---------------------

template <DType D>
FASTLORA_DEVICE void ragged_absmax(const QuantizeArgs& args, Sum& sum, bool& finite) {
  const int64_t blocksize = int64_t{1} << args.shift, warps = static_cast<int64_t>(block_count()) * kWarps;
  for (int64_t block = static_cast<int64_t>(block_index()) * kWarps + warp_index(); block < args.blocks;
       block += warps) {
    uint32_t largest = 0;
    for (int64_t i = lane_index(); i < blocksize; i += 32) {
      const int64_t at = block * blocksize + i;
      if (at < args.count) largest = larger(largest, magnitude(Element<D>::load(args.weight, at)));
    }
    for (int by = 1; by < 32; by *= 2) largest = larger(largest, shuffle_xor(largest, by, kAllLanes));
    finite = finite && largest < kInfinity;
    if (lane_index() == 0) {
      store_global(args.absmax + block, float_of(largest));
      sum.plus(static_cast<double>(float_of(largest)));
    }
  }
}

template <DType D>
FASTLORA_DEVICE void ragged_codes(const QuantizeArgs& args) {
  const int64_t row_bytes = (args.cols + 1) / 2, bytes = args.rows * row_bytes;
  const int64_t stride = static_cast<int64_t>(block_count()) * kThreads;
  for (int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index(); i < bytes; i += stride) {
    const int64_t row = i / row_bytes, col = (i - row * row_bytes) * 2;
    uint32_t codes[2] = {7, 7};
    for (int e = 0; e < 2; ++e) {
      if (col + e >= args.cols) continue;
      const int64_t at = row * args.cols + col + e, block = at >> args.shift;
      const Scale scale = scale_of(args, load_global(args.absmax + block), block);
      codes[e] = code_of(scale.of(Element<D>::load(args.weight, at)));
    }
    store_global(args.packed + i, static_cast<uint8_t>(codes[0] << 4 | codes[1]));
  }
}

// ---- the kernels --------------------------------------------------------------------------------------------

enum class Walk { kAligned, kFlat, kRagged };

template <DType D, Walk kWalk>
FASTLORA_KERNEL(kThreads, 3)
quantize(FASTLORA_PARAMETER QuantizeArgs args) {
  fill_cells(args);
  Sum sum;
  bool finite = true;
  if constexpr (kWalk == Walk::kRagged) {
    ragged_absmax<D>(args, sum, finite);
    sync_grid();
    ragged_codes<D>(args);
  } else {
    quantize_flat<D, kWalk == Walk::kAligned>(args, sum, finite);
  }
  if (ballot(!finite) != 0 && lane_index() == 0) atomic_or(args.not_finite, 1u);
  if (args.codes != nullptr) double_quantize(args, sum);
}

template <DType D, Walk kWalk>
Status quantize_by(const QuantizeArgs& args, void* stream) {
  const int64_t step = 32 * Element<D>::kPerVector, blocksize = int64_t{1} << args.shift;
  const int64_t span = blocksize > step ? blocksize : step;
  const int64_t wanted = (args.count + span * kWarps - 1) / (span * kWarps);
  int64_t most = resident_blocks(quantize<D, kWalk>, kThreads, kSharedBytes);
  if (most == 0) return Status::kDeviceError;
  if (most > kQuantizePartials) most = kQuantizePartials;
  const LaunchShape shape{.blocks = static_cast<int>(wanted < most ? wanted : most),
                          .threads = kThreads,
                          .shared_bytes = kSharedBytes,
                          .cooperative = args.codes != nullptr || kWalk == Walk::kRagged};
  return FASTLORA_LAUNCH((quantize<D, kWalk>), shape, args, stream);
}

template <DType D>
Status quantize_as(const QuantizeArgs& args, void* stream) {
  if (args.cols % 2 != 0 && args.rows > 1) return quantize_by<D, Walk::kRagged>(args, stream);
  if (reinterpret_cast<uintptr_t>(args.weight) % 16 == 0) return quantize_by<D, Walk::kAligned>(args, stream);
  return quantize_by<D, Walk::kFlat>(args, stream);
}

}  // namespace
}  // namespace fastlora::cuda

namespace fastlora {

Status nf4_quantize_cuda(const Nf4QuantizeCudaArgs& a) {
  if (a.rows < 0 || a.cols < 0 || a.blocksize < kMinBlocksize || a.blocksize > kMaxBlocksize) {
    return Status::kBadArgument;
  }
  if (a.rows == 0 || a.cols == 0) return Status::kOk;
  cuda::QuantizeArgs args{.weight = a.weight,
                          .packed = a.packed,
                          .absmax = a.absmax,
                          .codes = a.codes,
                          .nested = a.nested,
                          .partials = a.partials,
                          .map = a.map,
                          .not_finite = a.not_finite,
                          .rows = a.rows,
                          .cols = a.cols,
                          .count = a.rows * a.cols,
                          .blocks = (a.rows * a.cols + a.blocksize - 1) / a.blocksize,
                          .shift = __builtin_ctzll(static_cast<unsigned long long>(a.blocksize)),
                          .nf4_codes = {}};
  for (int i = 0; i < 16; ++i) args.nf4_codes[i] = kNf4Codes[i];
  switch (a.dtype) {
    case DType::kFloat32: return cuda::quantize_as<DType::kFloat32>(args, a.stream);
    case DType::kBFloat16: return cuda::quantize_as<DType::kBFloat16>(args, a.stream);
    case DType::kFloat16: return cuda::quantize_as<DType::kFloat16>(args, a.stream);
  }
  return Status::kBadArgument;
}

}  // namespace fastlora
