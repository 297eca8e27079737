// A test program without a framework: named checks, one line per failure, and the running case named when a
// kernel crashes.
#pragma once

#include <cstdint>

namespace fastlora::testing {

// Starts a case. Everything reported until the next call, a fault included, carries this label.
__attribute__((format(printf, 1, 2))) void set_case(const char* format, ...);

// Counts one check; prints the case and the message when it does not hold. Safe from several threads.
__attribute__((format(printf, 2, 3))) bool check(bool holds, const char* format, ...);

// Names the case in progress when a guard page is hit or an illegal instruction is met.
void install_fault_report();

// Prints the totals; the exit code.
int finish();

// A program's groups of checks: all of them, or those that its arguments name. The exit code.
struct Group {
  const char* name;
  void (*run)();
};
int run_groups(int argc, char** argv, const Group* groups, int count);

// xorshift128+ (Vigna, 2014), so that a failure reproduces on every machine.
class Rng {
 public:
  explicit Rng(uint64_t seed) : a_(seed * 0x9E3779B97F4A7C15u + 1), b_(seed ^ 0xBF58476D1CE4E5B9u) {
    for (int i = 0; i < 8; ++i) next();
  }
  uint64_t next() {
    uint64_t x = a_;
    const uint64_t y = b_;
    a_ = y;
    x ^= x << 23;
    b_ = x ^ y ^ (x >> 17) ^ (y >> 26);
    return b_ + y;
  }
  int64_t below(int64_t limit) { return static_cast<int64_t>(next() % static_cast<uint64_t>(limit)); }
  bool coin() { return (next() & 1024u) != 0; }
  // about normal: the sum of four uniforms
  float normal() {
    double sum = 0.0;
    for (int i = 0; i < 4; ++i) sum += static_cast<double>(next() >> 11) * 0x1p-53;
    return static_cast<float>((sum - 2.0) * 1.7320508);
  }
  template <class T, int kCount>
  T pick(const T (&choices)[kCount]) {
    return choices[below(kCount)];
  }

 private:
  uint64_t a_, b_;
};

}  // namespace fastlora::testing
