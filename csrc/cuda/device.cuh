// Everything the kernels take from the device, wrapped once: a device body, and a host body that the emulator in
// csrc/emulator runs. Kernels touch memory and other threads through these functions alone, and hold no assembly.
//
// FASTLORA_AT at the end of a parameter list takes the caller's line, for the emulator's reports and counts; on
// the device it is nothing.
#pragma once

#include <cstdint>

#include "fastlora/status.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FASTLORA_DEVICE __device__ __forceinline__
#define FASTLORA_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTLORA_KERNEL(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define FASTLORA_PARAMETER const __grid_constant__
#define FASTLORA_CONSTANT __device__ __constant__ const
#define FASTLORA_AT_ONLY
#define FASTLORA_AT
#define FASTLORA_HERE
#define FASTLORA_UNROLL _Pragma("unroll")
#else
#include <cmath>
#include <cstring>

#include "../emulator/intrinsics.h"

#define FASTLORA_DEVICE inline
#define FASTLORA_HOST_DEVICE inline
#define FASTLORA_KERNEL(threads, blocks) static void
#define FASTLORA_PARAMETER const
#define FASTLORA_CONSTANT const
#define FASTLORA_AT_ONLY emulator::Where at = emulator::Where::here()
#define FASTLORA_AT , FASTLORA_AT_ONLY
#define FASTLORA_HERE , at
#define FASTLORA_UNROLL
#endif

namespace fastlora::cuda {

inline constexpr uint32_t kAllLanes = 0xffffffffu;

// 8 and 16 bytes moved as one.
struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(16) Words4 {
  uint32_t w[4];
};

// ---- who am I -----------------------------------------------------------------------------------------------

#ifdef __CUDACC__
FASTLORA_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTLORA_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
FASTLORA_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
FASTLORA_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
FASTLORA_DEVICE int block_index_z() { return static_cast<int>(blockIdx.z); }
FASTLORA_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
#else
FASTLORA_DEVICE int thread_index() { return emulator::thread_index(); }
FASTLORA_DEVICE int thread_count() { return emulator::thread_count(); }
FASTLORA_DEVICE int block_index() { return emulator::block_index(0); }
FASTLORA_DEVICE int block_index_y() { return emulator::block_index(1); }
FASTLORA_DEVICE int block_index_z() { return emulator::block_index(2); }
FASTLORA_DEVICE int block_count() { return emulator::block_count(0); }
#endif
FASTLORA_DEVICE int lane_index() { return thread_index() % 32; }
FASTLORA_DEVICE int warp_index() { return thread_index() / 32; }

// ---- meeting others -----------------------------------------------------------------------------------------

FASTLORA_DEVICE void sync_threads(FASTLORA_AT_ONLY) {
#ifdef __CUDACC__
  __syncthreads();
#else
  emulator::sync_threads(at);
#endif
}

// `threads` of the block, whole warps, at barrier 1..15.
FASTLORA_DEVICE void sync_named(int barrier, int threads FASTLORA_AT) {
#ifdef __CUDACC__
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#else
  emulator::sync_named(barrier, threads, at);
#endif
}

FASTLORA_DEVICE void sync_warp(FASTLORA_AT_ONLY) {
#ifdef __CUDACC__
  __syncwarp();
#else
  emulator::sync_warp(kAllLanes, at);
#endif
}

// Every block of a cooperative launch.
FASTLORA_DEVICE void sync_grid(FASTLORA_AT_ONLY) {
#ifdef __CUDACC__
  cooperative_groups::this_grid().sync();
#else
  emulator::sync_grid(at);
#endif
}

FASTLORA_DEVICE uint32_t shuffle(uint32_t value, int lane FASTLORA_AT) {
#ifdef __CUDACC__
  return __shfl_sync(kAllLanes, value, lane);
#else
  return emulator::shuffle(emulator::Shuffle::kIndex, value, lane, kAllLanes, at);
#endif
}

FASTLORA_DEVICE uint32_t shuffle_xor(uint32_t value, int lane_mask, uint32_t lanes FASTLORA_AT) {
#ifdef __CUDACC__
  return __shfl_xor_sync(lanes, value, lane_mask);
#else
  return emulator::shuffle(emulator::Shuffle::kXor, value, lane_mask, lanes, at);
#endif
}

FASTLORA_DEVICE uint32_t shuffle_up(uint32_t value, int by FASTLORA_AT) {
#ifdef __CUDACC__
  return __shfl_up_sync(kAllLanes, value, by);
#else
  return emulator::shuffle(emulator::Shuffle::kUp, value, by, kAllLanes, at);
#endif
}

FASTLORA_DEVICE uint32_t shuffle_down(uint32_t value, int by FASTLORA_AT) {
#ifdef __CUDACC__
  return __shfl_down_sync(kAllLanes, value, by);
#else
  return emulator::shuffle(emulator::Shuffle::kDown, value, by, kAllLanes, at);
#endif
}

FASTLORA_DEVICE uint32_t ballot(bool vote FASTLORA_AT) {
#ifdef __CUDACC__
  return __ballot_sync(kAllLanes, vote);
#else
  return emulator::ballot(vote, kAllLanes, at);
#endif
}

// ---- bits ---------------------------------------------------------------------------------------------------

FASTLORA_DEVICE uint32_t bits_of(float f) {
#ifdef __CUDACC__
  return __float_as_uint(f);
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
#endif
}

FASTLORA_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

FASTLORA_DEVICE uint64_t bits_of(double d) {
#ifdef __CUDACC__
  return static_cast<uint64_t>(__double_as_longlong(d));
#else
  uint64_t bits;
  std::memcpy(&bits, &d, 8);
  return bits;
#endif
}

FASTLORA_DEVICE double double_of(uint64_t bits) {
#ifdef __CUDACC__
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double d;
  std::memcpy(&d, &bits, 8);
  return d;
#endif
}

FASTLORA_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDACC__
  return __byte_perm(a, b, selector);
#else
  return emulator::byte_permute(a, b, selector);
#endif
}

