// nf4_quantize, less the arithmetic. A level's file gives a struct `Level` (in its anonymous namespace, so that
// nothing instantiated here can leak into another level) with
//
//   Level();                                                    tables, built once a range
//   float absmax<D>(const void* x, int64_t count)               NaN or Inf if any element is
//   void encode<D, kDivide>(const void* x, int64_t count, float factor, uint8_t* packed)
//       nearest codes of x * factor (kDivide: x / factor), packed; an odd count ends with the zero code
//   void encode_bytes<D, kDivide>(x, count, factor, uint8_t* codes)   one code a byte; may write kSlack more
//   void pack(const uint8_t* codes, int64_t count, uint8_t* packed)   even count
#pragma once

#include "nf4_walk.h"
#include "parallel.h"

namespace fastlora::cpu {

static constexpr int64_t kStrip = kMaxBlocksize;  // columns at a time
static constexpr int64_t kSlack = 64;
static constexpr uint8_t kZeroCode = 7;

template <class Level>
struct QuantizeJob {
  const Nf4QuantizeArgs& args;
  Nf4Walk walk;
  int64_t count;
  bool finite;  // only ever cleared
};

// Below 1e-38 an absmax divides as if it were this, so that the inverse stays finite. The last block, where it is
// not full, is divided; every other one is multiplied by a rounded inverse.
static inline float divisor_of(float absmax) { return absmax < 1e-38f ? 1e-38f : absmax; }

// In strips that stay in L1: every block's absmax, their inverses, then every block's codes. Taken block by block,
// codes wait for the whole chain of a maximum and its inverse, and a core looks ahead only to the next block or
// two.
template <class Level, DType D>
static bool quantize_flat_item(Level& level, const QuantizeJob<Level>& job, const Nf4Item& item) {
  const Nf4QuantizeArgs& a = job.args;
  const int64_t blocksize = a.blocksize;
  bool finite = true;
  for (int64_t strip = item.col_begin; strip < item.col_end; strip += kStrip) {
    const int64_t end = min64(strip + kStrip, item.col_end), blocks = ceil_div(end - strip, blocksize);
    const void* x = element_ptr(a.weight, strip, D);
    uint8_t* packed = a.packed + strip / 2;
    float absmax[kStrip / kMinBlocksize], inverse[kStrip / kMinBlocksize];
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t count = min64(blocksize, end - strip - b * blocksize);
      absmax[b] = level.template absmax<D>(element_ptr(x, b * blocksize, D), count);
      finite = finite && absmax[b] <= 3.4028234663852886e38f;
    }
    std::memcpy(a.absmax + strip / blocksize, absmax, static_cast<size_t>(blocks) * 4);
    for (int64_t b = 0; b < blocks; ++b) inverse[b] = 1.0f / divisor_of(absmax[b]);
    const int64_t full = (end - strip) / blocksize;
    for (int64_t b = 0; b < full; ++b) {
      const int64_t i = b * blocksize;
      level.template encode<D, false>(element_ptr(x, i, D), blocksize, inverse[b], packed + i / 2);
    }
    if (full < blocks) {
      const int64_t i = full * blocksize;
      level.template encode<D, true>(element_ptr(x, i, D), end - strip - i, divisor_of(absmax[full]),
                                     packed + i / 2);
    }
  }
  return finite;
}

template <class Level, DType D>
static bool quantize_ragged_item(Level& level, const QuantizeJob<Level>& job, const Nf4Item& item) {
  const Nf4QuantizeArgs& a = job.args;
  const int64_t cols = job.walk.cols;
  const int64_t first = item.row_begin * cols + item.col_begin;
  const int64_t last = (item.row_end - 1) * cols + item.col_end;
  // A block shared with a neighbouring item is reduced by both and written by the one that holds its start.
  float absmax[kItemElements / kMinBlocksize + 2];
  const int64_t first_block = first / a.blocksize;
  bool finite = true;
  for (int64_t block = first_block; block * a.blocksize < last; ++block) {
    const int64_t start = block * a.blocksize;
    const float value =
        level.template absmax<D>(element_ptr(a.weight, start, D), min64(a.blocksize, job.count - start));
    finite = finite && value <= 3.4028234663852886e38f;
    absmax[block - first_block] = value;
    if (start >= first) a.absmax[block] = value;
  }
  uint8_t codes[kStrip + kSlack];
  for (int64_t row = item.row_begin; row < item.row_end; ++row) {
    for (int64_t strip = item.col_begin; strip < item.col_end; strip += kStrip) {
      const int64_t strip_end = min64(strip + kStrip, item.col_end);
      for (int64_t col = strip; col < strip_end;) {
        const int64_t i = row * cols + col, block = i / a.blocksize;
        const int64_t count = min64(strip_end - col, (block + 1) * a.blocksize - i);
        const float divisor = divisor_of(absmax[block - first_block]);
        const void* x = element_ptr(a.weight, i, D);
        if ((block + 1) * a.blocksize > job.count) {
          level.template encode_bytes<D, true>(x, count, divisor, codes + (col - strip));
        } else {
          level.template encode_bytes<D, false>(x, count, 1.0f / divisor, codes + (col - strip));
        }
        col += count;
      }
      const int64_t width = strip_end - strip;
      codes[width] = kZeroCode;
      level.pack(codes, round_up(width, 2), a.packed + row * job.walk.row_bytes + strip / 2);
    }
  }
  return finite;
}

template <class Level, DType D>
static void quantize_range(void* context, int64_t begin, int64_t end) {
  auto& job = *static_cast<QuantizeJob<Level>*>(context);
  Level level;
  bool finite = true;
  for (int64_t index = begin; index < end && finite; ++index) {
    const Nf4Item item = nf4_item(job.walk, index);
    finite = job.walk.flat ? quantize_flat_item<Level, D>(level, job, item)
                           : quantize_ragged_item<Level, D>(level, job, item);
  }
  if (!finite) __atomic_store_n(&job.finite, false, __ATOMIC_RELAXED);
}

template <class Level>
static Status quantize_with(const Nf4QuantizeArgs& args) {
  QuantizeJob<Level> job{args, nf4_walk(args.rows, args.cols), args.rows * args.cols, true};
  switch (args.dtype) {
    case DType::kFloat32:
      parallel_ranges(job.walk.items, args.threads, quantize_range<Level, DType::kFloat32>, &job);
      break;
    case DType::kBFloat16:
      parallel_ranges(job.walk.items, args.threads, quantize_range<Level, DType::kBFloat16>, &job);
      break;
    case DType::kFloat16:
      parallel_ranges(job.walk.items, args.threads, quantize_range<Level, DType::kFloat16>, &job);
      break;
    default: return Status::kBadArgument;
  }
  return job.finite ? Status::kOk : Status::kNotFinite;
}

}  // namespace fastlora::cpu
