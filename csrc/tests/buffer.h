// One exactly-sized block of memory per tensor, placed so that a kernel that strays by one byte is noticed.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/numeric.h"
#include "tests/testing.h"

namespace fastlora::testing {

// AddressSanitizer sees the ends of a heap block, but not through masked-load and tile intrinsics; a guard page
// stops those too, on one side of the buffer at a time.
enum class Place {
  kHeap,         // its own heap block
  kOddHeap,      // and at the worst alignment that the contract allows
  kBeforeGuard,  // its last byte is the last of a page; the next page cannot be touched
  kAfterGuard,   // its first byte is the first of a page; the page before cannot be touched
};
inline constexpr Place kPlaces[] = {Place::kHeap, Place::kOddHeap, Place::kBeforeGuard, Place::kAfterGuard};

static inline const char* place_name(Place place) {
  switch (place) {
    case Place::kHeap: return "heap";
    case Place::kOddHeap: return "odd-heap";
    case Place::kBeforeGuard: return "before-guard";
    case Place::kAfterGuard: return "after-guard";
  }
  return "?";
}

class Buffer {
 public:
  // `alignment` is what the contract promises to kernels: the element's size, 1 for packed, scales and nested.
  Buffer(Place place, int64_t bytes, int64_t alignment) : bytes_(static_cast<size_t>(bytes)) {
    if (place == Place::kHeap || place == Place::kOddHeap) {
      const size_t offset = place == Place::kOddHeap ? static_cast<size_t>(alignment) : 0;
      allocation_ = malloc(bytes_ + offset);
      if (allocation_ == nullptr) abort();
      data_ = static_cast<uint8_t*>(allocation_) + offset;
    } else {
      const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      const size_t inner = (bytes_ + page - 1) / page * page;
      mapped_ = inner + 2 * page;
      allocation_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (allocation_ == MAP_FAILED) abort();
      auto* first = static_cast<uint8_t*>(allocation_) + page;
      if (mprotect(first - page, page, PROT_NONE) != 0 || mprotect(first + inner, page, PROT_NONE) != 0) abort();
      data_ = place == Place::kBeforeGuard ? first + inner - bytes_ : first;
      slack_ = place == Place::kBeforeGuard ? first : first + bytes_;
      slack_bytes_ = inner - bytes_;
      if (slack_bytes_ > 0) memset(slack_, kCanary, slack_bytes_);
    }
    fill_bytes(0xff);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    bool intact = true;
    for (size_t i = 0; i < slack_bytes_; ++i) intact = intact && slack_[i] == kCanary;
    check(intact, "a byte beside a buffer of %zu was written", bytes_);
    if (mapped_ > 0) {
      munmap(allocation_, mapped_);
    } else {
      free(allocation_);
    }
  }

  uint8_t* bytes() { return data_; }
  const uint8_t* bytes() const { return data_; }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }
  size_t size() const { return bytes_; }
  // 0xff is NaN in every dtype: an output element that a kernel forgets cannot pass.
  void fill_bytes(int value) {
    if (bytes_ > 0) memset(data_, value, bytes_);
  }
  bool equals(const Buffer& other) const {
    return bytes_ == other.bytes_ && (bytes_ == 0 || memcmp(data_, other.data_, bytes_) == 0);
  }

 private:
  static constexpr int kCanary = 0xa5;
  size_t bytes_, mapped_ = 0, slack_bytes_ = 0;
  void* allocation_ = nullptr;
  uint8_t *data_ = nullptr, *slack_ = nullptr;
};

// A tensor of `count` elements in a Buffer, and the values it holds as float32.
struct Tensor {
  Buffer buffer;
  DType dtype;
  int64_t count;

  Tensor(Place place, int64_t elements, DType type)
      : buffer(place, elements * cpu::dtype_bytes(type), cpu::dtype_bytes(type)), dtype(type), count(elements) {}
  void fill_normal(Rng& rng, float scale) {
    for (int64_t i = 0; i < count; ++i) set(i, rng.normal() * scale);
  }
  void set(int64_t i, float value) { cpu::store_from_float(buffer.bytes(), i, dtype, value); }
  float operator[](int64_t i) const { return cpu::load_as_float(buffer.bytes(), i, dtype); }
};

