// Drives every kernel entry point at every level this machine has, with no Python in sight, so that sanitizers
// and guard pages can watch.  See buffer.h for how buffers are placed.
#include <cmath>
#include <thread>

#include "cpu/numeric.h"
#include "cpu/parallel.h"
#include "fastlora/cpu.h"
#include "fastlora/lora_dropout.h"
#include "fastlora/nf4.h"
#include "fastlora/nf4_linear.h"
#include "tests/buffer.h"
#include "tests/tests.h"

namespace fastlora::testing {

const std::vector<Isa>& levels() {
  static const std::vector<Isa> available = [] {
    std::vector<Isa> found;
    for (int32_t i = 0; i < kIsaCount; ++i) {
      if (isa_available(static_cast<Isa>(i))) found.push_back(static_cast<Isa>(i));
    }
    return found;
  }();
  return available;
}

// The value a 16-bit float holds, from its fields.
static double value_of(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

void test_numeric() {
  for (int h = 0; h < 65536; ++h) {
    const auto bits = static_cast<uint16_t>(h);
    set_case("conversions of the 16 bits %04x", h);
    for (const bool bf16 : {true, false}) {
      const double want = value_of(bits, bf16 ? 8 : 5);
      const float got = bf16 ? cpu::bf16_to_float(bits) : cpu::fp16_to_float(bits);
      const uint16_t back = bf16 ? cpu::float_to_bf16(got) : cpu::float_to_fp16(got);
      if (std::isnan(want)) {
        check(std::isnan(got) && std::isnan(value_of(back, bf16 ? 8 : 5)), "NaN was lost");
        continue;
      }
      check(static_cast<double>(got) == want, "decodes to %.9g, expected %.9g", static_cast<double>(got), want);
      check(back == bits, "comes back as %04x", back);
      // Halfway to the next value up goes to the even one, a hair more goes up.
      const double next = value_of(static_cast<uint16_t>(h + 1), bf16 ? 8 : 5);
      if ((h & 0x7fff) == 0x7fff || !std::isfinite(next) || !std::isfinite(want) || (h + 1) % 0x8000 == 0)
        continue;
      const auto middle = static_cast<float>((want + next) / 2);
      if (static_cast<double>(middle) != (want + next) / 2) continue;  // below float32's own subnormals
      const uint16_t even = static_cast<uint16_t>(h % 2 == 0 ? h : h + 1);
      const uint16_t at = bf16 ? cpu::float_to_bf16(middle) : cpu::float_to_fp16(middle);
      check(at == even, "halfway up rounds to %04x, expected %04x", at, even);
      const float beyond = std::nextafter(middle, static_cast<float>(next));
      const uint16_t above = bf16 ? cpu::float_to_bf16(beyond) : cpu::float_to_fp16(beyond);
      check(above == h + 1, "beyond halfway rounds to %04x", above);
    }
  }
  for (const int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
    for (const int32_t threads : {-1, 0, 1, 2, 3, 16}) {
      set_case("parallel_ranges count %lld threads %d", static_cast<long long>(count), threads);
      std::vector<int> visits(static_cast<size_t>(count));
      cpu::parallel_ranges(
          count, threads,
          [](void* context, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) ++static_cast<int*>(context)[i];
          },
          visits.data());
      for (const int n : visits) check(n == 1, "an index was visited %d times", n);
    }
  }
}

void test_lora_dropout() {
  Rng rng(11);
  for (const int64_t count : {0, 1, 2, 7, 31, 1000, 20001}) {
    for (const DType dtype : kDTypes) {
      for (const double p : {0.0, 0.1, 0.5, 0.999}) {
        const Place place = rng.pick(kPlaces);
        const uint64_t seed = rng.next();
        Tensor x(place, count, dtype);
        x.fill_normal(rng, 1.0f);
        for (const int32_t threads : {1, 3}) {
          set_case("lora_dropout %s count %lld p %g threads %d %s", dtype_name(dtype),
                   static_cast<long long>(count), p, threads, place_name(place));
          Tensor out(place, count, dtype);
          const LoraDropoutArgs args{.x = x.buffer.bytes(),
                                     .out = out.buffer.bytes(),
                                     .count = count,
                                     .seed = seed,
                                     .p = p,
                                     .dtype = dtype,
                                     .threads = threads};
          check(lora_dropout(args) == Status::kOk, "status");
          for (int64_t i = 0; i < count; ++i) {
            uint64_t z = seed + static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15u;
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
            z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
            z ^= z >> 31;
            const bool keep = static_cast<double>(z >> 32) >= std::floor(p * 4294967296.0);
            Tensor want(Place::kHeap, 1, dtype);
            want.set(0, keep ? x[i] * static_cast<float>(1.0 / (1.0 - p)) : 0.0f);
            if (!check(out[i] == want[0], "element %lld is %g, expected %g", static_cast<long long>(i),
                       static_cast<double>(out[i]), static_cast<double>(want[0]))) {
              break;
            }
          }
        }
        set_case("lora_dropout in place");
        Tensor out(place, count, dtype), same(place, count, dtype);
        if (count > 0) memcpy(same.buffer.bytes(), x.buffer.bytes(), x.buffer.size());
        LoraDropoutArgs args{.x = x.buffer.bytes(),
                             .out = out.buffer.bytes(),
                             .count = count,
                             .seed = seed,
                             .p = p,
                             .dtype = dtype,
                             .threads = 1};
        lora_dropout(args);
        args.x = args.out = same.buffer.bytes();
        lora_dropout(args);
        check(out.buffer.equals(same.buffer), "differs from the call with two buffers");
      }
    }
  }
}

// Each of two threads runs its own shapes again and again; every result must be the one it had alone.
void test_concurrency() {
  for (const Isa isa : levels()) {
    set_case("two threads at once, %s", isa_name(isa));
    auto worker = [isa](int id) {
      Rng rng(static_cast<uint64_t>(100 + id));
      for (const int64_t m : {1, 6, 40}) {
        const DType dtype = id == 0 ? DType::kBFloat16 : DType::kFloat32;
        const int64_t n = 70 + id, k = 320 + 64 * id, r = 8;
        const Weight weight(Place::kHeap, rng, n, k, 64, true);
        Tensor x(Place::kHeap, m * k, dtype), dy(Place::kHeap, m * n, dtype);
        Tensor a(Place::kHeap, r * k, dtype), b(Place::kHeap, n * r, dtype);
        for (Tensor* t : {&x, &dy, &a, &b}) t->fill_normal(rng, 0.5f);
        Tensor alone_y(Place::kHeap, m * n, dtype), alone_dx(Place::kHeap, m * k, dtype);
        for (int repeat = 0; repeat < 12; ++repeat) {
          Tensor y(Place::kHeap, m * n, dtype), dx(Place::kHeap, m * k, dtype), u(Place::kHeap, m * r, dtype);
          Nf4LinearArgs forward{.x = x.buffer.bytes(),
                                .weight = weight.view(),
                                .bias = nullptr,
                                .lora_a = a.buffer.bytes(),
                                .lora_b = b.buffer.bytes(),
                                .u = u.buffer.bytes(),
                                .y = y.buffer.bytes(),
                                .m = m,
                                .r = r,
                                .scaling = 1.0f,
                                .dtype = dtype,
                                .lora_dtype = dtype,
                                .threads = 1 + repeat % 3};
          Nf4LinearGradInputArgs backward{.dy = dy.buffer.bytes(),
                                          .weight = weight.view(),
                                          .lora_a = a.buffer.bytes(),
                                          .lora_b = b.buffer.bytes(),
                                          .v = u.buffer.bytes(),
                                          .dx = dx.buffer.bytes(),
                                          .m = m,
                                          .r = r,
                                          .scaling = 1.0f,
                                          .dtype = dtype,
                                          .lora_dtype = dtype,
                                          .threads = 1 + repeat % 3};
          check(nf4_linear(forward, isa) == Status::kOk, "nf4_linear status");
          check(nf4_linear_grad_input(backward, isa) == Status::kOk, "nf4_linear_grad_input status");
          if (repeat == 0) {
            memcpy(alone_y.buffer.bytes(), y.buffer.bytes(), y.buffer.size());
            memcpy(alone_dx.buffer.bytes(), dx.buffer.bytes(), dx.buffer.size());
          }
          check(y.buffer.equals(alone_y.buffer), "m %lld: y changed", static_cast<long long>(m));
          check(dx.buffer.equals(alone_dx.buffer), "m %lld: dx changed", static_cast<long long>(m));
        }
      }
    };
    std::thread first(worker, 0), second(worker, 1);
    first.join();
    second.join();
  }
}

// Extreme in each size in turn; a fresh thread each time, because a thread keeps the largest buffer it needed.
void test_scratch() {
  constexpr size_t kMostBytes = 4 << 20;
  constexpr int64_t kShapes[][4] = {
      // m, n, k, r
      {1, 1, (1 << 21) + 100, 0}, {8, 1, 300000, 16}, {200, 2, 40000, 1}, {1, 1 << 18, 2, 1},
      {200, 30000, 3, 0},         {1, 2, 3, 70000},   {200, 2, 3, 9000},  {200, 300, 300, 5000},
  };
  Rng rng(11);
  for (const auto& [m, n, k, r] : kShapes) {
    const Weight weight(Place::kHeap, rng, n, k, 32, true);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      Tensor x(Place::kHeap, m * k, dtype), y(Place::kHeap, m * n, dtype), u(Place::kHeap, m * r, dtype);
      Tensor a(Place::kHeap, r * k, dtype), b(Place::kHeap, n * r, dtype);
      for (Tensor* t : {&x, &y, &u, &a, &b}) t->buffer.fill_bytes(0);
      for (const Isa isa : levels()) {
        if (isa == Isa::kScalar) continue;                                   // no scratch
        if (dtype == DType::kFloat32 && isa > Isa::kAvx512) continue;        // the kernels of that level
        if (isa == Isa::kAmxEmulated && isa_available(Isa::kAmx)) continue;  // as much of it, and slow
        set_case("scratch %s %s m %lld n %lld k %lld r %lld", isa_name(isa), dtype_name(dtype),
                 static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k),
                 static_cast<long long>(r));
        std::thread([&, m = m, r = r] {
          const Nf4LinearArgs forward{.x = x.buffer.bytes(),
                                      .weight = weight.view(),
                                      .bias = nullptr,
                                      .lora_a = r == 0 ? nullptr : a.buffer.bytes(),
                                      .lora_b = r == 0 ? nullptr : b.buffer.bytes(),
                                      .u = r == 0 ? nullptr : u.buffer.bytes(),
                                      .y = y.buffer.bytes(),
                                      .m = m,
                                      .r = r,
                                      .scaling = 1.0f,
                                      .dtype = dtype,
                                      .lora_dtype = dtype,
                                      .threads = 1};
          check(nf4_linear(forward, isa) == Status::kOk, "nf4_linear status");
          const size_t bytes = cpu::thread_scratch_bytes();
          check(bytes <= kMostBytes, "nf4_linear took %zu bytes of scratch", bytes);
        }).join();
        std::thread([&, m = m, r = r] {
          const Nf4LinearGradInputArgs backward{.dy = y.buffer.bytes(),
                                                .weight = weight.view(),
                                                .lora_a = r == 0 ? nullptr : a.buffer.bytes(),
                                                .lora_b = r == 0 ? nullptr : b.buffer.bytes(),
                                                .v = r == 0 ? nullptr : u.buffer.bytes(),
                                                .dx = x.buffer.bytes(),
                                                .m = m,
                                                .r = r,
                                                .scaling = 1.0f,
                                                .dtype = dtype,
                                                .lora_dtype = dtype,
                                                .threads = 1};
          check(nf4_linear_grad_input(backward, isa) == Status::kOk, "nf4_linear_grad_input status");
          const size_t bytes = cpu::thread_scratch_bytes();
          check(bytes <= kMostBytes, "nf4_linear_grad_input took %zu bytes of scratch", bytes);
        }).join();
      }
    }
  }
}

