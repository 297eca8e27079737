// Quantise, double-quantise and dequantise in plain C++: the fallback of every machine, and the shape the
// wide levels follow.
#include <cmath>
#include <new>

#include "fastlora/nf4.h"
#include "kernels.h"
#include "numeric.h"
#include "parallel.h"

namespace fastlora {
namespace cpu {
namespace {

// The code nearest to a scaled weight: how many of the 15 midpoints lie strictly below it, so that a tie
// takes the lower code.
inline uint8_t nearest_code(float scaled) {
  uint8_t code = 0;
  for (int i = 0; i < 15; ++i) {
    code = static_cast<uint8_t>(code + (scaled > (kNf4Codes[i] + kNf4Codes[i + 1]) * 0.5f ? 1 : 0));
  }
  return code;
}

struct QuantizeJob {
  const Nf4QuantizeArgs& args;
  bool finite;  // only ever cleared
};

// Rows are packed byte by byte, blocks run over the flattened tensor: with an odd number of columns a byte
// and a block boundary do not line up, so absmax comes first for all blocks, then codes by rows.
void absmax_range(void* context, int64_t begin, int64_t end) {
  auto& job = *static_cast<QuantizeJob*>(context);
  const Nf4QuantizeArgs& a = job.args;
  const int64_t count = a.rows * a.cols;
  bool finite = true;
  for (int64_t b = begin; b < end; ++b) {
    float absmax = 0.0f;
    const int64_t last = min64((b + 1) * a.blocksize, count);
    for (int64_t i = b * a.blocksize; i < last; ++i) {
      const float magnitude = std::fabs(load_as_float(a.weight, i, a.dtype));
      finite = finite && magnitude <= 3.4028234663852886e38f;
      absmax = magnitude > absmax ? magnitude : absmax;
    }
    a.absmax[b] = absmax;
  }
  if (!finite) __atomic_store_n(&job.finite, false, __ATOMIC_RELAXED);
}

void pack_range(void* context, int64_t begin, int64_t end) {
  const Nf4QuantizeArgs& a = static_cast<QuantizeJob*>(context)->args;
  const int64_t row_bytes = ceil_div(a.cols, 2);
  for (int64_t row = begin; row < end; ++row) {
    auto code_at = [&](int64_t column) -> uint8_t {
      if (column >= a.cols) return 7;
      const int64_t i = row * a.cols + column;
      const float absmax = a.absmax[i / a.blocksize];
      const float inverse = absmax > 0.0f ? 1.0f / absmax : 0.0f;
      return nearest_code(load_as_float(a.weight, i, a.dtype) * inverse);
    };
    for (int64_t byte = 0; byte < row_bytes; ++byte) {
      a.packed[row * row_bytes + byte] = static_cast<uint8_t>((code_at(2 * byte) << 4) | code_at(2 * byte + 1));
    }
  }
}

void dequantize_range(void* context, int64_t begin, int64_t end) {
  const Nf4DequantizeArgs& a = *static_cast<const Nf4DequantizeArgs*>(context);
  const Nf4Weight& w = a.weight;
  const float* map = nf4_dynamic_map();
  const int64_t row_bytes = ceil_div(w.k, 2);
  for (int64_t row = begin; row < end; ++row) {
    int64_t block = -1;
    float absmax = 0.0f;
    for (int64_t column = 0; column < w.k; ++column) {
      const int64_t i = row * w.k + column;
      if (i / w.blocksize != block) {
        block = i / w.blocksize;
        absmax = block_absmax(w.scales, map, block);
      }
      const uint8_t byte = w.packed[row * row_bytes + column / 2];
      const uint8_t code = column % 2 == 0 ? byte >> 4 : byte & 15;
      store_from_float(a.out, i, a.dtype, kNf4Codes[code] * absmax);
    }
  }
}

}  // namespace

Status nf4_quantize_scalar(const Nf4QuantizeArgs& args) {
  QuantizeJob job{args, true};
  parallel_ranges(ceil_div(args.rows * args.cols, args.blocksize), args.threads, absmax_range, &job);
  if (!job.finite) return Status::kNotFinite;
  parallel_ranges(args.rows, args.threads, pack_range, &job);
  return Status::kOk;
}

Status nf4_dequantize_scalar(const Nf4DequantizeArgs& args) {
  parallel_ranges(args.weight.n, args.threads, dequantize_range, const_cast<Nf4DequantizeArgs*>(&args));
  return Status::kOk;
}

}  // namespace cpu
}  // namespace fastlora
