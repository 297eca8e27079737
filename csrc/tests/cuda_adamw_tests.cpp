// adamw and adamw_8bit under the emulator against the CPU's scalar level, bit for bit, at any address.
#include "emulator/launch.h"
#include "fastlora/cuda.h"
#include "tests/adamw_problem.h"
#include "tests/emulated_tensor.h"

namespace fastlora::testing {
namespace {

// What a step may touch, and the steps on the emulated device.
struct OnDevice {
  Problem& it;
  EmulatedBuffer param, grad, m, v, codes1, codes2, scales1, scales2, tables;

  explicit OnDevice(Problem& problem)
      : it(problem),
        param(it.param.buffer.bytes(), it.param.buffer.size(), true, "param"),
        grad(it.grad.buffer.bytes(), it.grad.buffer.size(), false, "grad"),
        m(it.m.buffer.bytes(), it.m.buffer.size(), true, "m"),
        v(it.v.buffer.bytes(), it.v.buffer.size(), true, "v"),
        codes1(it.codes1.bytes(), it.codes1.size(), true, "codes of m"),
        codes2(it.codes2.bytes(), it.codes2.size(), true, "codes of v"),
        scales1(it.scales1.buffer.bytes(), it.scales1.buffer.size(), true, "scales of m"),
        scales2(it.scales2.buffer.bytes(), it.scales2.buffer.size(), true, "scales of v"),
        tables(&device_tables(), sizeof(AdamwTables), false, "tables") {}

  // A copy whose address is a multiple of 16, as on a device.
  static const AdamwTables& device_tables() {
    alignas(16) static const AdamwTables tables = adamw_tables();
    return tables;
  }
  Status step() { return adamw_cuda({.call = it.args(1), .stream = nullptr}); }
  Status step_8bit() {
    return adamw_8bit_cuda({.call = it.args_8bit(1), .tables = &device_tables(), .stream = nullptr});
  }
};

void compare(Rng& rng, int64_t count, DType dtype, DType grad_dtype, Place place) {
  set_case("adamw on the device, %s, grad %s, count %lld, %s", dtype_name(dtype), dtype_name(grad_dtype),
           static_cast<long long>(count), place_name(place));
  const uint64_t seed = rng.next();
  emulator::set_seed(rng.next());
  Problem want(Place::kHeap, seed, count, dtype, grad_dtype), got(place, seed, count, dtype, grad_dtype);
  check(want.step(Isa::kScalar, 1) == Status::kOk, "status");
  succeeded("adamw", OnDevice(got).step());
  check_same(got.param, want.param, "param");
  check_same(got.m, want.m, "m");
  check_same(got.v, want.v, "v");
  Problem want8(Place::kHeap, seed, count, dtype, grad_dtype), got8(place, seed, count, dtype, grad_dtype);
  check(want8.step_8bit(Isa::kScalar, 1) == Status::kOk, "status");
  succeeded("adamw_8bit", OnDevice(got8).step_8bit());
  check_same(got8.param, want8.param, "8-bit param");
  check_same_moments(got8, want8);
}

// On whole vectors every line that moves a byte an element or more moves whole sectors.
void test_patterns() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    set_case("access patterns, %s", dtype_name(dtype));
    Problem problem(Place::kAfterGuard, 5, 8192, dtype, dtype);
    OnDevice device(problem);
    emulator::take_counts();
    succeeded("adamw", device.step());
    succeeded("adamw_8bit", device.step_8bit());
    int lines = 0;
    for (const emulator::LineCount& line : emulator::take_counts()) {
      const bool global =
          line.access == emulator::Access::kGlobalLoad || line.access == emulator::Access::kGlobalStore;
      if (!global || line.bytes < 8192) continue;
      ++lines;
      check(line.cost == line.least, "%s:%d: %lld sectors where %lld would do", line.file.c_str(), line.line,
            static_cast<long long>(line.cost), static_cast<long long>(line.least));
    }
    check(lines >= 10, "%d lines move elements", lines);
  }
}

// Every float32 near every bound, and powers of two: the tables' code is the nearest.
void test_tables() {
  set_case("tables of the dynamic maps");
  const AdamwTables& t = adamw_tables();
  for (const bool with_sign : {true, false}) {
    const float* values = with_sign ? t.signed_values : t.unsigned_values;
    const float* bounds = with_sign ? t.signed_bounds : t.unsigned_bounds;
    const uint8_t* cells = with_sign ? t.signed_cells : t.unsigned_cells;
    const auto test = [&](float f) {
      const auto bits = cpu::load_unaligned<uint32_t>(&f);
      const int64_t leading = static_cast<int64_t>((bits & 0x7fffffffu) >> 16) - kMapFirstCell;
      int64_t cell = cpu::min64(cpu::max64(leading, 0), kMapCells - 1);
      if (with_sign && bits >> 31 != 0) cell += kMapCells;
      const int code = cells[cell] + (f > bounds[cells[cell]] ? 1 : 0);
      int nearest = 0;
      while (nearest < 255 &&
             (static_cast<double>(values[nearest]) + static_cast<double>(values[nearest + 1])) * 0.5 <
                 static_cast<double>(f)) {
        ++nearest;
      }
      check(code == nearest, "%.9g has code %d, expected %d", static_cast<double>(f), code, nearest);
    };
    for (int i = 0; i < 255; ++i) {
      float f = bounds[i];
      for (int j = 0; j < 4; ++j) f = std::nextafter(f, -2.0f);
      for (int j = 0; j < 8; ++j, f = std::nextafter(f, 2.0f)) {
        if (with_sign || f >= 0.0f) test(f);
      }
    }
    for (float f = 1.0f; f > 0.0f; f *= 0.5f) {
      test(f);
      if (with_sign) test(-f);
    }
    test(0.0f);
  }
}

}  // namespace

void test_cuda_adamw() {
  Rng rng(23);
  test_tables();
  test_patterns();
  for (const DType dtype : kDTypes) {
    for (const DType grad_dtype : kDTypes) {
      for (const int64_t count : {1, 3, 255, 256, 257, 1700}) compare(rng, count, dtype, grad_dtype, Place::kHeap);
      compare(rng, 1030, dtype, grad_dtype, Place::kOddHeap);
      compare(rng, 8000, dtype, grad_dtype, Place::kHeap);  // more than the blocks of one turn take
    }
  }
  set_case("adamw on the device with bad arguments");
  Problem nothing(Place::kHeap, 1, 1, DType::kFloat32, DType::kFloat32);
  nothing.grad.dtype = static_cast<DType>(3);
  refuses("adamw", OnDevice(nothing).step());
  refuses("adamw_8bit", OnDevice(nothing).step_8bit());
  nothing.grad.dtype = DType::kFloat32;
  nothing.param.count = -1;
  refuses("adamw", OnDevice(nothing).step());
  refuses("adamw_8bit", OnDevice(nothing).step_8bit());
}

}  // namespace fastlora::testing
