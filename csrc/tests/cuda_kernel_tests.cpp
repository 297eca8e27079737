// The CUDA kernels under the emulator against the CPU's, bit for bit, with every buffer of exactly its size.
#include <cstring>
#include <memory>
#include <vector>

#include "emulator/launch.h"
#include "fastlora/cpu.h"
#include "fastlora/cuda.h"
#include "tests/emulated.h"
#include "tests/testing.h"

namespace fastlora::testing {
namespace {

// An array on the heap that kernels may touch, `misalign` bytes past a multiple of 64.
template <class T>
class Array {
 public:
  Array(int64_t count, bool writable, const char* name, size_t misalign = 0)
      : count_(count), room_(new uint8_t[static_cast<size_t>(count) * sizeof(T) + misalign + 64]) {
    const auto address = reinterpret_cast<uintptr_t>(room_.get());
    data_ = reinterpret_cast<T*>((address + 63) / 64 * 64 + misalign);
    std::memset(data_, 0xcd, bytes());
    emulator::add_buffer(data_, static_cast<int64_t>(bytes()), writable, name);
  }
  ~Array() { emulator::remove_buffer(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* data() { return data_; }
  size_t bytes() const { return static_cast<size_t>(count_) * sizeof(T); }
  T& operator[](int64_t i) { return data_[i]; }
  bool same(Array& other) const {
    return bytes() == other.bytes() && std::memcmp(data_, other.data_, bytes()) == 0;
  }

 private:
  int64_t count_;
  std::unique_ptr<uint8_t[]> room_;
  T* data_;
};

constexpr const char* kNames[] = {"float32", "bfloat16", "float16"};
int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// 16-bit patterns of small normal numbers, and now and then a zero.
void fill(Rng& rng, DType dtype, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const float f = rng.below(50) == 0 ? 0.0f : rng.normal();
    if (dtype == DType::kFloat32) {
      std::memcpy(out + 4 * i, &f, 4);
    } else {
      uint32_t bits;
      std::memcpy(&bits, &f, 4);
      // Cut to 8 exponent bits and 7 of mantissa, or to a half of the same sign near it: any bits will do.
      const auto half = static_cast<uint16_t>(
          dtype == DType::kBFloat16 ? bits >> 16 : (bits >> 16 & 0x8000) | (0x2000 + (bits >> 10 & 0x1fff)));
      std::memcpy(out + 2 * i, &half, 2);
    }
  }
}

void compare(Rng& rng, DType dtype, int64_t rows, int64_t cols, int64_t blocksize, bool nested, size_t misalign) {
  set_case("%s %lld x %lld, blocks of %lld, %s, misaligned by %zu", kNames[static_cast<int>(dtype)],
           static_cast<long long>(rows), static_cast<long long>(cols), static_cast<long long>(blocksize),
           nested ? "nested" : "plain", misalign);
  const int64_t count = rows * cols, blocks = (count + blocksize - 1) / blocksize, bytes = rows * ((cols + 1) / 2);
  const int64_t groups = (blocks + kNestedBlocksize - 1) / kNestedBlocksize;
  Array<uint8_t> weight(count * bytes_of(dtype), false, "weight", misalign);
  fill(rng, dtype, count, weight.data());
  Array<uint8_t> packed(bytes, true, "packed"), want_packed(bytes, false, "");
  Array<float> absmax(blocks, true, "absmax"), want_absmax(blocks, false, "");
  Array<uint8_t> codes(nested ? blocks : 0, true, "codes"), want_codes(nested ? blocks : 0, false, "");
  Array<float> scales(nested ? groups + 1 : 0, true, "nested"), want_scales(nested ? groups + 1 : 0, false, "");
  Array<double> partials(2 * kQuantizePartials, true, "partials");
  Array<float> map(256, false, "map");
  Array<uint32_t> not_finite(1, true, "not_finite");
  std::memcpy(map.data(), nf4_dynamic_map(), 1024);
  not_finite[0] = 0;

  nf4_quantize({weight.data(), dtype, rows, cols, blocksize, want_packed.data(), want_absmax.data(), 1},
               Isa::kScalar);
  if (nested) {
    nf4_double_quantize(
        {want_absmax.data(), blocks, want_codes.data(), reinterpret_cast<uint8_t*>(want_scales.data()), 1});
  }
  emulator::set_seed(rng.next());
  Status status = nf4_quantize_cuda({.weight = weight.data(),
                                     .dtype = dtype,
                                     .rows = rows,
                                     .cols = cols,
                                     .blocksize = blocksize,
                                     .packed = packed.data(),
                                     .absmax = absmax.data(),
                                     .codes = nested ? codes.data() : nullptr,
                                     .nested = scales.data(),
                                     .partials = partials.data(),
                                     .map = map.data(),
                                     .not_finite = not_finite.data(),
                                     .stream = nullptr});
  check(status == Status::kOk, "quantise: status %d: %s", static_cast<int>(status),
        emulator::take_fault().c_str());
  check(not_finite[0] == 0, "a finite weight was called not finite");
  check(packed.same(want_packed), "packed codes differ");
  check(absmax.same(want_absmax), "absmax differs");
  check(codes.same(want_codes), "codes of absmax differ");
  check(scales.same(want_scales), "offset and nested scales differ");

  Array<uint8_t> out(count * bytes_of(dtype), true, "out"), want_out(count * bytes_of(dtype), false, "");
  const Nf4Weight from{want_packed.data(),
                       {nested ? want_codes.data() : reinterpret_cast<uint8_t*>(want_absmax.data()),
                        nested ? reinterpret_cast<uint8_t*>(want_scales.data()) : nullptr},
                       rows,
                       cols,
                       blocksize};
  nf4_dequantize({from, want_out.data(), dtype, 1}, Isa::kScalar);
  status = nf4_dequantize_cuda({from, 0, rows, 0, cols, map.data(), out.data(), dtype, nullptr});
  check(status == Status::kOk, "dequantise: status %d: %s", static_cast<int>(status),
        emulator::take_fault().c_str());
  check(out.same(want_out), "dequantised values differ");

  // A part of it: some rows, and columns from an even one on.
  const int64_t first_row = rng.below(rows), part_rows = 1 + rng.below(rows - first_row);
  const int64_t step = rng.coin() && cols > 16 ? 8 : 2, first_column = rng.below((cols + step - 1) / step) * step;
  const int64_t part_columns = rng.coin() ? cols - first_column : 1 + rng.below(cols - first_column);
  Array<uint8_t> part(part_rows * part_columns * bytes_of(dtype), true, "part");
  status = nf4_dequantize_cuda(
      {from, first_row, part_rows, first_column, part_columns, map.data(), part.data(), dtype, nullptr});
  check(status == Status::kOk, "part: status %d: %s", static_cast<int>(status), emulator::take_fault().c_str());
  for (int64_t row = 0; row < part_rows; ++row) {
    const int64_t size = bytes_of(dtype), at = ((first_row + row) * cols + first_column) * size;
    check(std::memcmp(part.data() + row * part_columns * size, want_out.data() + at,
                      static_cast<size_t>(part_columns * size)) == 0,
          "row %lld of the part [%lld, %lld] + [%lld, %lld] differs", static_cast<long long>(row),
          static_cast<long long>(first_row), static_cast<long long>(first_column),
          static_cast<long long>(part_rows), static_cast<long long>(part_columns));
  }
}

void test_not_finite(Rng& rng) {
  for (const float odd : {__builtin_inff(), -__builtin_inff(), __builtin_nanf("")}) {
    set_case("a weight with %g", static_cast<double>(odd));
    Array<float> weight(640, false, "weight");
    for (int64_t i = 0; i < 640; ++i) weight[i] = rng.normal();
    weight[rng.below(640)] = odd;
    Array<uint8_t> packed(320, true, "packed");
    Array<float> absmax(10, true, "absmax");
    Array<uint32_t> not_finite(1, true, "not_finite");
    not_finite[0] = 0;
    const Status status = nf4_quantize_cuda({.weight = weight.data(),
                                             .dtype = DType::kFloat32,
                                             .rows = 1,
                                             .cols = 640,
                                             .blocksize = 64,
                                             .packed = packed.data(),
                                             .absmax = absmax.data(),
                                             .codes = nullptr,
                                             .nested = nullptr,
                                             .partials = nullptr,
                                             .map = nullptr,
                                             .not_finite = not_finite.data(),
                                             .stream = nullptr});
    check(status == Status::kOk, "status %d: %s", static_cast<int>(status), emulator::take_fault().c_str());
    check(not_finite[0] == 1, "not noticed");
  }
}

// On whole vectors every global access uses full sectors, and no look-up meets another in a bank.
void test_patterns(Rng& rng) {
  emulator::take_counts();
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) compare(rng, dtype, 16, 1024, 64, false, 0);
  set_case("access patterns");
  for (const emulator::LineCount& line : emulator::take_counts()) {
    const bool shared =
        line.access == emulator::Access::kSharedLoad || line.access == emulator::Access::kSharedStore;
    // Lines that pass few bytes (absmax, tables) are not what the time goes into.
    if (line.bytes < 16384) continue;
    check(line.cost == line.least, "%s:%d: %lld %s where %lld would do", line.file.c_str(), line.line,
          static_cast<long long>(line.cost), shared ? "wavefronts" : "sectors",
          static_cast<long long>(line.least));
  }
}

}  // namespace

void test_cuda_kernels() {
  Rng rng(11);
  test_patterns(rng);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int64_t blocksize = kMinBlocksize; blocksize <= kMaxBlocksize; blocksize *= 2) {
      for (const bool nested : {false, true}) {
        compare(rng, dtype, 3, 2 * blocksize + 64, blocksize, nested, 0);
        compare(rng, dtype, 3, blocksize + 37, blocksize, nested, 0);
      }
    }
    for (int turn = 0; turn < 12; ++turn) {
      compare(rng, dtype, 1 + rng.below(40), 1 + rng.below(300), int64_t{32} << rng.below(4), rng.coin(),
              static_cast<size_t>(rng.below(4) * bytes_of(dtype)));
    }
  }
  compare(rng, DType::kBFloat16, 64, 700, 32, true, 0);  // several groups of nested scales
  test_not_finite(rng);
}

}  // namespace fastlora::testing
