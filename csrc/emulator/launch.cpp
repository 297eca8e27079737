#include "launch.h"

#include <utility>

#include "machine.h"

namespace fastlora::emulator {
namespace {

// Limits that hold on every architecture the kernels are built for.
constexpr int kMaxThreads = 1024;
constexpr int64_t kMaxSharedBytes = 227 << 10;

struct Device {
  GlobalMemory global;
  Counters counters;
  StackPool stacks;
  uint64_t seed = 1;
  Traits traits;
  std::string fault;
};

Device& device() {
  static Device instance;
  return instance;
}

}  // namespace

void add_buffer(const void* base, int64_t bytes, bool writable, const std::string& name) {
  device().global.add(base, bytes, writable, name);
}
void remove_buffer(const void* base) { device().global.remove(base); }
void set_seed(uint64_t seed) { device().seed = seed; }
void set_traits(const Traits& traits) { device().traits = traits; }
const Traits& traits() { return device().traits; }

std::vector<LineCount> take_counts() {
  std::vector<LineCount> lines = device().counters.lines();
  device().counters = {};
  return lines;
}

std::string take_fault() { return std::exchange(device().fault, {}); }

bool launch(const char* kernel, const int (&grid)[3], int threads, int64_t shared_bytes, bool cooperative,
            bool overlaps, const std::function<void()>& body) {
  Device& d = device();
  if (!d.fault.empty()) return false;
  try {
    if (threads < 1 || threads > kMaxThreads || shared_bytes < 0 || shared_bytes > kMaxSharedBytes ||
        grid[0] < 1 || grid[1] < 1 || grid[2] < 1 || grid[1] > 65535 || grid[2] > 65535) {
      throw Fault{std::string("kernel ") + kernel + ": no device launches " + std::to_string(threads) +
                  " threads with " + std::to_string(shared_bytes) + " bytes of shared memory on a grid of " +
                  std::to_string(grid[0]) + " x " + std::to_string(grid[1]) + " x " + std::to_string(grid[2])};
    }
    Grid(Shape{kernel, {grid[0], grid[1], grid[2]}, threads, shared_bytes, cooperative, overlaps}, d.global,
         d.counters, d.stacks, d.seed, body)
        .run();
  } catch (const Fault& f) {
    d.fault = f.message + " (seed " + std::to_string(d.seed) + ")";
    return false;
  }
  return true;
}

}  // namespace fastlora::emulator