// NF4 storage of random codes and scales (not a quantised tensor: every code is as likely as any other).
struct Weight {
  int64_t n, k, blocksize, blocks;
  Buffer packed, scales, nested;
  bool double_quantised;
  int64_t groups = 0;
  std::unique_ptr<Buffer> offsets;

  // `scale_alignment`: CUDA kernels are promised 4.
  Weight(Place place, Rng& rng, int64_t rows, int64_t cols, int64_t block, bool with_nested,
         int64_t scale_alignment = 1)
      : n(rows),
        k(cols),
        blocksize(block),
        blocks(cpu::ceil_div(rows * cols, block)),
        packed(place, rows * cpu::ceil_div(cols, 2), 1),
        scales(place, with_nested ? blocks : 4 * blocks, scale_alignment),
        nested(place, with_nested ? 4 * (1 + cpu::ceil_div(blocks, kNestedBlocksize)) : 0, scale_alignment),
        double_quantised(with_nested) {
    const int64_t row_bytes = cpu::ceil_div(k, 2);
    for (int64_t i = 0; i < n * row_bytes; ++i) {
      auto byte = static_cast<uint8_t>(rng.next() >> 32);
      if (k % 2 == 1 && i % row_bytes == row_bytes - 1) byte = static_cast<uint8_t>((byte & 0xf0) | 7);
      packed.bytes()[i] = byte;
    }
    auto put = [](Buffer& to, int64_t index, float value) { memcpy(to.bytes() + 4 * index, &value, 4); };
    for (int64_t b = 0; b < blocks; ++b) {
      if (with_nested) {
        scales.bytes()[b] = static_cast<uint8_t>(rng.next() >> 32);
      } else {
        put(scales, b, b % 11 == 5 ? 0.0f : 0.02f + 0.01f * static_cast<float>(rng.below(16)));
      }
    }
    if (!with_nested) return;
    put(nested, 0, 0.125f);
    for (int64_t g = 0; g < cpu::ceil_div(blocks, kNestedBlocksize); ++g) put(nested, 1 + g, 0.0625f);
  }

  // With as many groups as the shape's smallest divisor allows, up to 64 columns each.
  void add_offsets(Place place, Rng& rng) {
    if (k == 0) return;
    int64_t group = k;
    for (const int64_t size : {7, 3, 16, 32, 64}) group = k % size == 0 ? size : group;
    groups = k / group;
    offsets = std::make_unique<Buffer>(place, 4 * n * groups, 4);
    for (int64_t i = 0; i < n * groups; ++i) offset(i) = 0.02f * (static_cast<float>(rng.below(16)) - 8.0f);
  }
  float& offset(int64_t i) const { return reinterpret_cast<float*>(offsets->bytes())[i]; }

  Nf4Weight view() const {
    return {.packed = packed.bytes(),
            .scales = {.codes = scales.bytes(), .nested = double_quantised ? nested.bytes() : nullptr},
            .n = n,
            .k = k,
            .blocksize = blocksize,
            .offsets = groups > 0 ? &offset(0) : nullptr,
            .groups = groups};
  }

  // (n, k): code * absmax + offset, each rounded to float32, as the format has it
  std::vector<float> dense() const { return values(false); }
  // What is multiplied: |code * absmax| + |offset|
  std::vector<float> magnitudes() const { return values(true); }

  std::vector<float> values(bool magnitude) const {
    std::vector<float> out(static_cast<size_t>(n * k));
    const float* map = nf4_dynamic_map();
    for (int64_t i = 0; i < n * k; ++i) {
      const int64_t column = i % k;
      const uint8_t byte = packed.bytes()[(i / k) * cpu::ceil_div(k, 2) + column / 2];
      const float absmax = cpu::block_absmax(view().scales, map, i / blocksize);
      const float value = kNf4Codes[column % 2 == 0 ? byte >> 4 : byte & 15] * absmax;
      const float added = groups == 0 ? 0.0f : offset(i / k * groups + column / (k / groups));
      out[static_cast<size_t>(i)] = magnitude ? std::fabs(value) + std::fabs(added) : value + added;
    }
    return out;
  }
};

static inline const char* dtype_name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}
inline constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

}  // namespace fastlora::testing
