// The loops whose speed is a machine's roof: what any kernel here could reach at best. One thread each; the
// caller (roofs.cpp) runs one per thread at the same time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlora::bench {

// Reads `bytes` (a multiple of 1024, 64-byte aligned) once. The result keeps the loads alive.
uint64_t read_scalar(const void* data, size_t bytes);
uint64_t read_avx2(const void* data, size_t bytes);
uint64_t read_avx512(const void* data, size_t bytes);

// Copies `bytes` (the same conditions) past the caches, with stores that do not first read what they overwrite.
void copy_streaming_scalar(void* to, const void* from, size_t bytes);  // a plain copy
void copy_streaming_avx2(void* to, const void* from, size_t bytes);
void copy_streaming_avx512(void* to, const void* from, size_t bytes);

// `steps` rounds of float32 multiply-adds on registers; *flops receives the operations done (2 a multiply-add).
float fma_scalar(int64_t steps, const float* data, double* flops);
float fma_avx2(int64_t steps, const float* data, double* flops);
float fma_avx512(int64_t steps, const float* data, double* flops);

// bfloat16 products summed in float32, one operand streamed `passes` times from `data` (L2-resident, random,
// `bytes` a multiple of 4096).
float bf16_dot_avx512_bf16(int64_t passes, const void* data, size_t bytes, double* flops);
float bf16_tiles_amx(int64_t passes, const void* data, size_t bytes, double* flops);

}  // namespace fastlora::bench
