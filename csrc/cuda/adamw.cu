// adamw and adamw_8bit on the device: the CPU's bits (include/fastlora/adamw.h says which), in one pass.
//
// A warp takes 256 elements at a time, a block of 8-bit moments: every lane two runs of four, 128 apart, so that
// float32 moves in vectors of 16 bytes, 16-bit floats of 8 and codes of 4, each of them whole sectors.
//
// Codes are looked up in shared memory, both ways. A value's leading 16 bits name a cell of its map with at most
// one midpoint in it; the cell holds the lower of its codes, and one comparison with the bound above that one
// finishes.
#include "fastlora/cuda.h"
#include "kernels.cuh"
#include "launch.cuh"
#include "nf4.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kFours = 2;  // of a lane
constexpr int kGroup = 32 * 4 * kFours;
static_assert(kGroup == kAdamwBlocksize);

struct UpdateArgs {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;               // float32, or codes and with them:
  float *exp_avg_scale, *exp_avg_sq_scale;  // one a group
  const Words4* tables;                     // AdamwTables
  int64_t count;
  AdamwStep step;
  float weight;  // weight1, or weight1 - 1 where lerp counts from the far end:
  bool near;
  DType grad_dtype;
  bool vectors;  // every address is a multiple of 4 elements
};

// ---- four elements ------------------------------------------------------------------------------------------

template <DType D>
FASTLORA_DEVICE float load_one(const void* base, int64_t index FASTLORA_AT) {
  if constexpr (D == DType::kFloat32) {
    return load_global(static_cast<const float*>(base) + index FASTLORA_HERE);
  } else {
    return Element<D>::of_half(load_global(static_cast<const uint16_t*>(base) + index FASTLORA_HERE));
  }
}

// Zeros past the end. `whole`: none is, and they are one vector. Not by load_readonly: all but the gradient is
// written in the same launch.
template <DType D>
FASTLORA_DEVICE void load_four(const void* base, int64_t index, int64_t count, bool whole,
                               float (&out)[4] FASTLORA_AT) {
  if (!whole) {
    FASTLORA_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = index + i < count ? load_one<D>(base, index + i FASTLORA_HERE) : 0.0f;
  } else if constexpr (D == DType::kFloat32) {
    const Words4 words = load_global(static_cast<const Words4*>(base) + index / 4 FASTLORA_HERE);
    FASTLORA_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = float_of(words.w[i]);
  } else {
    const Words2 words = load_global(static_cast<const Words2*>(base) + index / 4 FASTLORA_HERE);
    FASTLORA_UNROLL
    for (int i = 0; i < 4; ++i) {
      out[i] = Element<D>::of_half(static_cast<uint16_t>(words.w[i / 2] >> (16 * (i % 2))));
    }
  }
}

template <DType D>
FASTLORA_DEVICE void store_four(void* base, int64_t index, int64_t count, bool whole,
                                const float (&values)[4] FASTLORA_AT) {
  if (!whole) {
    for (int i = 0; i < 4 && index + i < count; ++i) {
      Element<D>::store(base, index + i, values[i] FASTLORA_HERE);
    }
  } else if constexpr (D == DType::kFloat32) {
    store_global(static_cast<Words4*>(base) + index / 4, Element<D>::pack(values) FASTLORA_HERE);
  } else {
    const Words2 words{{pack_pair<D>(values[0], values[1]), pack_pair<D>(values[2], values[3])}};
    store_global(static_cast<Words2*>(base) + index / 4, words FASTLORA_HERE);
  }
}

FASTLORA_DEVICE void load_gradient(const UpdateArgs& args, int64_t index, bool whole, float (&out)[4]) {
  switch (args.grad_dtype) {
    case DType::kFloat32: return load_four<DType::kFloat32>(args.grad, index, args.count, whole, out);
    case DType::kBFloat16: return load_four<DType::kBFloat16>(args.grad, index, args.count, whole, out);
    case DType::kFloat16: return load_four<DType::kFloat16>(args.grad, index, args.count, whole, out);
  }
}

// ---- the update ---------------------------------------------------------------------------------------------

