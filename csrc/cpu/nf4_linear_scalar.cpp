// The fused linear and its input gradient in plain C++: rows of W are dequantised a piece at a time into a
// small buffer, in float32, in natural order. Slow and simple on purpose; it shares nothing with the packed
// routes of the wide levels, so that it can stand against them in tests.
#include "kernels.h"
#include "numeric.h"
#include "parallel.h"

namespace fastlora::cpu {
namespace {

constexpr int64_t kPiece = 1024;  // columns dequantised at a time: 4 KiB of float32

// out[j] = W[row][first + j] for j in [0, count)
void dequantize_piece(const Nf4Weight& w, const float* map, int64_t row, int64_t first, int64_t count,
                      float* out) {
  const uint8_t* bytes = w.packed + row * ceil_div(w.k, 2);
  int64_t block = -1;
  float absmax = 0.0f;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t column = first + j;
    const int64_t here = (row * w.k + column) / w.blocksize;
    if (here != block) {
      block = here;
      absmax = block_absmax(w.scales, map, block);
    }
    const uint8_t byte = bytes[column / 2];
    out[j] = kNf4Codes[column % 2 == 0 ? byte >> 4 : byte & 15] * absmax;
  }
}

float dot(const float* a, const void* b, int64_t b_first, DType b_dtype, int64_t count, float sum) {
  for (int64_t j = 0; j < count; ++j) sum += a[j] * load_as_float(b, b_first + j, b_dtype);
  return sum;
}

constexpr int64_t kRowGroup = 16;  // rows of x that share one dequantised piece

// Tasks are rows of x: u = x·Aᵀ.
void forward_u_range(void* context, int64_t begin, int64_t end) {
  const Nf4LinearArgs& a = *static_cast<const Nf4LinearArgs*>(context);
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t q = 0; q < a.r; ++q) {
      float sum = 0.0f;
      for (int64_t j = 0; j < a.weight.k; ++j) {
        sum += load_as_float(a.x, i * a.weight.k + j, a.dtype) *
               load_as_float(a.lora_a, q * a.weight.k + j, a.lora_dtype);
      }
      store_from_float(a.u, i * a.r + q, a.dtype, sum);
    }
  }
}

// Tasks are output features.
void forward_range(void* context, int64_t begin, int64_t end) {
  const Nf4LinearArgs& a = *static_cast<const Nf4LinearArgs*>(context);
  const Nf4Weight& w = a.weight;
  const float* map = nf4_dynamic_map();
  float piece[kPiece];
  for (int64_t o = begin; o < end; ++o) {
    for (int64_t i0 = 0; i0 < a.m; i0 += kRowGroup) {
      const int64_t rows = min64(kRowGroup, a.m - i0);
      float sums[kRowGroup] = {};
      for (int64_t first = 0; first < w.k; first += kPiece) {
        const int64_t count = min64(kPiece, w.k - first);
        dequantize_piece(w, map, o, first, count, piece);
        for (int64_t i = 0; i < rows; ++i)
          sums[i] = dot(piece, a.x, (i0 + i) * w.k + first, a.dtype, count, sums[i]);
      }
      for (int64_t i = 0; i < rows; ++i) {
        float sum = sums[i];
        for (int64_t q = 0; q < a.r; ++q) {
          sum += load_as_float(a.u, (i0 + i) * a.r + q, a.dtype) *
                 (a.scaling * load_as_float(a.lora_b, o * a.r + q, a.lora_dtype));
        }
        for (int64_t q = 0; q < w.groups; ++q) {
          sum += a.sums[(i0 + i) * w.groups + q] * w.offsets[o * w.groups + q];
        }
        if (a.gain != nullptr) sum *= a.gain[o];
        if (a.bias != nullptr) sum += load_as_float(a.bias, o, a.dtype);
        if (a.addend != nullptr) sum += a.addend[(i0 + i) * w.n + o];
        store_from_float(a.y, (i0 + i) * w.n + o, a.dtype, sum);
      }
    }
  }
}

// Tasks are rows of dy: v = scaling · dy·B, then that row of dx, a piece of columns at a time.
void backward_range(void* context, int64_t begin, int64_t end) {
  const Nf4LinearGradInputArgs& a = *static_cast<const Nf4LinearGradInputArgs*>(context);
  const Nf4Weight& w = a.weight;
  const float* map = nf4_dynamic_map();
  float piece[kPiece];
  float sums[kRowGroup][kPiece];
  for (int64_t i0 = begin; i0 < end; i0 += kRowGroup) {
    const int64_t rows = min64(kRowGroup, end - i0);
    for (int64_t i = i0; i < i0 + rows; ++i) {
      for (int64_t q = 0; q < a.r; ++q) {
        float sum = 0.0f;
        for (int64_t o = 0; o < w.n; ++o) {
          sum += load_as_float(a.dy, i * w.n + o, a.dtype) *
                 (a.scaling * load_as_float(a.lora_b, o * a.r + q, a.lora_dtype));
        }
        store_from_float(a.v, i * a.r + q, a.dtype, sum);
      }
      for (int64_t q = 0; q < w.groups; ++q) {
        float sum = 0.0f;
        for (int64_t o = 0; o < w.n; ++o) {
          sum += load_as_float(a.dy, i * w.n + o, a.dtype) * w.offsets[o * w.groups + q];
        }
        store_from_float(a.per_group, i * w.groups + q, a.dtype, sum);
      }
    }
    for (int64_t first = 0; first < w.k; first += kPiece) {
      const int64_t count = min64(kPiece, w.k - first);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < count; ++j) sums[i][j] = 0.0f;
      }
      for (int64_t o = 0; o < w.n; ++o) {
        dequantize_piece(w, map, o, first, count, piece);
        for (int64_t i = 0; i < rows; ++i) {
          const float g = load_as_float(a.dy, (i0 + i) * w.n + o, a.dtype);
          for (int64_t j = 0; j < count; ++j) sums[i][j] += g * piece[j];
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t q = 0; q < a.r; ++q) {
          const float g = load_as_float(a.v, (i0 + i) * a.r + q, a.dtype);
          for (int64_t j = 0; j < count; ++j) {
            sums[i][j] += g * load_as_float(a.lora_a, q * w.k + first + j, a.lora_dtype);
          }
        }
        for (int64_t j = 0; j < count && w.groups > 0; ++j) {
          const int64_t group = (first + j) / (w.k / w.groups);
          sums[i][j] += load_as_float(a.per_group, (i0 + i) * w.groups + group, a.dtype);
        }
        for (int64_t j = 0; j < count; ++j) {
          const int64_t at = (i0 + i) * w.k + first + j;
          store_from_float(a.dx, at, a.dtype, a.addend == nullptr ? sums[i][j] : sums[i][j] + a.addend[at]);
        }
      }
    }
  }
}

}  // namespace

Status nf4_linear_scalar(const Nf4LinearArgs& args) {
  auto* context = const_cast<Nf4LinearArgs*>(&args);
  if (args.r > 0 && args.lora_a != nullptr) parallel_ranges(args.m, args.threads, forward_u_range, context);
  parallel_ranges(args.weight.n, args.threads, forward_range, context);
  return Status::kOk;
}

Status nf4_linear_grad_input_scalar(const Nf4LinearGradInputArgs& args) {
  parallel_ranges(args.m, args.threads, backward_range, const_cast<Nf4LinearGradInputArgs*>(&args));
  return Status::kOk;
}

}  // namespace fastlora::cpu
