// Quantise, double-quantise and dequantise: the scalar level against the definition, the wide levels against the
// scalar one bit for bit, any thread count, every placement of the buffers.
#include <cmath>

#include "cpu/numeric.h"
#include "fastlora/cpu.h"
#include "fastlora/nf4.h"
#include "tests/buffer.h"
#include "tests/tests.h"

namespace fastlora::testing {
namespace {

using cpu::ceil_div;

constexpr int64_t kRows[] = {1, 2, 3, 5, 7, 16, 33};
constexpr int64_t kCols[] = {1, 2, 3, 7, 15, 31, 32, 33, 63, 64, 65, 96, 123, 127, 128, 130, 255, 257, 320, 513};
constexpr int64_t kBlocksizes[] = {32, 64, 64, 64, 128, 256, 512, 1024, 2048, 4096};

// Normal values with what the format finds hard: zero blocks, exact midpoints, tiny and huge magnitudes.
void fill_weight(Tensor& weight, Rng& rng, int64_t blocksize) {
  weight.fill_normal(rng, 0.05f);
  if (weight.count == 0) return;
  const int64_t blocks = ceil_div(weight.count, blocksize);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * blocksize, last = cpu::min64(first + blocksize, weight.count);
    switch (rng.below(8)) {
      case 0:
        for (int64_t i = first; i < last; ++i) weight.set(i, i % 2 == 0 ? 0.0f : -0.0f);
        break;
      case 1:  // absmax 1: midpoints stay midpoints
        for (int64_t i = first; i < last; ++i) {
          const int64_t c = rng.below(15);
          weight.set(i, (kNf4Codes[c] + kNf4Codes[c + 1]) * 0.5f);
        }
        weight.set(first, rng.coin() ? 1.0f : -1.0f);
        break;
      case 2:
        for (int64_t i = first; i < last; ++i) weight.set(i, weight[i] * 1e-36f);
        break;
      case 3:
        for (int64_t i = first; i < last; ++i) weight.set(i, weight[i] * 1e5f);
        break;
      case 4:  // subnormal in float32
        for (int64_t i = first; i < last; ++i) weight.set(i, weight[i] * 1e-38f);
        break;
      default: break;
    }
  }
}

struct Quantised {
  Buffer packed, absmax;
  Quantised(Place place, int64_t rows, int64_t cols, int64_t blocksize)
      : packed(place, rows * ceil_div(cols, 2), 1), absmax(place, 4 * ceil_div(rows * cols, blocksize), 4) {}
};

Status run_quantize(const Tensor& weight, int64_t rows, int64_t cols, int64_t blocksize, Quantised& out,
                    int32_t threads, Isa isa) {
  return nf4_quantize({.weight = weight.buffer.bytes(),
                       .dtype = weight.dtype,
                       .rows = rows,
                       .cols = cols,
                       .blocksize = blocksize,
                       .packed = out.packed.bytes(),
                       .absmax = out.absmax.as<float>(),
                       .threads = threads},
                      isa);
}

uint8_t code_of(const Buffer& packed, int64_t cols, int64_t i) {
  const uint8_t byte = packed.bytes()[(i / cols) * ceil_div(cols, 2) + (i % cols) / 2];
  return i % cols % 2 == 0 ? byte >> 4 : byte & 15;
}

// Against the definition, by exhaustive search.
void check_definition(const Tensor& weight, int64_t rows, int64_t cols, int64_t blocksize, Quantised& got) {
  for (int64_t i = 0; i < rows * cols; ++i) {
    const float absmax = got.absmax.as<float>()[i / blocksize];
    const double magnitude = std::fabs(weight[i]);
    if (!check(magnitude <= static_cast<double>(absmax), "absmax below element %lld", static_cast<long long>(i)))
      return;
    if (absmax < 1e-37f) continue;  // 1 / absmax overflows: any code decodes to next to nothing
    const double scaled = static_cast<double>(weight[i]) / static_cast<double>(absmax);
    double nearest = 10.0;
    for (const float code : kNf4Codes) nearest = std::fmin(nearest, std::fabs(static_cast<double>(code) - scaled));
    const uint8_t code = code_of(got.packed, cols, i);
    const double distance = std::fabs(static_cast<double>(kNf4Codes[code]) - scaled);
    if (!check(distance <= nearest + 3e-7, "element %lld: code %d is not the nearest", static_cast<long long>(i),
               code)) {
      return;
    }
  }
  for (int64_t row = 0; cols % 2 == 1 && row < rows; ++row) {
    const uint8_t last = got.packed.bytes()[(row + 1) * ceil_div(cols, 2) - 1];
    check((last & 15) == 7, "row %lld of odd length does not end with code 7", static_cast<long long>(row));
  }
}

void quantize_case(Rng& rng, Place place) {
  const int64_t rows = rng.pick(kRows), cols = rng.pick(kCols), blocksize = rng.pick(kBlocksizes);
  const DType dtype = rng.pick(kDTypes);
  Tensor weight(place, rows * cols, dtype);
  fill_weight(weight, rng, blocksize);
  Quantised expected(Place::kHeap, rows, cols, blocksize);
  const bool poison = rng.below(6) == 0;
  const int64_t where = rng.below(rows * cols);
  for (const Isa isa : levels()) {
    for (const int32_t threads : {1, 3}) {
      set_case("nf4_quantize %s %s %lldx%lld blocksize %lld threads %d %s", isa_name(isa), dtype_name(dtype),
               static_cast<long long>(rows), static_cast<long long>(cols), static_cast<long long>(blocksize),
               threads, place_name(place));
      Quantised got(place, rows, cols, blocksize);
      check(run_quantize(weight, rows, cols, blocksize, got, threads, isa) == Status::kOk, "status");
      if (isa == Isa::kScalar && threads == 1) {
        run_quantize(weight, rows, cols, blocksize, expected, 1, Isa::kScalar);
        check_definition(weight, rows, cols, blocksize, got);
      }
      check(got.absmax.equals(expected.absmax), "absmax differs from the scalar level");
      for (int64_t i = 0; i < rows * cols; ++i) {
        const uint8_t have = code_of(got.packed, cols, i), want = code_of(expected.packed, cols, i);
        if (!check(have == want, "code (%lld, %lld) is %d, %d at the scalar level",
                   static_cast<long long>(i / cols), static_cast<long long>(i % cols), have, want)) {
          break;
        }
      }
      check(got.packed.equals(expected.packed), "packed bytes differ from the scalar level");
    }
    if (poison) {
      const float saved = weight[where];
      for (const float bad : {NAN, INFINITY, -INFINITY}) {
        weight.set(where, bad);
        Quantised got(place, rows, cols, blocksize);
        check(run_quantize(weight, rows, cols, blocksize, got, 3, isa) == Status::kNotFinite,
              "element %lld is %f and was accepted", static_cast<long long>(where), static_cast<double>(bad));
      }
      weight.set(where, saved);
    }
  }
}

void dequantize_case(Rng& rng, Place place) {
  const int64_t rows = rng.pick(kRows), cols = rng.pick(kCols), blocksize = rng.pick(kBlocksizes);
  const DType dtype = rng.pick(kDTypes);
  const Weight weight(place, rng, rows, cols, blocksize, rng.coin());
  const std::vector<float> dense = weight.dense();
  for (const Isa isa : levels()) {
    for (const int32_t threads : {1, 3}) {
      set_case("nf4_dequantize %s %s %lldx%lld blocksize %lld%s threads %d %s", isa_name(isa), dtype_name(dtype),
               static_cast<long long>(rows), static_cast<long long>(cols), static_cast<long long>(blocksize),
               weight.double_quantised ? " nested" : "", threads, place_name(place));
      Tensor out(place, rows * cols, dtype);
      const Nf4DequantizeArgs args{
          .weight = weight.view(), .out = out.buffer.bytes(), .dtype = dtype, .threads = threads};
      check(nf4_dequantize(args, isa) == Status::kOk, "status");
      Tensor expected(Place::kHeap, rows * cols, dtype);
      for (int64_t i = 0; i < rows * cols; ++i) expected.set(i, dense[static_cast<size_t>(i)]);
      for (int64_t i = 0; i < rows * cols; ++i) {
        if (!check(out[i] == expected[i], "(%lld, %lld) is %.9g, expected %.9g", static_cast<long long>(i / cols),
                   static_cast<long long>(i % cols), static_cast<double>(out[i]),
                   static_cast<double>(expected[i]))) {
          break;
        }
      }
    }
  }
}

void double_quantize_case(Rng& rng, Place place) {
  constexpr int64_t kBlocks[] = {0, 1, 2, 7, 255, 256, 257, 511, 512, 513, 1000, 4097, 9001};
  const int64_t blocks = rng.pick(kBlocks), groups = ceil_div(blocks, kNestedBlocksize);
  Tensor absmax(place, blocks, DType::kFloat32);
  const float spread = rng.coin() ? 1e-3f : 1.0f;
  double sum = 0.0;
  for (int64_t i = 0; i < blocks; ++i) {
    absmax.set(i, 0.05f + spread * std::fabs(rng.normal()));
    sum += static_cast<double>(absmax[i]);
  }
  const float offset = blocks == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(blocks));
  const float* map = nf4_dynamic_map();
  Buffer first_codes(Place::kHeap, blocks, 1), first_nested(Place::kHeap, 4 * (1 + groups), 1);
  for (const int32_t threads : {1, 3}) {
    set_case("nf4_double_quantize %lld blocks threads %d %s", static_cast<long long>(blocks), threads,
             place_name(place));
    Buffer codes(place, blocks, 1), nested(place, 4 * (1 + groups), 1);
    const Nf4DoubleQuantizeArgs args{.absmax = absmax.buffer.as<float>(),
                                     .blocks = blocks,
                                     .codes = codes.bytes(),
                                     .nested = nested.bytes(),
                                     .threads = threads};
    check(nf4_double_quantize(args) == Status::kOk, "status");
    if (threads == 1) {
      std::memcpy(first_codes.bytes(), codes.bytes(), codes.size());
      std::memcpy(first_nested.bytes(), nested.bytes(), nested.size());
    }
    check(codes.equals(first_codes) && nested.equals(first_nested), "differs from one thread");
    const auto got_offset = cpu::load_unaligned<float>(nested.bytes());
    check(std::fabs(got_offset - offset) <= 1e-6f * std::fabs(offset), "offset %g, expected %g",
          static_cast<double>(got_offset), static_cast<double>(offset));
    Tensor decoded(place, blocks, DType::kFloat32);
    const Nf4Scales scales{.codes = codes.bytes(), .nested = nested.bytes()};
    check(nf4_decode_absmax(scales, blocks, decoded.buffer.as<float>(), threads) == Status::kOk, "decode status");
    for (int64_t b = 0; b < blocks; ++b) {
      const auto scale = cpu::load_unaligned<float>(nested.bytes() + 4 * (1 + b / kNestedBlocksize));
      const double scaled = scale > 0.0f ? static_cast<double>((absmax[b] - got_offset) * (1.0f / scale)) : 0.0;
      double nearest = 10.0;
      for (int i = 0; i < 256; ++i) nearest = std::fmin(nearest, std::fabs(static_cast<double>(map[i]) - scaled));
      const uint8_t code = codes.bytes()[b];
      const double distance = std::fabs(static_cast<double>(map[code]) - scaled);
      if (!check(distance <= nearest + 2e-7, "block %lld: index %d is not the nearest", static_cast<long long>(b),
                 code))
        break;
      const float product = map[code] * scale;
      if (!check(decoded[b] == product + got_offset, "block %lld decodes to %.9g", static_cast<long long>(b),
                 static_cast<double>(decoded[b]))) {
        break;
      }
    }
  }
}

}  // namespace

void test_format() {
  Rng rng(2023);
  set_case("nf4_dynamic_map");
  const float* map = nf4_dynamic_map();
  for (int i = 1; i < 256; ++i) check(map[i - 1] < map[i], "entry %d does not ascend", i);
  check(map[127] == 0.0f && map[255] == 1.0f, "zero at 127 and one at 255");
  for (int round = 0; round < 120; ++round) {
    for (const Place place : kPlaces) {
      quantize_case(rng, place);
      dequantize_case(rng, place);
    }
  }
  for (int round = 0; round < 10; ++round) {
    for (const Place place : kPlaces) double_quantize_case(rng, place);
  }
}

}  // namespace fastlora::testing
