// nf4_dequantize, less the arithmetic. A level's file gives a struct `Level` (in its anonymous namespace, so
// that nothing instantiated here can leak into another level) with
//
//   constexpr bool kStreams;   whether it has stores that go past the caches
//   void decode<D, kStream>(const uint8_t* packed, int64_t count, float absmax, void* out)
//       code * absmax in float32, rounded once to D; reads ceil(count / 2) bytes. kStream: past the caches, to an
//       `out` that is a multiple of 64
//   void drain()   after streaming: makes it visible to other threads before anything stored later
//   void decode_bytes<D>(const uint8_t* codes, int64_t count, float absmax, void* out)   one code a byte;
//       may read kDecodeSlack bytes more
//   void unpack(const uint8_t* packed, int64_t count, uint8_t* codes)   reads ceil(count / 2) bytes, may write
//       kDecodeSlack more
#pragma once

#include "nf4_walk.h"
#include "parallel.h"

namespace fastlora::cpu {

static constexpr int64_t kDecodeStrip = kMaxBlocksize;  // columns at a time
static constexpr int64_t kDecodeSlack = 64;

// An output of at least this many bytes is stored past the caches. An ordinary store first reads the line that it
// is about to overwrite, two fifths of all traffic; but an output that fits the last-level cache is read from
// there next. Measured with 32 MiB of that cache, dequantise and then read: 16 MiB 3 % slower, 64 MiB 8 % faster.
static constexpr int64_t kStreamBytes = int64_t{32} << 20;
static constexpr uintptr_t kStreamAlignment = 64;  // blocks are multiples of 32 elements, so every one starts so

struct DequantizeJob {
  const Nf4DequantizeArgs& args;
  Nf4Walk walk;
  const float* map;
};

// absmax of the blocks of one strip, which share a second-level scale: a strip starts at a multiple of its length,
// and its blocks are a power of two, fewer than kNestedBlocksize.
static void decode_strip_absmax(const DequantizeJob& job, int64_t first, int64_t blocks, float* absmax) {
  const Nf4Scales& scales = job.args.weight.scales;
  if (scales.nested == nullptr) {
    std::memcpy(absmax, scales.codes + first * 4, static_cast<size_t>(blocks) * 4);
    return;
  }
  const float offset = load_unaligned<float>(scales.nested);
  const float scale = load_unaligned<float>(scales.nested + (1 + first / kNestedBlocksize) * 4);
  for (int64_t b = 0; b < blocks; ++b) absmax[b] = job.map[scales.codes[first + b]] * scale + offset;
}
static_assert(kDecodeStrip / kMinBlocksize <= kNestedBlocksize && kDecodeStrip % kMaxBlocksize == 0);

template <class Level, DType D, bool kStream>
static void dequantize_flat_item(Level& level, const DequantizeJob& job, const Nf4Item& item) {
  const Nf4Weight& w = job.args.weight;
  float absmax[kDecodeStrip / kMinBlocksize];
  for (int64_t strip = item.col_begin; strip < item.col_end; strip += kDecodeStrip) {
    const int64_t end = min64(strip + kDecodeStrip, item.col_end), blocks = ceil_div(end - strip, w.blocksize);
    decode_strip_absmax(job, strip / w.blocksize, blocks, absmax);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t i = strip + b * w.blocksize;
      level.template decode<D, kStream>(w.packed + i / 2, min64(w.blocksize, end - i), absmax[b],
                                        element_ptr(job.args.out, i, D));
    }
  }
}

template <class Level, DType D>
static void dequantize_ragged_item(Level& level, const DequantizeJob& job, const Nf4Item& item) {
  const Nf4Weight& w = job.args.weight;
  uint8_t codes[kDecodeStrip + 2 * kDecodeSlack];
  for (int64_t row = item.row_begin; row < item.row_end; ++row) {
    for (int64_t strip = item.col_begin; strip < item.col_end; strip += kDecodeStrip) {
      const int64_t strip_end = min64(strip + kDecodeStrip, item.col_end);
      level.unpack(w.packed + row * job.walk.row_bytes + strip / 2, strip_end - strip, codes);
      for (int64_t col = strip; col < strip_end;) {
        const int64_t i = row * job.walk.cols + col, block = i / w.blocksize;
        const int64_t count = min64(strip_end - col, (block + 1) * w.blocksize - i);
        level.template decode_bytes<D>(codes + (col - strip), count, block_absmax(w.scales, job.map, block),
                                       element_ptr(job.args.out, i, D));
        col += count;
      }
    }
  }
}

template <class Level, DType D, bool kStream>
static void dequantize_range(void* context, int64_t begin, int64_t end) {
  const auto& job = *static_cast<const DequantizeJob*>(context);
  Level level;
  for (int64_t index = begin; index < end; ++index) {
    const Nf4Item item = nf4_item(job.walk, index);
    if (job.walk.flat) {
      dequantize_flat_item<Level, D, kStream>(level, job, item);
    } else {
      dequantize_ragged_item<Level, D>(level, job, item);
    }
  }
  if constexpr (kStream) Level::drain();
}

template <class Level, DType D>
static void dequantize_as(DequantizeJob& job) {
  const Nf4Weight& w = job.args.weight;
  auto* range = dequantize_range<Level, D, false>;
  if constexpr (Level::kStreams) {
    const bool aligned = reinterpret_cast<uintptr_t>(job.args.out) % kStreamAlignment == 0;
    const bool large = w.n * w.k >= kStreamBytes / dtype_bytes(D);
    if (job.walk.flat && aligned && large) range = dequantize_range<Level, D, true>;
  }
  parallel_ranges(job.walk.items, job.args.threads, range, &job);
}

template <class Level>
static Status dequantize_with(const Nf4DequantizeArgs& args) {
  DequantizeJob job{args, nf4_walk(args.weight.n, args.weight.k), nf4_dynamic_map()};
  switch (args.dtype) {
    case DType::kFloat32: dequantize_as<Level, DType::kFloat32>(job); break;
    case DType::kBFloat16: dequantize_as<Level, DType::kBFloat16>(job); break;
    case DType::kFloat16: dequantize_as<Level, DType::kFloat16>(job); break;
    default: return Status::kBadArgument;
  }
  return Status::kOk;
}

}  // namespace fastlora::cpu
