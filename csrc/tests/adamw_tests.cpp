// adamw and adamw_8bit: every level gives the scalar level's bits, into exactly sized buffers.
#include "fastlora/cpu.h"
#include "tests/adamw_problem.h"
#include "tests/tests.h"

namespace fastlora::testing {

void test_adamw() {
  Rng rng(17);
  for (const int64_t count : {0, 1, 7, 15, 16, 17, 255, 256, 257, 700, 4097, 40000}) {
    for (const DType dtype : kDTypes) {
      for (const DType grad_dtype : kDTypes) {
        const uint64_t seed = rng.next();
        Problem want(Place::kHeap, seed, count, dtype, grad_dtype);
        set_case("adamw scalar");
        check(want.step(Isa::kScalar, 1) == Status::kOk, "status");
        Problem want8(Place::kHeap, seed, count, dtype, grad_dtype);
        check(want8.step_8bit(Isa::kScalar, 1) == Status::kOk, "status");
        for (const Isa isa : levels()) {
          const Place place = rng.pick(kPlaces);
          const int32_t threads = 1 + static_cast<int32_t>(rng.below(3));
          set_case("adamw %s %s grad %s count %lld threads %d %s", isa_name(isa), dtype_name(dtype),
                   dtype_name(grad_dtype), static_cast<long long>(count), threads, place_name(place));
          Problem got(place, seed, count, dtype, grad_dtype);
          check(got.step(isa, threads) == Status::kOk, "status");
          check_same(got.param, want.param, "param");
          check_same(got.m, want.m, "m");
          check_same(got.v, want.v, "v");
          Problem got8(place, seed, count, dtype, grad_dtype);
          check(got8.step_8bit(isa, threads) == Status::kOk, "8-bit status");
          check_same(got8.param, want8.param, "8-bit param");
          check_same_moments(got8, want8);
        }
      }
    }
  }
  Problem nothing(Place::kHeap, 1, 1, DType::kFloat32, DType::kFloat32);
  for (const Isa isa : {static_cast<Isa>(-1), static_cast<Isa>(kIsaCount)}) {
    set_case("adamw at a level that is not there");
    check(nothing.step(isa, 1) == Status::kUnsupportedLevel, "adamw");
    check(nothing.step_8bit(isa, 1) == Status::kUnsupportedLevel, "adamw_8bit");
  }
  set_case("adamw with bad arguments");
  nothing.param.dtype = static_cast<DType>(3);
  check(nothing.step(Isa::kScalar, 1) == Status::kBadArgument, "adamw");
  check(nothing.step_8bit(Isa::kScalar, 1) == Status::kBadArgument, "adamw_8bit");
  nothing.param.dtype = DType::kFloat32;
  nothing.param.count = -1;
  check(nothing.step(Isa::kScalar, 1) == Status::kBadArgument, "adamw");
  check(nothing.step_8bit(Isa::kScalar, 1) == Status::kBadArgument, "adamw_8bit");
}

}  // namespace fastlora::testing
