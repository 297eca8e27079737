// Every kernel at every level, by name; dispatch.cpp is the only caller.
#pragma once

#include "fastlora/adamw.h"
#include "fastlora/nf4.h"
#include "fastlora/nf4_linear.h"

namespace fastlora::cpu {

Status nf4_quantize_scalar(const Nf4QuantizeArgs& args);
Status nf4_quantize_avx2(const Nf4QuantizeArgs& args);
Status nf4_quantize_avx512(const Nf4QuantizeArgs& args);

Status nf4_dequantize_scalar(const Nf4DequantizeArgs& args);
Status nf4_dequantize_avx2(const Nf4DequantizeArgs& args);
Status nf4_dequantize_avx512(const Nf4DequantizeArgs& args);

// Any m. The GEMM route: W in dequantised strips, x packed and resident in cache.
Status nf4_linear_scalar(const Nf4LinearArgs& args);
Status nf4_linear_avx2(const Nf4LinearArgs& args);
Status nf4_linear_avx512(const Nf4LinearArgs& args);       // float32 panels, every dtype
Status nf4_linear_avx512_bf16(const Nf4LinearArgs& args);  // bfloat16 x only
Status nf4_linear_amx(const Nf4LinearArgs& args);          // bfloat16 x only
Status nf4_linear_amx_emulated(const Nf4LinearArgs& args);

// A few rows. One pass over the packed bytes, nothing dequantised to memory.
Status nf4_linear_decode_avx2(const Nf4LinearArgs& args);
Status nf4_linear_decode_avx512(const Nf4LinearArgs& args);

Status nf4_linear_grad_input_scalar(const Nf4LinearGradInputArgs& args);
Status nf4_linear_grad_input_avx2(const Nf4LinearGradInputArgs& args);
Status nf4_linear_grad_input_avx512(const Nf4LinearGradInputArgs& args);
Status nf4_linear_grad_input_avx512_bf16(const Nf4LinearGradInputArgs& args);
Status nf4_linear_grad_input_amx(const Nf4LinearGradInputArgs& args);
Status nf4_linear_grad_input_amx_emulated(const Nf4LinearGradInputArgs& args);

Status adamw_scalar(const AdamwArgs& args);
Status adamw_avx2(const AdamwArgs& args);
Status adamw_avx512(const AdamwArgs& args);

Status adamw_8bit_scalar(const Adamw8bitArgs& args);
Status adamw_8bit_avx2(const Adamw8bitArgs& args);
Status adamw_8bit_avx512(const Adamw8bitArgs& args);

// Sums of the columns of x over each group, for a weight with offsets.
struct GroupSumsArgs {
  const void* x;  // (m, k), dtype
  DType dtype;
  int64_t m, k, groups;  // groups divides k
  float* sums;           // (m, groups), out
  int32_t threads;
};
Status group_sums_scalar(const GroupSumsArgs& args);
Status group_sums_avx2(const GroupSumsArgs& args);
Status group_sums_avx512(const GroupSumsArgs& args);
Status group_sums(const GroupSumsArgs& args, Isa isa);  // by the best of these

// Whether nf4_linear takes the kernel for a few rows.
bool takes_decode(Isa isa, DType dtype, int64_t m, const Nf4Weight& weight);

}  // namespace fastlora::cpu
