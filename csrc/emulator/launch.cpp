#include "launch.h"

#include <cctype>
#include <utility>

#include "machine.h"

namespace fastlora::emulator {
namespace {

constexpr int kMaxThreads = 1024;

int shared_limit(int capability) {
  switch (capability) {
    case 80: return 163 << 10;
    case 86:
    case 89:
    case 120: return 99 << 10;
    default: return 227 << 10;
  }
}

struct Device {
  GlobalMemory global;
  Counters counters;
  StackPool stacks;
  uint64_t seed = 1;
  Traits traits;
  std::string fault;
  bool lists = false, runs = true;
  std::vector<Launched> launches;
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
void set_traits(Traits traits) {
  if (traits.shared_bytes == 0) traits.shared_bytes = shared_limit(traits.capability);
  device().traits = traits;
}
const Traits& traits() {
  if (device().traits.shared_bytes == 0) set_traits(device().traits);
  return device().traits;
}

void list_launches(bool run) {
  device().lists = true;
  device().runs = run;
}

std::vector<Launched> take_launches() {
  device().lists = false;
  device().runs = true;
  return std::exchange(device().launches, {});
}

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
  if (d.lists) {
    d.launches.push_back({kernel, {grid[0], grid[1], grid[2]}, threads, shared_bytes, cooperative, overlaps});
  }
  if (!d.runs) return true;
  try {
    if (threads < 1 || threads > kMaxThreads || shared_bytes < 0 || shared_bytes > traits().shared_bytes ||
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

std::string kernel_name(const char* pretty) {
  std::string name = pretty;
  name = name.substr(name.find("kKernel = ") + 10);
  name.resize(name.rfind(']'));
  if (name[0] == '&') name.erase(0, 1);
  // A namespace is a word, or a bracketed one: <unnamed>, {anonymous}, (anonymous namespace).
  for (size_t end; (end = name.find("::")) != std::string::npos;) {
    const size_t bracket = std::string(">})").find(name[end - 1]);
    size_t begin = bracket == std::string::npos ? end : name.rfind("<{("[bracket], end);
    while (bracket == std::string::npos && begin > 0 && (std::isalnum(name[begin - 1]) || name[begin - 1] == '_'))
      --begin;
    name.erase(begin, end + 2 - begin);
  }
  return name;
}

}  // namespace fastlora::emulator