// Returns the parameter.
FASTLORA_DEVICE float update(const UpdateArgs& args, float p, float g, float& m, float& v) {
  const AdamwStep& s = args.step;
  m = multiply_add(args.weight, add(g, -m), args.near ? m : g);
  v = multiply_add(multiply(s.weight2, g), g, multiply(v, s.beta2));
  const float denominator = add(divide(square_root(v), s.correction2), s.eps);
  return add(multiply(p, s.decay), divide(multiply(s.minus_step, m), denominator));
}

FASTLORA_DEVICE int64_t first_group() { return static_cast<int64_t>(block_index()) * kWarps + warp_index(); }
FASTLORA_DEVICE int64_t group_stride() { return static_cast<int64_t>(block_count()) * kWarps; }

template <DType P>
FASTLORA_KERNEL(kThreads, 4)
adamw(FASTLORA_PARAMETER UpdateArgs args) {
  constexpr DType kF = DType::kFloat32;
  const int64_t groups = (args.count + kGroup - 1) / kGroup;
  for (int64_t group = first_group(); group < groups; group += group_stride()) {
    float p[kFours][4], g[kFours][4], m[kFours][4], v[kFours][4];
    const int64_t first = group * kGroup + lane_index() * 4;
    FASTLORA_UNROLL
    for (int q = 0; q < kFours; ++q) {
      const int64_t at = first + q * 128;
      const bool whole = args.vectors && at + 4 <= args.count;
      load_four<P>(args.param, at, args.count, whole, p[q]);
      load_four<kF>(args.exp_avg, at, args.count, whole, m[q]);
      load_four<kF>(args.exp_avg_sq, at, args.count, whole, v[q]);
      load_gradient(args, at, whole, g[q]);
    }
    FASTLORA_UNROLL
    for (int q = 0; q < kFours; ++q) {
      const int64_t at = first + q * 128;
      const bool whole = args.vectors && at + 4 <= args.count;
      FASTLORA_UNROLL
      for (int i = 0; i < 4; ++i) p[q][i] = update(args, p[q][i], g[q][i], m[q][i], v[q][i]);
      store_four<P>(args.param, at, args.count, whole, p[q]);
      store_four<kF>(args.exp_avg, at, args.count, whole, m[q]);
      store_four<kF>(args.exp_avg_sq, at, args.count, whole, v[q]);
    }
  }
}

// ---- moments of 8 bits --------------------------------------------------------------------------------------

constexpr int kTableVectors = static_cast<int>(sizeof(AdamwTables) / sizeof(Words4));
static_assert(sizeof(AdamwTables) % sizeof(Words4) == 0);

FASTLORA_DEVICE const AdamwTables& tables() { return *shared_memory<AdamwTables>(0); }

FASTLORA_DEVICE void fill_tables(const UpdateArgs& args) {
  auto* to = shared_memory<Words4>(0);
  for (int i = thread_index(); i < kTableVectors; i += kThreads)
    store_shared(to + i, load_readonly(args.tables + i));
  sync_threads();
}

// Four codes, or their values times the scale; zeros past the end.
FASTLORA_DEVICE void load_moments(const void* codes, const float* values, float scale, int64_t index,
                                  int64_t count, bool whole, float (&out)[4] FASTLORA_AT) {
  const auto* from = static_cast<const uint8_t*>(codes) + index;
  uint32_t word = 0;
  if (whole) {
    word = load_global(reinterpret_cast<const uint32_t*>(from) FASTLORA_HERE);
  } else {
    for (int i = 0; i < 4 && index + i < count; ++i) {
      word |= static_cast<uint32_t>(load_global(from + i FASTLORA_HERE)) << (8 * i);
    }
  }
  FASTLORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float value = load_shared(values + (word >> (8 * i) & 255) FASTLORA_HERE);
    out[i] = multiply(whole || index + i < count ? value : 0.0f, scale);
  }
}

