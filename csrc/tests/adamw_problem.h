// A step of AdamW as tests make it: the buffers of one parameter, and how results are compared.
#pragma once

#include <cmath>

#include "fastlora/adamw.h"
#include "tests/buffer.h"

namespace fastlora::testing {

inline constexpr AdamwStep kStep{.decay = 0.999f,
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

  AdamwArgs args(int32_t threads) {
    return {.param = param.buffer.bytes(),
            .grad = grad.buffer.bytes(),
            .exp_avg = m.buffer.as<float>(),
            .exp_avg_sq = v.buffer.as<float>(),
            .count = param.count,
            .dtype = param.dtype,
            .grad_dtype = grad.dtype,
            .step = kStep,
            .threads = threads};
  }
  Adamw8bitArgs args_8bit(int32_t threads) {
    return {.param = param.buffer.bytes(),
            .grad = grad.buffer.bytes(),
            .exp_avg = codes1.bytes(),
            .exp_avg_sq = codes2.bytes(),
            .exp_avg_scale = scales1.buffer.as<float>(),
            .exp_avg_sq_scale = scales2.buffer.as<float>(),
            .count = param.count,
            .dtype = param.dtype,
            .grad_dtype = grad.dtype,
            .step = kStep,
            .threads = threads};
  }
  Status step(Isa isa, int32_t threads) { return adamw(args(threads), isa); }
  Status step_8bit(Isa isa, int32_t threads) { return adamw_8bit(args_8bit(threads), isa); }
};

// The bits, but any NaN for a NaN: which of two operands' it is differs between instructions.
static inline void check_same(const Tensor& got, const Tensor& want, const char* name) {
  for (int64_t i = 0; i < got.count; ++i) {
    const float a = got[i], b = want[i];
    const bool same = cpu::load_unaligned<uint32_t>(&a) == cpu::load_unaligned<uint32_t>(&b);
    if (!check(same || (std::isnan(a) && std::isnan(b)), "%s[%lld] is %.9g, expected %.9g", name,
               static_cast<long long>(i), static_cast<double>(a), static_cast<double>(b))) {
      return;
    }
  }
}

// Codes and scales. Of a block that is not finite, whose NaN may have either sign, only the scale is defined.
static inline void check_same_moments(const Problem& got, const Problem& want) {
  check_same(got.scales1, want.scales1, "scales of m");
  check_same(got.scales2, want.scales2, "scales of v");
  for (int64_t i = 0; i < got.param.count; ++i) {
    if (!std::isfinite(want.scales1[i / kAdamwBlocksize]) || !std::isfinite(want.scales2[i / kAdamwBlocksize])) {
      continue;
    }
    const bool same =
        got.codes1.bytes()[i] == want.codes1.bytes()[i] && got.codes2.bytes()[i] == want.codes2.bytes()[i];
    if (!check(same, "codes of element %lld", static_cast<long long>(i))) return;
  }
}

}  // namespace fastlora::testing