void test_refusals() {
  Rng rng(5);
  const Weight weight(Place::kHeap, rng, 2, 64, 64, false);
  Tensor x(Place::kHeap, 64, DType::kFloat32), y(Place::kHeap, 2, DType::kFloat32),
      w(Place::kHeap, 128, DType::kFloat32);
  x.fill_normal(rng, 1.0f);
  Nf4LinearArgs linear{};
  linear.x = x.buffer.bytes();
  linear.y = y.buffer.bytes();
  linear.weight = weight.view();
  linear.m = 1;
  linear.threads = 1;
  Nf4LinearGradInputArgs grad{};
  grad.dy = y.buffer.bytes();
  grad.dx = x.buffer.bytes();
  grad.weight = weight.view();
  grad.m = 1;
  grad.threads = 1;
  Nf4DequantizeArgs dequantize{
      .weight = weight.view(), .out = w.buffer.bytes(), .dtype = DType::kFloat32, .threads = 1};
  auto expect = [&](Isa isa, Status want) {
    check(nf4_linear(linear, isa) == want, "nf4_linear");
    check(nf4_linear_grad_input(grad, isa) == want, "nf4_linear_grad_input");
    check(nf4_dequantize(dequantize, isa) == want, "nf4_dequantize");
  };
  for (int32_t i = -1; i <= kIsaCount; ++i) {
    const auto isa = static_cast<Isa>(i);
    if (i >= 0 && i < kIsaCount && isa_available(isa)) continue;
    set_case("level %d, which is not there", i);
    expect(isa, Status::kUnsupportedLevel);
    check(nf4_quantize({}, isa) == Status::kUnsupportedLevel, "nf4_quantize");
  }
  for (const int64_t blocksize : {-64, 0, 1, 16, 63, 96, 8192}) {
    set_case("blocksize %lld", static_cast<long long>(blocksize));
    linear.weight.blocksize = grad.weight.blocksize = dequantize.weight.blocksize = blocksize;
    expect(Isa::kScalar, Status::kBadArgument);
    Nf4QuantizeArgs quantize{};
    quantize.blocksize = blocksize;
    check(nf4_quantize(quantize, Isa::kScalar) == Status::kBadArgument, "nf4_quantize");
  }
  linear.weight.blocksize = grad.weight.blocksize = dequantize.weight.blocksize = 64;
  set_case("negative sizes");
  linear.weight.n = grad.weight.n = dequantize.weight.n = -1;
  expect(Isa::kScalar, Status::kBadArgument);
  check(
      nf4_double_quantize({.absmax = nullptr, .blocks = -1, .codes = nullptr, .nested = nullptr, .threads = 1}) ==
          Status::kBadArgument,
      "nf4_double_quantize");
  for (const double p : {-0.1, 1.0, static_cast<double>(NAN)}) {
    const LoraDropoutArgs dropout{
        .x = nullptr, .out = nullptr, .count = 0, .seed = 0, .p = p, .dtype = DType::kFloat32, .threads = 1};
    check(lora_dropout(dropout) == Status::kBadArgument, "lora_dropout p %g", p);
  }
}

}  // namespace fastlora::testing

int main(int argc, char** argv) {
  using namespace fastlora::testing;
  install_fault_report();
  for (int32_t i = 0; i < fastlora::kIsaCount; ++i) {
    const auto isa = static_cast<fastlora::Isa>(i);
    fprintf(stderr, "level %-12s %s\n", fastlora::isa_name(isa),
            fastlora::isa_available(isa) ? "tested" : "not on this machine");
  }
  constexpr Group kGroups[] = {
      {"numeric", test_numeric},         {"format", test_format},   {"linear", test_linear},
      {"segmented", test_segmented},     {"adamw", test_adamw},     {"lora_dropout", test_lora_dropout},
      {"concurrency", test_concurrency}, {"scratch", test_scratch}, {"refusals", test_refusals},
  };
  return run_groups(argc, argv, kGroups, sizeof kGroups / sizeof kGroups[0]);
}
