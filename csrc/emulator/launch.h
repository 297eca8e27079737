// Launching a kernel on the emulated device, and what a test may ask of it.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "counters.h"

namespace fastlora::emulator {

// Memory a kernel may touch: exactly these bytes, and a write only where `writable`.
void add_buffer(const void* base, int64_t bytes, bool writable, const std::string& name);
void remove_buffer(const void* base);

// The order in which threads and blocks run. Every fault's report ends with it.
void set_seed(uint64_t seed);

// What kernels are chosen for, and launches are cut to. Few processors at first, so that small tests have blocks
// that walk on and blocks that meet; and splits cost nothing (block_clocks), so that small products are split.
struct Traits {
  int capability = 80, processors = 3;
  int shared_bytes = 0;  // that a block may have; 0: as a device of that capability has
  int block_clocks = 0;
};
void set_traits(Traits traits);
const Traits& traits();

// Counts of every launch since the last call.
std::vector<LineCount> take_counts();

// What was launched, and how.
struct Launched {
  std::string kernel;
  std::array<int, 3> grid;
  int threads;
  int64_t shared_bytes;
  bool cooperative, overlaps;
};
// From now on launches are listed; unless `run`, that is all that happens. Until the list is taken.
void list_launches(bool run);
std::vector<Launched> take_launches();

// Runs body() as every thread of the grid; if it overlaps, as one that may have begun before all launches since
// the last that does not have ended. False after a fault: take_fault() tells, and no launch runs until it has been
// asked, as a CUDA error stays with its context.
bool launch(const char* kernel, const int (&grid)[3], int threads, int64_t shared_bytes, bool cooperative,
            bool overlaps, const std::function<void()>& body);
std::string take_fault();

// `pretty` is the compiler's own name of a function with a template argument kKernel: that argument without
// namespaces, nf4_linear_tile<kBFloat16, 2, kSums>.
std::string kernel_name(const char* pretty);

template <auto kKernel>
const char* name_of() {
  static const std::string name = kernel_name(__PRETTY_FUNCTION__);
  return name.c_str();
}

}  // namespace fastlora::emulator
