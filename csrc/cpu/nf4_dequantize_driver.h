// nf4_dequantize, less the arithmetic. A level's file gives a struct `Level` (in its anonymous namespace, so
// that nothing instantiated here can leak into another level) with
//
//   void decode<D>(const uint8_t* packed, int64_t count, float absmax, void* out)
//       code * absmax in float32, rounded once to D; reads ceil(count / 2) bytes
//   void decode_bytes<D>(const uint8_t* codes, int64_t count, float absmax, void* out)   one code a byte;
//       may read kDecodeSlack bytes more
//   void unpack(const uint8_t* packed, int64_t count, uint8_t* codes)   reads ceil(count / 2) bytes, may write
//       kDecodeSlack more
#pragma once

#include "nf4_walk.h"
#include "parallel.h"

namespace fastlora::cpu {

static constexpr int64_t kDecodeStrip = 4096;  // columns unpacked at a time, where bytes and blocks do not line up
static constexpr int64_t kDecodeSlack = 64;

struct DequantizeJob {
  const Nf4DequantizeArgs& args;
  Nf4Walk walk;
  const float* map;
};

template <class Level, DType D>
static void dequantize_flat_item(Level& level, const DequantizeJob& job, const Nf4Item& item) {
  const Nf4Weight& w = job.args.weight;
  for (int64_t i = item.col_begin; i < item.col_end; i += w.blocksize) {
    level.template decode<D>(w.packed + i / 2, min64(w.blocksize, item.col_end - i),
                             block_absmax(w.scales, job.map, i / w.blocksize), element_ptr(job.args.out, i, D));
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

template <class Level, DType D>
static void dequantize_range(void* context, int64_t begin, int64_t end) {
  const auto& job = *static_cast<const DequantizeJob*>(context);
  Level level;
  for (int64_t index = begin; index < end; ++index) {
    const Nf4Item item = nf4_item(job.walk, index);
    if (job.walk.flat) {
      dequantize_flat_item<Level, D>(level, job, item);
    } else {
      dequantize_ragged_item<Level, D>(level, job, item);
    }
  }
}

template <class Level>
static Status dequantize_with(const Nf4DequantizeArgs& args) {
  DequantizeJob job{args, nf4_walk(args.weight.n, args.weight.k), nf4_dynamic_map()};
  switch (args.dtype) {
    case DType::kFloat32:
      parallel_ranges(job.walk.items, args.threads, dequantize_range<Level, DType::kFloat32>, &job);
      break;
    case DType::kBFloat16:
      parallel_ranges(job.walk.items, args.threads, dequantize_range<Level, DType::kBFloat16>, &job);
      break;
    case DType::kFloat16:
      parallel_ranges(job.walk.items, args.threads, dequantize_range<Level, DType::kFloat16>, &job);
      break;
    default: return Status::kBadArgument;
  }
  return Status::kOk;
}

}  // namespace fastlora::cpu
