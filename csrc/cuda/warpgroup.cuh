// The tensor cores of compute capability 9.0a, which four warps feed together and which work while those go on:
// the third part of device.cuh. A warpgroup is 128 threads from a multiple of 128 on. What it does for one sum:
//
//   d and a are set by ordinary code; keep_registers(d); keep_registers(a);
//   fence_warpgroup();                              // from here on d and a belong to the products
//   multiply_warpgroup<...>(d, a, b, step); ...     // issued, not done
//   commit_warpgroup();
//   ...                                             // other work: not with d, not with a
//   wait_warpgroup<0>(); keep_registers(d);         // d belongs to ordinary code again
//
// A fence stands between the code that sets d or a and the product that takes them, once for as many products as
// follow. Products into the same d, of one kColumns, are ordered among themselves.
#pragma once

#include "tensor_core.cuh"

namespace fastlora::cuda {

// Products that read shared memory do so past what orders ordinary writes to it: whoever wrote, or waited for its
// copies, calls this before the barrier that lets others multiply.
FASTLORA_DEVICE void fence_async_proxy(FASTLORA_AT_ONLY) {
#ifndef __CUDACC__
  emulator::fence_async_proxy(at);
#elif __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Values that pass here are neither computed later nor used earlier, as far as the compiler is concerned.
template <int kCount>
FASTLORA_DEVICE void keep_registers([[maybe_unused]] float (&values)[kCount]) {
#ifdef __CUDACC__
  FASTLORA_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
#endif
}

template <int kCount>
FASTLORA_DEVICE void keep_registers([[maybe_unused]] uint32_t (&values)[kCount]) {
#ifdef __CUDACC__
  FASTLORA_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
#endif
}

// An instruction of 9.0a alone; a kernel that holds it may be compiled for others, and is not launched there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTLORA_90A(emulated, ...) asm volatile(__VA_ARGS__)
#elif defined(__CUDACC__)
#define FASTLORA_90A(emulated, ...) __trap()
#else
#define FASTLORA_90A(emulated, ...) emulated
#endif

FASTLORA_DEVICE void fence_warpgroup(FASTLORA_AT_ONLY) {
  FASTLORA_90A(emulator::fence_warpgroup(at), "wgmma.fence.sync.aligned;" :: : "memory");
}

// The products issued since the last commit are one group.
FASTLORA_DEVICE void commit_warpgroup(FASTLORA_AT_ONLY) {
  FASTLORA_90A(emulator::commit_warpgroup(at), "wgmma.commit_group.sync.aligned;" :: : "memory");
}

// All groups of products but the newest kPending are done; a barrier tells others that their B may be written.
template <int kPending>
FASTLORA_DEVICE void wait_warpgroup(FASTLORA_AT_ONLY) {
  FASTLORA_90A(emulator::wait_warpgroup(kPending, at),
               "wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// How many registers each thread of this warpgroup has from here on. The kernel's launch bounds must have both
// numbers, by which the compiler knows how many there are at first.
template <int kRegisters>
FASTLORA_DEVICE void raise_registers(FASTLORA_AT_ONLY) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  FASTLORA_90A(emulator::set_registers(at), "setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
FASTLORA_DEVICE void lower_registers(FASTLORA_AT_ONLY) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  FASTLORA_90A(emulator::set_registers(at), "setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// What the products take for B, by its fields of 16 bytes each: where it starts (bits 0-13), how far it is from 8
// of its rows to the next 8 (bits 32-45), and the swizzle over 128 bytes (1 in bits 62-63). The pattern of the
// swizzle starts at a multiple of 1024, so that its base offset (bits 49-51) is 0; the leading offset is not used.
FASTLORA_DEVICE uint64_t tile_descriptor(const void* b, int step) {
  const uint32_t start = shared_address(b) + 32u * static_cast<uint32_t>(step);
  return (start & 0x3ffffu) >> 4 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The instruction's text and its operands: d in 4 to 128 registers, then a, then the descriptor.
#define FASTLORA_TEN(t) \
  ", %" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define FASTLORA_TEXT_4 "%0, %1, %2, %3"
#define FASTLORA_TEXT_8 FASTLORA_TEXT_4 ", %4, %5, %6, %7"
#define FASTLORA_TEXT_16 FASTLORA_TEXT_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTLORA_TEXT_32 FASTLORA_TEXT_16 ", %16, %17, %18, %19" FASTLORA_TEN(2) ", %30, %31"
#define FASTLORA_TEXT_64                                                      \
  FASTLORA_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39" FASTLORA_TEN(4) \
      FASTLORA_TEN(5) ", %60, %61, %62, %63"
#define FASTLORA_TEXT_128                                                                           \
  FASTLORA_TEXT_64 ", %64, %65, %66, %67, %68, %69" FASTLORA_TEN(7) FASTLORA_TEN(8) FASTLORA_TEN(9) \
      FASTLORA_TEN(10) FASTLORA_TEN(11) ", %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTLORA_D_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FASTLORA_D_8(i) FASTLORA_D_4(i), FASTLORA_D_4(i + 4)
#define FASTLORA_D_16(i) FASTLORA_D_8(i), FASTLORA_D_8(i + 8)
#define FASTLORA_D_32(i) FASTLORA_D_16(i), FASTLORA_D_16(i + 16)
#define FASTLORA_D_64(i) FASTLORA_D_32(i), FASTLORA_D_32(i + 32)
#define FASTLORA_D_128(i) FASTLORA_D_64(i), FASTLORA_D_64(i + 64)

// Of 2 * half columns; a0 to b number the operands after d. Added to d, nothing negated, B not transposed.
#define FASTLORA_MULTIPLY(columns, half, type, a0, a1, a2, a3, b)                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" FASTLORA_TEXT_##half \
               "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", 1, 1, 1, 0;"                             \
               : FASTLORA_D_##half(0)                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor))
#define FASTLORA_MULTIPLY_ALL(type)                             \
  if constexpr (kColumns == 8) {                                \
    FASTLORA_MULTIPLY(8, 4, type, 4, 5, 6, 7, 8);               \
  } else if constexpr (kColumns == 16) {                        \
    FASTLORA_MULTIPLY(16, 8, type, 8, 9, 10, 11, 12);           \
  } else if constexpr (kColumns == 32) {                        \
    FASTLORA_MULTIPLY(32, 16, type, 16, 17, 18, 19, 20);        \
  } else if constexpr (kColumns == 64) {                        \
    FASTLORA_MULTIPLY(64, 32, type, 32, 33, 34, 35, 36);        \
  } else if constexpr (kColumns == 128) {                       \
    FASTLORA_MULTIPLY(128, 64, type, 64, 65, 66, 67, 68);       \
  } else {                                                      \
    FASTLORA_MULTIPLY(256, 128, type, 128, 129, 130, 131, 132); \
  }

#endif

// d (64 x kColumns float32) += a (64x16) · B (16 x kColumns). Of d and a a warp has 16 rows, laid out over its
// lanes as multiply_tile has them; d[4 * j] and the next three are columns 8 * j and the next seven. Column i of B
// is the 16 values from 16 * step on of the 64 that lie in shared memory at b + 128 * i, the 16-byte chunk c of
// them in place c ^ (i % 8); b is a multiple of 1024. The same b and step in all threads.
template <DType D, int kColumns>
FASTLORA_DEVICE void multiply_warpgroup(float (&d)[kColumns / 2], const uint32_t (&a)[4], const void* b,
                                        int step FASTLORA_AT) {
  static_assert(D != DType::kFloat32);
  static_assert(kColumns == 8 || kColumns == 16 || kColumns == 32 || kColumns == 64 || kColumns == 128 ||
                kColumns == 256);
#if !defined(__CUDACC__)
  emulator::multiply_warpgroup(D == DType::kBFloat16 ? emulator::Half::kBFloat16 : emulator::Half::kFloat16,
                               kColumns, d, a, b, step, at);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint64_t descriptor = tile_descriptor(b, step);
  if constexpr (D == DType::kBFloat16) {
    FASTLORA_MULTIPLY_ALL("bf16")
  } else {
    FASTLORA_MULTIPLY_ALL("f16")
  }
#else
  __trap();
#endif
}

}  // namespace fastlora::cuda
