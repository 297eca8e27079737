// Tensors that emulated kernels may touch, each of exactly its size.
#pragma once

#include <cstring>
#include <vector>

#include "fastlora/nf4.h"
#include "tests/buffer.h"
#include "tests/emulated.h"

namespace fastlora::testing {

struct EmulatedTensor {
  Tensor tensor;
  EmulatedBuffer registered;
  EmulatedTensor(Place place, int64_t count, DType dtype, bool writable, const char* name)
      : tensor(place, count, dtype), registered(tensor.buffer.bytes(), tensor.buffer.size(), writable, name) {}
  void* data() { return tensor.buffer.bytes(); }
  double at(int64_t i) const { return static_cast<double>(tensor[i]); }
  // Of a 16-bit element.
  uint16_t bits(int64_t i) const {
    uint16_t half;
    std::memcpy(&half, tensor.buffer.bytes() + 2 * i, 2);
    return half;
  }
};

struct EmulatedWeight {
  Weight weight;
  EmulatedBuffer packed, scales, nested, map;
  EmulatedWeight(Place place, Rng& rng, int64_t n, int64_t k, int64_t blocksize, bool with_nested)
      : weight(place, rng, n, k, blocksize, with_nested, 4),
        packed(weight.packed.bytes(), weight.packed.size(), false, "packed"),
        scales(weight.scales.bytes(), weight.scales.size(), false, "scales"),
        nested(weight.nested.bytes(), weight.nested.size(), false, "nested"),
        map(nf4_dynamic_map(), 1024, false, "map") {}
};

// Bytes at a multiple of 16, as kernels are promised their scratch.
class EmulatedScratch {
 public:
  explicit EmulatedScratch(int64_t bytes)
      : room_(static_cast<size_t>(bytes) + 16, 0xcd),
        registered_(data(), static_cast<size_t>(bytes), true, "scratch") {}
  uint8_t* data() const {
    const auto address = reinterpret_cast<uintptr_t>(room_.data());
    return reinterpret_cast<uint8_t*>((address + 15) / 16 * 16);
  }

 private:
  std::vector<uint8_t> room_;
  EmulatedBuffer registered_;
};

static inline uint16_t half_of(DType dtype, float value) {
  return dtype == DType::kBFloat16 ? cpu::float_to_bf16(value) : cpu::float_to_fp16(value);
}

static inline bool succeeded(const char* what, Status status) {
  return check(status == Status::kOk, "%s: status %d: %s", what, static_cast<int>(status),
               emulator::take_fault().c_str());
}

static inline void refuses(const char* what, Status status) {
  check(status == Status::kBadArgument, "%s: status %d", what, static_cast<int>(status));
}

// The first few differences of a 16-bit matrix of `width` columns from what `want(row, column)` says.
template <class Want>
void compare_bits(const char* name, const EmulatedTensor& got, int64_t width, Want want) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < got.tensor.count; ++i) {
    const uint16_t wanted = want(i / width, i % width);
    if (got.bits(i) == wanted || ++wrong > 3) continue;
    check(false, "%s[%lld, %lld] has the bits %04x, expected %04x", name, static_cast<long long>(i / width),
          static_cast<long long>(i % width), got.bits(i), wanted);
  }
  check(wrong == 0, "%s: %lld of %lld elements differ", name, static_cast<long long>(wrong),
        static_cast<long long>(got.tensor.count));
}

// Of the launches since the counts were last taken: every line that moves vectors of 16 bytes moves whole sectors;
// there are at least so many of them.
static inline void check_whole_sectors(int at_least) {
  int lines = 0;
  for (const emulator::LineCount& line : emulator::take_counts()) {
    const bool global =
        line.access == emulator::Access::kGlobalLoad || line.access == emulator::Access::kGlobalStore;
    if (!global || line.bytes < 16 * 32 * line.instructions) continue;
    ++lines;
    check(line.cost == line.least, "%s:%d: %lld sectors where %lld would do", line.file.c_str(), line.line,
          static_cast<long long>(line.cost), static_cast<long long>(line.least));
  }
  check(lines >= at_least, "%d lines move vectors", lines);
}

}  // namespace fastlora::testing
