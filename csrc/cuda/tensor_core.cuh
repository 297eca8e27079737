// The instructions that feed tensor cores: asynchronous copies into shared memory, ldmatrix, mma, mbarrier. The
// second half of device.cuh, with the same two bodies each.
#pragma once

#include "device.cuh"

namespace fastlora::cuda {

#ifdef __CUDACC__
FASTLORA_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// cp.async of kBytes (4, 8, 16); those past `valid` become zero. Lands at a wait.
template <int kBytes>
FASTLORA_DEVICE void copy_async(void* to, const void* from, int valid FASTLORA_AT) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef __CUDACC__
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                 "r"(valid)
                 : "memory");
  }
#else
  emulator::copy_async(to, from, kBytes, valid, at);
#endif
}

FASTLORA_DEVICE void copy_async_commit(FASTLORA_AT_ONLY) {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::copy_async_commit(at);
#endif
}

// All of this thread's groups but the newest kPending have landed; a barrier shows them to others.
template <int kPending>
FASTLORA_DEVICE void copy_async_wait(FASTLORA_AT_ONLY) {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulator::copy_async_wait(kPending, at);
#endif
}

// kMatrices (1, 2, 4) 8x8 matrices of 16-bit elements. Lane i names row i % 8 of matrix i / 8; it gets elements
// (i / 4, i % 4 * 2) and the next of each matrix, of its transpose with kTransposed.
template <int kMatrices, bool kTransposed>
FASTLORA_DEVICE void load_matrix(uint32_t (&out)[kMatrices], const void* row FASTLORA_AT) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
#ifdef __CUDACC__
  const uint32_t p = shared_address(row);
  if constexpr (kMatrices == 4 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(p)
                 : "memory");
  } else if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(p)
                 : "memory");
  } else if constexpr (kMatrices == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(p)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(p)
                 : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(p) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(p) : "memory");
  }
#else
  emulator::load_matrix(out, kMatrices, kTransposed, row, at);
#endif
}

// d (16x8 float32) = c + a (16x16) · b (16x8). With g = lane / 4 and t = lane % 4 * 2: a[0] holds row g, columns t
// and t + 1; a[1] row g + 8; a[2] and a[3] the same rows 8 columns on. b[0] holds rows t, t + 1 of column g, b[1]
// those 8 rows on. d[0], d[1] are row g, columns t, t + 1; d[2], d[3] row g + 8.
template <DType D>
FASTLORA_DEVICE void multiply_tile(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                   const float (&c)[4] FASTLORA_AT) {
  static_assert(D != DType::kFloat32);
#ifdef __CUDACC__
  if constexpr (D == DType::kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
          "f"(c[3]));
  }
#else
  float sum[4] = {c[0], c[1], c[2], c[3]};
  emulator::multiply_tile(D == DType::kBFloat16 ? emulator::Half::kBFloat16 : emulator::Half::kFloat16, sum, a, b,
                          at);
  for (int i = 0; i < 4; ++i) d[i] = sum[i];
#endif
}

// d += a · b
template <DType D>
FASTLORA_DEVICE void multiply_tile(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FASTLORA_AT) {
  multiply_tile<D>(d, a, b, d FASTLORA_HERE);
}

// mbarrier: `count` arrivals end a phase; phases alternate parity from 0.
FASTLORA_DEVICE void memory_barrier_init(uint64_t* barrier, int count FASTLORA_AT) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#else
  emulator::memory_barrier_init(barrier, count, at);
#endif
}

FASTLORA_DEVICE void memory_barrier_arrive(uint64_t* barrier FASTLORA_AT) {
#ifdef __CUDACC__
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(barrier))
               : "memory");
#else
  emulator::memory_barrier_arrive(barrier, at);
#endif
}

// Returns once the phase of `parity` has ended.
FASTLORA_DEVICE void memory_barrier_wait(uint64_t* barrier, int parity FASTLORA_AT) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
#define FASTLORA_TRY "try_wait"  // which sleeps for a while
#else
#define FASTLORA_TRY "test_wait"
#endif
  asm volatile("{\n .reg .pred done;\n again:\n mbarrier." FASTLORA_TRY
               ".parity.shared.b64 done, [%0], %1;\n @!done bra again;\n}" ::"r"(shared_address(barrier)),
               "r"(parity)
               : "memory");
#undef FASTLORA_TRY
#else
  emulator::memory_barrier_wait(barrier, parity, at);
#endif
}

}  // namespace fastlora::cuda
