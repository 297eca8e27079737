// Launching a kernel on the emulated device, and what a test may ask of it.
#pragma once

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
  int capability = 80, processors = 3, shared_bytes = 227 << 10, block_clocks = 0;
};
void set_traits(const Traits& traits);
const Traits& traits();

// Counts of every launch since the last call.
std::vector<LineCount> take_counts();

// Runs body() as every thread of the grid; if it overlaps, as one that may have begun before all launches since
// the last that does not have ended. False after a fault: take_fault() tells, and no launch runs until it has been
// asked, as a CUDA error stays with its context.
bool launch(const char* kernel, const int (&grid)[3], int threads, int64_t shared_bytes, bool cooperative,
            bool overlaps, const std::function<void()>& body);
std::string take_fault();

}  // namespace fastlora::emulator
