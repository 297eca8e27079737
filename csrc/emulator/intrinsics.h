// The host bodies of what cuda/device.cuh wraps. Layouts of fragments and matrices are those of the PTX ISA
// (sections ldmatrix, mma.m16n8k16); csrc/tests/emulator_tests.cpp derives them again another way.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "fault.h"

namespace fastlora::emulator {

int thread_index();
int thread_count();
int block_index(int axis);
int block_count(int axis);

void* shared_memory();

void sync_threads(Where at);
void sync_named(int barrier, int threads, Where at);
void sync_warp(uint32_t lanes, Where at);
void sync_grid(Where at);

// One 32-bit value a lane; `source` is the lane whose value this lane takes (its own where out of range).
enum class Shuffle { kIndex, kXor, kUp, kDown };
uint32_t shuffle(Shuffle kind, uint32_t value, int operand, uint32_t lanes, Where at);
uint32_t ballot(bool vote, uint32_t lanes, Where at);

// Checks and counts an access of `bytes` (1, 2, 4, 8 or 16, aligned to themselves) before it is made.
void touch_global(const void* p, int bytes, bool write, Where at);
void touch_shared(const void* p, int bytes, bool write, Where at);

// cp.async: `bytes` (4, 8, 16) to shared memory, those past `valid` zero; it lands at a wait.
void copy_async(void* to, const void* from, int bytes, int valid, Where at);
void copy_async_commit(Where at);
// All but the newest `pending` groups of this thread have landed.
void copy_async_wait(int pending, Where at);

// ldmatrix: `count` (1, 2, 4) 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i
// / 8.
void load_matrix(uint32_t* out, int count, bool transposed, const void* row, Where at);

// mma.sync m16n8k16, float32 accumulation: d += a·b. a 16x16 row-major, b 16x8 column-major.
enum class Half { kBFloat16, kFloat16 };
void multiply_tile(Half kind, float* d, const uint32_t* a, const uint32_t* b, Where at);

// mbarrier in shared memory, its phase's parity waited on.
void memory_barrier_init(uint64_t* barrier, int count, Where at);
void memory_barrier_arrive(uint64_t* barrier, Where at);
void memory_barrier_wait(uint64_t* barrier, int parity, Where at);

// wgmma of four warps (warpgroup.cuh): d (64 x columns) += a·b, which comes to d when a wait covers its group.
// Until then d holds NaNs, and b's bytes may not be written.
void multiply_warpgroup(Half kind, int columns, float* d, const uint32_t* a, const void* b, int step, Where at);
void fence_warpgroup(Where at);
void commit_warpgroup(Where at);
void wait_warpgroup(int pending, Where at);
void fence_async_proxy(Where at);
// setmaxnreg: all of a warpgroup call it.
void set_registers(Where at);

// griddepcontrol.wait: what the launches before have written may be touched from here on, also by threads that
// meet this one in a barrier later.
void wait_for_previous_launch(Where at);

// Marks an atomic update; the caller then makes it (one thread runs at a time).
void touch_atomic(const void* p, int bytes, Where at);

// Conversions of the device, to nearest even.
inline float bf16_to_float(uint16_t h) { return std::bit_cast<float>(static_cast<uint32_t>(h) << 16); }
uint16_t float_to_bf16(float f);
float fp16_to_float(uint16_t h);
uint16_t float_to_fp16(float f);
// Two 16-bit floats in each word: a * b + c, rounded once a half.
uint32_t multiply_add_pair(bool bf16, uint32_t a, uint32_t b, uint32_t c);
// prmt: four bytes picked out of b:a by the nibbles of `selector` (bit 3 of a nibble repeats the sign).
uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector);

}  // namespace fastlora::emulator
