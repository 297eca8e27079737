// adamw and adamw_8bit: every level gives the scalar level's bits, into exactly sized buffers.
#include "fastlora/adamw.h"

#include <cmath>

#include "fastlora/cpu.h"
#include "tests/buffer.h"
#include "tests/tests.h"

namespace fastlora::testing {
namespace {

constexpr AdamwStep kStep{.decay = 0.999f,
                          .weight1 = 0.1f,
                          .beta2 = 0.999f,
                          .weight2 = 0.001f,
                          .correction2 = 0.0547f,
                          .eps = 1e-8f,
                          .minus_step = -0.0037f};

// Every buffer of a step, equal for equal seeds.
struct Problem {
  Tensor param, grad, m, v, scales1, scales2;
  Buffer codes1, codes2;

  Problem(Place place, uint64_t seed, int64_t count, DType dtype, DType grad_dtype)
      : param(place, count, dtype),
        grad(place, count, grad_dtype),
        m(place, count, DType::kFloat32),
        v(place, count, DType::kFloat32),
        scales1(place, cpu::ceil_div(count, kAdamwBlocksize), DType::kFloat32),
        scales2(place, cpu::ceil_div(count, kAdamwBlocksize), DType::kFloat32),
        codes1(place, count, 1),
        codes2(place, count, 1) {
    Rng rng(seed);
    param.fill_normal(rng, 1.0f);
    m.fill_normal(rng, 0.1f);
    for (int64_t i = 0; i < count; ++i) {
      // Magnitudes far apart, zeros, and now and then what is not finite.
      const float magnitude = std::pow(10.0f, static_cast<float>(-rng.below(24)));
      grad.set(i, rng.below(5) == 0 ? 0.0f : rng.normal() * magnitude);
      if (rng.below(1500) == 0) grad.set(i, rng.coin() ? INFINITY : NAN);
      v.set(i, std::fabs(rng.normal()) * 0.01f);
      codes1.bytes()[i] = static_cast<uint8_t>(rng.below(256));
      codes2.bytes()[i] = static_cast<uint8_t>(rng.below(256));
    }
    for (int64_t i = 0; i < scales1.count; ++i) {
      scales1.set(i, rng.below(4) == 0 ? 0.0f : std::fabs(rng.normal()));
      scales2.set(i, rng.below(4) == 0 ? 0.0f : std::fabs(rng.normal()) * 1e-3f);
    }
  }

  Status step(Isa isa, int32_t threads) {
    return adamw({.param = param.buffer.bytes(),
                  .grad = grad.buffer.bytes(),
                  .exp_avg = m.buffer.as<float>(),
                  .exp_avg_sq = v.buffer.as<float>(),
                  .count = param.count,
                  .dtype = param.dtype,
                  .grad_dtype = grad.dtype,
                  .step = kStep,
                  .threads = threads},
                 isa);
  }
  Status step_8bit(Isa isa, int32_t threads) {
    return adamw_8bit({.param = param.buffer.bytes(),
                       .grad = grad.buffer.bytes(),
                       .exp_avg = codes1.bytes(),
                       .exp_avg_sq = codes2.bytes(),
                       .exp_avg_scale = scales1.buffer.as<float>(),
                       .exp_avg_sq_scale = scales2.buffer.as<float>(),
                       .count = param.count,
                       .dtype = param.dtype,
                       .grad_dtype = grad.dtype,
                       .step = kStep,
                       .threads = threads},
                      isa);
  }
};

// The bits, but any NaN for a NaN: which of two operands' it is differs between instructions.
void check_same(const Tensor& got, const Tensor& want, const char* name) {
  for (int64_t i = 0; i < got.count; ++i) {
    const float a = got[i], b = want[i];
    const bool same = cpu::load_unaligned<uint32_t>(&a) == cpu::load_unaligned<uint32_t>(&b);
    if (!check(same || (std::isnan(a) && std::isnan(b)), "%s[%lld] is %.9g, expected %.9g", name,
               static_cast<long long>(i), static_cast<double>(a), static_cast<double>(b))) {
      return;
    }
  }
}

}  // namespace

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
          check_same(got8.scales1, want8.scales1, "scales of m");
          check_same(got8.scales2, want8.scales2, "scales of v");
          for (int64_t i = 0; i < count; ++i) {
            // Of a block that is not finite, whose NaN may have either sign, only the scale is defined.
            if (!std::isfinite(want8.scales1[i / kAdamwBlocksize])) continue;
            if (!std::isfinite(want8.scales2[i / kAdamwBlocksize])) continue;
            const bool same = got8.codes1.bytes()[i] == want8.codes1.bytes()[i] &&
                              got8.codes2.bytes()[i] == want8.codes2.bytes()[i];
            if (!check(same, "codes of element %lld", static_cast<long long>(i))) break;
          }
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
