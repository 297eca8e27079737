// Which kernel runs: one row per level, one column per op, and the crossovers between routes. Nothing else
// decides.
#include "fastlora/cpu.h"
#include "group_offsets.h"
#include "kernels.h"
#include "numeric.h"

namespace fastlora {
namespace {

using namespace cpu;

struct Level {
  Status (*quantize)(const Nf4QuantizeArgs&);
  Status (*dequantize)(const Nf4DequantizeArgs&);
  Status (*linear)(const Nf4LinearArgs&);         // every dtype, or all but bfloat16
  Status (*linear_bf16)(const Nf4LinearArgs&);    // bfloat16 x
  Status (*linear_decode)(const Nf4LinearArgs&);  // up to decode_rows rows of x; null: there is none
  // Crossovers, by the dtype of x: above, the GEMM route is faster.
  int64_t decode_rows_float, decode_rows_half, decode_rows_bfloat;
  Status (*grad_input)(const Nf4LinearGradInputArgs&);
  Status (*grad_input_bf16)(const Nf4LinearGradInputArgs&);
  Status (*group_sums)(const GroupSumsArgs&);
  Status (*adamw)(const AdamwArgs&);
  Status (*adamw_8bit)(const Adamw8bitArgs&);

  int64_t decode_rows(DType dtype) const {
    return dtype == DType::kFloat32   ? decode_rows_float
           : dtype == DType::kFloat16 ? decode_rows_half
                                      : decode_rows_bfloat;
  }
};

// decode_rows were measured; the figures are in docs/cpu_kernels.md, "Where the routes cross".
constexpr Level kLevels[kIsaCount] = {
    {nf4_quantize_scalar, nf4_dequantize_scalar, nf4_linear_scalar, nf4_linear_scalar, nullptr, 0, 0, 0,
     nf4_linear_grad_input_scalar, nf4_linear_grad_input_scalar, group_sums_scalar, adamw_scalar,
     adamw_8bit_scalar},
#ifdef FASTLORA_X86
    {nf4_quantize_avx2, nf4_dequantize_avx2, nf4_linear_avx2, nf4_linear_avx2, nf4_linear_decode_avx2, 8, 12, 12,
     nf4_linear_grad_input_avx2, nf4_linear_grad_input_avx2, group_sums_avx2, adamw_avx2, adamw_8bit_avx2},
    {nf4_quantize_avx512, nf4_dequantize_avx512, nf4_linear_avx512, nf4_linear_avx512, nf4_linear_decode_avx512,
     12, 12, 12, nf4_linear_grad_input_avx512, nf4_linear_grad_input_avx512, group_sums_avx512, adamw_avx512,
     adamw_8bit_avx512},
    {nf4_quantize_avx512, nf4_dequantize_avx512, nf4_linear_avx512, nf4_linear_avx512_bf16,
     nf4_linear_decode_avx512, 12, 10, 10, nf4_linear_grad_input_avx512, nf4_linear_grad_input_avx512_bf16,
     group_sums_avx512, adamw_avx512, adamw_8bit_avx512},
    {nf4_quantize_avx512, nf4_dequantize_avx512, nf4_linear_avx512, nf4_linear_amx, nf4_linear_decode_avx512, 12,
     8, 4, nf4_linear_grad_input_avx512, nf4_linear_grad_input_amx, group_sums_avx512, adamw_avx512,
     adamw_8bit_avx512},
    {nf4_quantize_avx512, nf4_dequantize_avx512, nf4_linear_avx512, nf4_linear_amx_emulated,
     nf4_linear_decode_avx512, 12, 8, 4, nf4_linear_grad_input_avx512, nf4_linear_grad_input_amx_emulated,
     group_sums_avx512, adamw_avx512, adamw_8bit_avx512},
#endif
};

const Level* level_of(Isa isa) {
  const int32_t index = static_cast<int32_t>(isa);
  return index >= 0 && index < kIsaCount && isa_available(isa) ? &kLevels[index] : nullptr;
}

bool valid_blocksize(int64_t b) { return b >= kMinBlocksize && b <= kMaxBlocksize && (b & (b - 1)) == 0; }

// A thread is worth waking for about 10 us of work: so many multiply-adds of the decode kernels.
constexpr int64_t kWorkPerThread = 1 << 18;

// The decode kernels hold whole rows of x and u, at 4 bytes a column: no more than a few MiB of scratch.
constexpr int64_t kDecodeColumns = 1 << 20;

bool decode_fits(const Nf4LinearArgs& a) {
  return a.weight.k > 0 && a.weight.k <= kDecodeColumns - a.r - a.weight.groups;
}

int32_t useful_threads(int32_t threads, int64_t m, const Nf4Weight& w, int64_t r) {
  const auto work = static_cast<double>(m) * static_cast<double>(w.n * w.k + r * (w.n + w.k));
  const double most = work / static_cast<double>(kWorkPerThread) + 1.0;
  return most < static_cast<double>(threads) ? static_cast<int32_t>(most) : threads;
}

bool valid_dtype(DType d) { return static_cast<int32_t>(d) >= 0 && static_cast<int32_t>(d) <= 2; }

bool valid_weight(const Nf4Weight& w) {
  return w.n >= 0 && w.k >= 0 && valid_blocksize(w.blocksize) && valid_offsets(w);
}

}  // namespace

bool cpu::takes_decode(Isa isa, DType dtype, int64_t m, const Nf4Weight& weight) {
  const Level* level = level_of(isa);
  if (level == nullptr || level->linear_decode == nullptr || weight.k <= 0 || weight.k > kDecodeColumns)
    return false;
  return m <= level->decode_rows(dtype);
}

Status nf4_quantize(const Nf4QuantizeArgs& args, Isa isa) {
  const Level* level = level_of(isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  if (args.rows < 0 || args.cols < 0 || !valid_blocksize(args.blocksize)) return Status::kBadArgument;
  if (args.rows == 0 || args.cols == 0) return Status::kOk;
  (void)prefer_huge_pages(args.packed, args.rows * ceil_div(args.cols, 2), false);
  return level->quantize(args);
}

Status nf4_dequantize(const Nf4DequantizeArgs& args, Isa isa) {
  const Level* level = level_of(isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  if (!valid_weight(args.weight)) return Status::kBadArgument;
  if (args.weight.groups > 0 && args.dtype != DType::kFloat32) return Status::kBadArgument;
  if (args.weight.n == 0 || args.weight.k == 0) return Status::kOk;
  const Status status = level->dequantize(args);
  if (status == Status::kOk && args.weight.groups > 0) add_offsets(args);
  return status;
}

Status nf4_linear(const Nf4LinearArgs& args, Isa isa) {
  const Level* level = level_of(isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  if (!valid_weight(args.weight) || args.m < 0 || args.r < 0) return Status::kBadArgument;
  if (args.m == 0 || (args.weight.n == 0 && args.r == 0)) return Status::kOk;
  Nf4LinearArgs a = args;
  a.threads = useful_threads(args.threads, args.m, args.weight, args.r);
  return with_sums(a, isa, [&](const Nf4LinearArgs& call) {
    if (level->linear_decode != nullptr && call.m <= level->decode_rows(call.dtype) && decode_fits(call))
      return level->linear_decode(call);
    return call.dtype == DType::kBFloat16 ? level->linear_bf16(call) : level->linear(call);
  });
}

Status nf4_linear_grad_input(const Nf4LinearGradInputArgs& args, Isa isa) {
  const Level* level = level_of(isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  if (!valid_weight(args.weight) || args.m < 0 || args.r < 0) return Status::kBadArgument;
  if (args.m == 0 || (args.weight.k == 0 && args.r == 0)) return Status::kOk;
  Nf4LinearGradInputArgs a = args;
  a.threads = useful_threads(args.threads, args.m, args.weight, args.r);
  return with_per_group(a, [&](const Nf4LinearGradInputArgs& call) {
    return call.dtype == DType::kBFloat16 ? level->grad_input_bf16(call) : level->grad_input(call);
  });
}

Status cpu::group_sums(const GroupSumsArgs& args, Isa isa) {
  const Level* level = level_of(isa);
  return level == nullptr ? Status::kUnsupportedLevel : level->group_sums(args);
}

Status adamw(const AdamwArgs& args, Isa isa) {
  const Level* level = level_of(isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  if (args.count < 0 || !valid_dtype(args.dtype) || !valid_dtype(args.grad_dtype)) return Status::kBadArgument;
  return level->adamw(args);
}

Status adamw_8bit(const Adamw8bitArgs& args, Isa isa) {
  const Level* level = level_of(isa);
  if (level == nullptr) return Status::kUnsupportedLevel;
  if (args.count < 0 || !valid_dtype(args.dtype) || !valid_dtype(args.grad_dtype)) return Status::kBadArgument;
  return level->adamw_8bit(args);
}

}  // namespace fastlora