// The nearest code, a tie to the lower one; without a sign none is 0 but of 0.
template <bool kSigned>
FASTLORA_DEVICE uint32_t code_of(float f) {
  const auto& t = tables();
  const uint32_t bits = bits_of(f);
  int cell = static_cast<int>((bits & 0x7fffffffu) >> 16) - kMapFirstCell;
  cell = cell < 0 ? 0 : cell < kMapCells ? cell : kMapCells - 1;
  if (kSigned && bits >> 31 != 0) cell += kMapCells;
  const uint32_t low = load_shared((kSigned ? t.signed_cells : t.unsigned_cells) + cell);
  const uint32_t code = low + (f > load_shared((kSigned ? t.signed_bounds : t.unsigned_bounds) + low) ? 1 : 0);
  return !kSigned && f > 0.0f && code == 0 ? 1 : code;
}

template <bool kSigned>
FASTLORA_DEVICE void store_moments(void* codes, float inverse, int64_t index, int64_t count, bool whole,
                                   const float (&values)[4] FASTLORA_AT) {
  auto* to = static_cast<uint8_t*>(codes) + index;
  uint32_t word = 0;
  FASTLORA_UNROLL
  for (int i = 0; i < 4; ++i) word |= code_of<kSigned>(multiply(values[i], inverse)) << (8 * i);
  if (whole) {
    store_global(reinterpret_cast<uint32_t*>(to), word FASTLORA_HERE);
    return;
  }
  for (int i = 0; i < 4 && index + i < count; ++i) {
    store_global(to + i, static_cast<uint8_t>(word >> (8 * i)) FASTLORA_HERE);
  }
}

// By bits, in which Inf and then NaN come after every number.
FASTLORA_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

FASTLORA_DEVICE float scale_of(uint32_t largest) {
  const float f = float_of(largest);
  return f == 0.0f ? 0.0f : f < 1e-38f ? 1e-38f : f;
}

FASTLORA_DEVICE float inverse_of(float scale) { return scale == 0.0f ? 0.0f : divide(1.0f, scale); }

template <DType P>
FASTLORA_KERNEL(kThreads, 4)
adamw_8bit(FASTLORA_PARAMETER UpdateArgs args) {
  fill_tables(args);
  const auto& t = tables();
  const int64_t groups = (args.count + kGroup - 1) / kGroup;
  for (int64_t group = first_group(); group < groups; group += group_stride()) {
    float p[kFours][4], g[kFours][4], m[kFours][4], v[kFours][4];
    const int64_t first = group * kGroup + lane_index() * 4;
    const float scale1 = load_global(args.exp_avg_scale + group);
    const float scale2 = load_global(args.exp_avg_sq_scale + group);
    FASTLORA_UNROLL
    for (int q = 0; q < kFours; ++q) {
      const int64_t at = first + q * 128;
      const bool whole = args.vectors && at + 4 <= args.count;
      load_four<P>(args.param, at, args.count, whole, p[q]);
      load_gradient(args, at, whole, g[q]);
      load_moments(args.exp_avg, t.signed_values, scale1, at, args.count, whole, m[q]);
      load_moments(args.exp_avg_sq, t.unsigned_values, scale2, at, args.count, whole, v[q]);
    }
    uint32_t largest1 = 0, largest2 = 0;
    FASTLORA_UNROLL
    for (int q = 0; q < kFours; ++q) {
      const int64_t at = first + q * 128;
      FASTLORA_UNROLL
      for (int i = 0; i < 4; ++i) {
        p[q][i] = update(args, p[q][i], g[q][i], m[q][i], v[q][i]);
        largest1 = larger(largest1, bits_of(m[q][i]) & 0x7fffffffu);
        largest2 = larger(largest2, bits_of(v[q][i]) & 0x7fffffffu);
      }
      store_four<P>(args.param, at, args.count, args.vectors && at + 4 <= args.count, p[q]);
    }
    for (int by = 16; by > 0; by /= 2) {
      largest1 = larger(largest1, shuffle_xor(largest1, by, kAllLanes));
      largest2 = larger(largest2, shuffle_xor(largest2, by, kAllLanes));
    }
    const float new1 = scale_of(largest1), new2 = scale_of(largest2);
    sync_warp();  // all of them have read the scales
    if (lane_index() == 0) {
      store_global(args.exp_avg_scale + group, new1);
      store_global(args.exp_avg_sq_scale + group, new2);
    }
    const float inverse1 = inverse_of(new1), inverse2 = inverse_of(new2);
    FASTLORA_UNROLL
    for (int q = 0; q < kFours; ++q) {
      const int64_t at = first + q * 128;
      const bool whole = args.vectors && at + 4 <= args.count;
      store_moments<true>(args.exp_avg, inverse1, at, args.count, whole, m[q]);
      store_moments<false>(args.exp_avg_sq, inverse2, at, args.count, whole, v[q]);
    }
  }
}

