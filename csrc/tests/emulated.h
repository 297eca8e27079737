// A buffer that emulated kernels may touch while this lives.
#pragma once

#include <cstddef>

#include "emulator/launch.h"

namespace fastlora::testing {

class EmulatedBuffer {
 public:
  EmulatedBuffer(const void* base, size_t bytes, bool writable, const char* name) : base_(base) {
    emulator::add_buffer(base, static_cast<int64_t>(bytes), writable, name);
  }
  ~EmulatedBuffer() { emulator::remove_buffer(base_); }
  EmulatedBuffer(const EmulatedBuffer&) = delete;
  EmulatedBuffer& operator=(const EmulatedBuffer&) = delete;

 private:
  const void* base_;
};

void test_emulator();  // the next three as well
void test_emulator_bugs();
void test_overlaps();
void test_warpgroup();
void test_cuda_kernels();
void test_cuda_adamw();
void test_cuda_linear();
void test_cuda_segmented();
void test_cuda_slab();
void test_cuda_wide();

}  // namespace fastlora::testing
