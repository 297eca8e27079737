// Running a small kernel that a test of the emulator has written, and judging what it reports.
#pragma once

#include <string>

#include "cuda/launch.cuh"
#include "tests/emulated.h"
#include "tests/testing.h"

namespace fastlora::testing {

struct Job {
  void* in;
  void* out;
  int value;
};

// Runs one block under several orders; the fault, or nothing.
inline std::string run(void (*kernel)(Job), const Job& job, int threads, int shared_bytes, int blocks = 1) {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    emulator::set_seed(seed);
    cuda::launch("planted", kernel,
                 {.blocks = blocks, .threads = threads, .shared_bytes = shared_bytes, .cooperative = blocks > 1},
                 job, nullptr);
    std::string fault = emulator::take_fault();
    if (!fault.empty()) return fault;
  }
  return {};
}

inline void expect_clean(const char* name, const std::string& fault) {
  set_case("%s", name);
  check(fault.empty(), "expected no fault, got: %s", fault.c_str());
}

// The report must say what was wrong, and where: the caller's file, the kernel, a block and a thread.
inline void expect_fault(const char* name, const std::string& fault, const char* what,
                         const char* file = __builtin_FILE()) {
  set_case("%s", name);
  const std::string place = std::string(file).substr(std::string(file).rfind('/') + 1) + ":";
  for (const char* part : {what, place.c_str(), "kernel planted", "block (", "thread ", "seed "}) {
    check(fault.find(part) != std::string::npos, "expected \"%s\", got: %s", part,
          fault.empty() ? "no fault" : fault.c_str());
  }
}

}  // namespace fastlora::testing