// ---- launches -----------------------------------------------------------------------------------------------

template <class Call>
UpdateArgs args_of(const Call& a, int64_t moment_bytes) {
  const bool vectors = aligned(a.param, 4 * bytes_of(a.dtype)) && aligned(a.grad, 4 * bytes_of(a.grad_dtype)) &&
                       aligned(a.exp_avg, 4 * moment_bytes) && aligned(a.exp_avg_sq, 4 * moment_bytes);
  const bool near = a.step.weight1 < 0.5f;
  return {.param = a.param,
          .grad = a.grad,
          .exp_avg = a.exp_avg,
          .exp_avg_sq = a.exp_avg_sq,
          .exp_avg_scale = nullptr,
          .exp_avg_sq_scale = nullptr,
          .tables = nullptr,
          .count = a.count,
          .step = a.step,
          .weight = near ? a.step.weight1 : a.step.weight1 - 1.0f,
          .near = near,
          .grad_dtype = a.grad_dtype,
          .vectors = vectors};
}

bool is_float(DType dtype) { return dtype >= DType::kFloat32 && dtype <= DType::kFloat16; }

template <class Call>
bool refused(const Call& a) {
  return a.count < 0 || !is_float(a.dtype) || !is_float(a.grad_dtype);
}

template <DType P>
Status launch_adamw(const UpdateArgs& args, void* stream) {
  const bool eight = args.tables != nullptr;
  const int shared = eight ? static_cast<int>(sizeof(AdamwTables)) : 0;
  const int64_t wanted = ceil_div(args.count, kGroup * kWarps);
  const int64_t most = resident_blocks(eight ? adamw_8bit<P> : adamw<P>, kThreads, shared);
  if (most == 0) return Status::kDeviceError;
  const LaunchShape shape{
      .blocks = static_cast<int>(wanted < most ? wanted : most), .threads = kThreads, .shared_bytes = shared};
  return eight ? FASTLORA_LAUNCH(adamw_8bit<P>, shape, args, stream)
               : FASTLORA_LAUNCH(adamw<P>, shape, args, stream);
}

Status launch_of(DType dtype, const UpdateArgs& args, void* stream) {
  switch (dtype) {
    case DType::kFloat32: return launch_adamw<DType::kFloat32>(args, stream);
    case DType::kBFloat16: return launch_adamw<DType::kBFloat16>(args, stream);
    case DType::kFloat16: return launch_adamw<DType::kFloat16>(args, stream);
  }
  return Status::kBadArgument;
}

}  // namespace
}  // namespace fastlora::cuda

namespace fastlora {

Status adamw_cuda(const AdamwCudaArgs& a) {
  if (cuda::refused(a.call)) return Status::kBadArgument;
  if (a.call.count == 0) return Status::kOk;
  return cuda::launch_of(a.call.dtype, cuda::args_of(a.call, 4), a.stream);
}

Status adamw_8bit_cuda(const Adamw8bitCudaArgs& a) {
  if (cuda::refused(a.call) || a.tables == nullptr) return Status::kBadArgument;
  if (a.call.count == 0) return Status::kOk;
  cuda::UpdateArgs args = cuda::args_of(a.call, 1);
  args.exp_avg_scale = a.call.exp_avg_scale;
  args.exp_avg_sq_scale = a.call.exp_avg_sq_scale;
  args.tables = reinterpret_cast<const cuda::Words4*>(a.tables);
  return cuda::launch_of(a.call.dtype, args, a.stream);
}

}  // namespace fastlora