// How many of the bits are set.
FASTLORA_DEVICE int count_bits(uint32_t bits) {
#ifdef __CUDACC__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// ---- float32 and float64, one rounding a step (nothing contracts, whatever the flags) ----------------------

#ifdef __CUDACC__
FASTLORA_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
FASTLORA_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
FASTLORA_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
FASTLORA_DEVICE float square_root(float a) { return __fsqrt_rn(a); }
FASTLORA_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTLORA_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
FASTLORA_DEVICE double divide(double a, double b) { return __ddiv_rn(a, b); }
#else
FASTLORA_DEVICE float multiply(float a, float b) { return a * b; }
FASTLORA_DEVICE float add(float a, float b) { return a + b; }
FASTLORA_DEVICE float divide(float a, float b) { return a / b; }
FASTLORA_DEVICE float square_root(float a) { return std::sqrt(a); }
FASTLORA_DEVICE float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
FASTLORA_DEVICE double add(double a, double b) { return a + b; }
FASTLORA_DEVICE double divide(double a, double b) { return a / b; }
#endif

// ---- 16-bit floats, as bits ---------------------------------------------------------------------------------

FASTLORA_DEVICE float bf16_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

FASTLORA_DEVICE uint16_t float_to_bf16(float f) {
#ifdef __CUDACC__
  return __bfloat16_as_ushort(__float2bfloat16_rn(f));
#else
  return emulator::float_to_bf16(f);
#endif
}

FASTLORA_DEVICE float fp16_to_float(uint16_t h) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(h));
#else
  return emulator::fp16_to_float(h);
#endif
}

FASTLORA_DEVICE uint16_t float_to_fp16(float f) {
#ifdef __CUDACC__
  return __half_as_ushort(__float2half_rn(f));
#else
  return emulator::float_to_fp16(f);
#endif
}

// ---- two 16-bit floats in a word, the first in the low half --------------------------------------------------

template <DType D>
FASTLORA_DEVICE uint32_t pack_pair(float low, float high) {
  static_assert(D != DType::kFloat32);
#ifdef __CUDACC__
  uint32_t pair;
  if constexpr (D == DType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  const auto half = [](float f) { return D == DType::kBFloat16 ? float_to_bf16(f) : float_to_fp16(f); };
  return half(low) | static_cast<uint32_t>(half(high)) << 16;
#endif
}

// a * b + c, each half rounded once.
template <DType D>
FASTLORA_DEVICE uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(D != DType::kFloat32);
#ifdef __CUDACC__
  uint32_t d;
  if constexpr (D == DType::kBFloat16) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
#else
  return emulator::multiply_add_pair(D == DType::kBFloat16, a, b, c);
#endif
}

// The product plus -0, which changes nothing: older devices multiply bfloat16 by this instruction alone.
template <DType D>
FASTLORA_DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
  return multiply_add_pair<D>(a, b, 0x80008000u);
}

// ---- global memory ------------------------------------------------------------------------------------------

template <class T>
FASTLORA_DEVICE T load_global(const T* p FASTLORA_AT) {
#ifndef __CUDACC__
  emulator::touch_global(p, sizeof(T), false, at);
#endif
  return *p;
}

// Of memory that nothing writes during the launch.
template <class T>
FASTLORA_DEVICE T load_readonly(const T* p FASTLORA_AT) {
#ifdef __CUDACC__
  return __ldg(p);
#else
  return load_global(p, at);
#endif
}

FASTLORA_DEVICE Words4 load_readonly(const Words4* p FASTLORA_AT) {
#ifdef __CUDACC__
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
#else
  return load_global(p, at);
#endif
}

// Starts to bring the 128 bytes around `p` into the L2 cache.
FASTLORA_DEVICE void prefetch_global(const void* p FASTLORA_AT) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  emulator::touch_global(p, 1, false, at);
#endif
}

template <class T>
FASTLORA_DEVICE void store_global(T* p, T value FASTLORA_AT) {
#ifndef __CUDACC__
  emulator::touch_global(p, sizeof(T), true, at);
#endif
  *p = value;
}

// ---- shared memory ------------------------------------------------------------------------------------------

// The launch's dynamic shared memory from `offset` on; aligned to 1024 at 0.
template <class T>
FASTLORA_DEVICE T* shared_memory(int offset) {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) uint8_t fastlora_shared[];
  return reinterpret_cast<T*>(fastlora_shared + offset);
#else
  return reinterpret_cast<T*>(static_cast<uint8_t*>(emulator::shared_memory()) + offset);
#endif
}

template <class T>
FASTLORA_DEVICE T load_shared(const T* p FASTLORA_AT) {
#ifndef __CUDACC__
  emulator::touch_shared(p, sizeof(T), false, at);
#endif
  return *p;
}

template <class T>
FASTLORA_DEVICE void store_shared(T* p, T value FASTLORA_AT) {
#ifndef __CUDACC__
  emulator::touch_shared(p, sizeof(T), true, at);
#endif
  *p = value;
}

// ---- launches that overlap ----------------------------------------------------------------------------------

// In a launch that may begin before the one before it has ended (LaunchShape::overlaps): returns once that one has
// ended and its writes are seen; by others of the block too, once they meet this thread in a barrier. What it
// writes may not be touched before, nor what it reads be written; and some thread of every block must call this.
FASTLORA_DEVICE void wait_for_previous_launch(FASTLORA_AT_ONLY) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#else
  emulator::wait_for_previous_launch(at);
#endif
}

// Lets such a next launch begin as soon as every block of this one has come here or ended.
FASTLORA_DEVICE void let_next_launch_begin() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#endif
}

// ---- updates of one value by many ---------------------------------------------------------------------------

FASTLORA_DEVICE void atomic_or(uint32_t* p, uint32_t value FASTLORA_AT) {
#ifdef __CUDACC__
  atomicOr(p, value);
#else
  emulator::touch_atomic(p, 4, at);
  *p |= value;
#endif
}

FASTLORA_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t value FASTLORA_AT) {
#ifdef __CUDACC__
  return atomicAdd(p, value);
#else
  emulator::touch_atomic(p, 4, at);
  const uint32_t before = *p;
  *p += value;
  return before;
#endif
}

}  // namespace fastlora::cuda
