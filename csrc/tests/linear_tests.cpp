// nf4_linear and nf4_linear_grad_input against float64 sums over the dequantised weight: every level, one and
// three threads (the same bits), random small ragged shapes, every placement of the buffers.
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/numeric.h"
#include "fastlora/cpu.h"
#include "fastlora/nf4_linear.h"
#include "tests/buffer.h"
#include "tests/tests.h"

namespace fastlora::testing {
namespace {

constexpr int64_t kM[] = {0, 1, 1, 2, 3, 4, 5, 8, 9, 11, 12, 16, 17, 33};
constexpr int64_t kN[] = {1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 97, 130};
constexpr int64_t kK[] = {1,  2,   3,   5,   8,   16,  31,  32,  33,  63,  64, 65,
                          96, 123, 127, 128, 129, 192, 256, 257, 320, 513, 576};
constexpr int64_t kR[] = {0, 0, 1, 3, 7, 8, 16, 17, 33, 64};
constexpr int64_t kBlocksizes[] = {32, 64, 64, 64, 128, 256, 512, 1024, 2048, 4096};

struct Case {
  int64_t m, n, k, r, blocksize;
  DType dtype, lora_dtype;
  bool nested, bias, given_u;
  float scaling;
  Place place;
  bool offsets = false, gain = false;
};

void label(const char* op, Isa isa, const Case& c, int32_t threads) {
  set_case("%s %s %s lora %s m %lld n %lld k %lld r %lld blocksize %lld%s%s%s scaling %g threads %d %s%s%s", op,
           isa_name(isa), dtype_name(c.dtype), dtype_name(c.lora_dtype), static_cast<long long>(c.m),
           static_cast<long long>(c.n), static_cast<long long>(c.k), static_cast<long long>(c.r),
           static_cast<long long>(c.blocksize), c.nested ? " nested" : "", c.bias ? " bias" : "",
           c.given_u ? " given-u" : "", static_cast<double>(c.scaling), threads, place_name(c.place),
           c.offsets ? " offsets" : "", c.gain ? " gain" : "");
}

Case random_case(Rng& rng, Place place) {
  Case c{};
  c.m = rng.pick(kM);
  c.n = rng.pick(kN);
  c.k = rng.pick(kK);
  c.r = rng.pick(kR);
  c.blocksize = rng.pick(kBlocksizes);
  c.dtype = rng.pick(kDTypes);
  c.lora_dtype = rng.coin() ? c.dtype : rng.pick(kDTypes);
  c.nested = rng.coin();
  c.bias = rng.coin();
  c.given_u = c.r > 0 && rng.below(4) == 0;
  c.scaling = rng.coin() ? 2.0f : 0.375f;
  c.place = place;
  c.offsets = rng.below(3) == 0;
  c.gain = rng.below(3) == 0;
  return c;
}

// What rounding may cost, as shares of three sums of magnitudes: `products` of the weight's products; `peak`, the
// row's largest |x| times the weight's magnitudes (routes that turn x to integers); `lora` of the low-rank term.
struct Bound {
  double products, peak, lora, output;
};
Bound bound_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return {4e-6, 0.0, 8e-6, 1e-6};
    case DType::kBFloat16: return {0x1p-8, 0x1p-14, 0x1p-6, 0x1p-8};
    case DType::kFloat16: return {0x1p-8, 0x1p-14, 0x1p-8, 0x1p-10};
  }
  return {};
}

Tensor* optional_tensor(bool there, Place place, int64_t count, DType dtype) {
  return there ? new Tensor(place, count, dtype) : nullptr;
}
void* address(Tensor* tensor) { return tensor == nullptr ? nullptr : tensor->buffer.bytes(); }

void linear_case(const Case& c, Rng& rng) {
  Tensor x(c.place, c.m * c.k, c.dtype);
  Weight weight(c.place, rng, c.n, c.k, c.blocksize, c.nested);
  if (c.offsets) weight.add_offsets(c.place, rng);
  const std::unique_ptr<Tensor> bias(optional_tensor(c.bias, c.place, c.n, c.dtype));
  const std::unique_ptr<Tensor> lora_a(optional_tensor(c.r > 0 && !c.given_u, c.place, c.r * c.k, c.lora_dtype));
  const std::unique_ptr<Tensor> lora_b(optional_tensor(c.r > 0, c.place, c.n * c.r, c.lora_dtype));
  const std::unique_ptr<Tensor> u_in(optional_tensor(c.given_u, c.place, c.m * c.r, c.dtype));
  x.fill_normal(rng, 1.0f);
  if (c.m > 1 && c.k > 70 && rng.coin()) {  // a row of zeros, and an outlier
    for (int64_t j = 0; j < c.k; ++j) x.set(j, 0.0f);
    x.set(c.k + 66, 300.0f);
  }
  const std::unique_ptr<Tensor> gain(optional_tensor(c.gain, c.place, c.n, DType::kFloat32));
  if (gain) gain->fill_normal(rng, 1.0f);
  if (bias) bias->fill_normal(rng, 1.0f);
  if (lora_a) lora_a->fill_normal(rng, 0.2f);
  if (lora_b) lora_b->fill_normal(rng, 0.2f);
  if (u_in) u_in->fill_normal(rng, 1.0f);

  // Sums in float64: y and u, and the magnitudes that bound their errors.
  const std::vector<float> w = weight.dense(), sizes = weight.magnitudes();
  const Bound share = bound_of(c.dtype);
  std::vector<double> u(static_cast<size_t>(c.m * c.r)), u_size(u.size());
  std::vector<double> y(static_cast<size_t>(c.m * c.n)), y_bound(y.size());
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t q = 0; q < c.r; ++q) {
      double sum = 0.0, size = 0.0;
      for (int64_t j = 0; lora_a && j < c.k; ++j) {
        const double product = static_cast<double>(x[i * c.k + j]) * static_cast<double>((*lora_a)[q * c.k + j]);
        sum += product;
        size += std::fabs(product);
      }
      if (u_in) sum = static_cast<double>((*u_in)[i * c.r + q]);
      u[static_cast<size_t>(i * c.r + q)] = sum;
      u_size[static_cast<size_t>(i * c.r + q)] = u_in ? std::fabs(sum) : size;
    }
    double peak = 0.0;
    for (int64_t j = 0; j < c.k; ++j) peak = std::fmax(peak, std::fabs(static_cast<double>(x[i * c.k + j])));
    for (int64_t o = 0; o < c.n; ++o) {
      double sum = 0.0, size = 0.0, weights = 0.0, lora_size = 0.0;
      for (int64_t j = 0; j < c.k; ++j) {
        const double wj = static_cast<double>(w[static_cast<size_t>(o * c.k + j)]);
        const double product = static_cast<double>(x[i * c.k + j]) * wj;
        const double magnitude = static_cast<double>(sizes[static_cast<size_t>(o * c.k + j)]);
        sum += product;
        size += std::fabs(static_cast<double>(x[i * c.k + j])) * magnitude;
        weights += magnitude;
      }
      for (int64_t q = 0; q < c.r; ++q) {
        const double b = static_cast<double>(c.scaling) * static_cast<double>((*lora_b)[o * c.r + q]);
        sum += b * u[static_cast<size_t>(i * c.r + q)];
        lora_size += std::fabs(b) * u_size[static_cast<size_t>(i * c.r + q)];
      }
      const double factor = gain ? static_cast<double>((*gain)[o]) : 1.0;
      sum *= factor;
      if (bias) sum += static_cast<double>((*bias)[o]);
      y[static_cast<size_t>(i * c.n + o)] = sum;
      y_bound[static_cast<size_t>(i * c.n + o)] =
          std::fabs(factor) * (share.products * size + share.peak * peak * weights + share.lora * lora_size) +
          share.output * std::fabs(sum) + 1e-6;
    }
  }

  for (const Isa isa : levels()) {
    std::unique_ptr<Tensor> first_y, first_u;
    for (const int32_t threads : {1, 3}) {
      label("nf4_linear", isa, c, threads);
      auto got_y = std::make_unique<Tensor>(c.place, c.m * c.n, c.dtype);
      auto got_u = std::make_unique<Tensor>(c.place, u_in ? 0 : c.m * c.r, c.dtype);
      const Nf4LinearArgs args{.x = x.buffer.bytes(),
                               .weight = weight.view(),
                               .bias = address(bias.get()),
                               .lora_a = address(lora_a.get()),
                               .lora_b = address(lora_b.get()),
                               .u = c.r == 0 ? nullptr
                                    : u_in   ? u_in->buffer.bytes()
                                             : got_u->buffer.bytes(),
                               .y = got_y->buffer.bytes(),
                               .m = c.m,
                               .r = c.r,
                               .scaling = c.scaling,
                               .dtype = c.dtype,
                               .lora_dtype = c.lora_dtype,
                               .threads = threads,
                               .gain = gain ? reinterpret_cast<const float*>(gain->buffer.bytes()) : nullptr};
      if (!check(nf4_linear(args, isa) == Status::kOk, "status")) continue;
      for (int64_t i = 0; i < c.m * c.n; ++i) {
        const double error = std::fabs(static_cast<double>((*got_y)[i]) - y[static_cast<size_t>(i)]);
        if (!check(error <= y_bound[static_cast<size_t>(i)], "y(%lld, %lld) is %.9g, expected %.9g within %.3g",
                   static_cast<long long>(i / c.n), static_cast<long long>(i % c.n),
                   static_cast<double>((*got_y)[i]), y[static_cast<size_t>(i)], y_bound[static_cast<size_t>(i)])) {
          break;
        }
      }
      for (int64_t i = 0; !u_in && i < c.m * c.r; ++i) {
        const double allowed = 0.5 * share.lora * u_size[static_cast<size_t>(i)] + 1e-6;
        const double error = std::fabs(static_cast<double>((*got_u)[i]) - u[static_cast<size_t>(i)]);
        if (!check(error <= allowed, "u(%lld, %lld) is %.9g, expected %.9g within %.3g",
                   static_cast<long long>(i / c.r), static_cast<long long>(i % c.r),
                   static_cast<double>((*got_u)[i]), u[static_cast<size_t>(i)], allowed)) {
          break;
        }
      }
      if (!first_y) {
        first_y = std::move(got_y);
        first_u = std::move(got_u);
      } else {
        check(got_y->buffer.equals(first_y->buffer), "y depends on the number of threads");
        check(got_u->buffer.equals(first_u->buffer), "u depends on the number of threads");
      }
    }
  }
}

void grad_input_case(const Case& c, Rng& rng) {
  Tensor dy(c.place, c.m * c.n, c.dtype);
  Weight weight(c.place, rng, c.n, c.k, c.blocksize, c.nested);
  if (c.offsets) weight.add_offsets(c.place, rng);
  const std::unique_ptr<Tensor> lora_a(optional_tensor(c.r > 0, c.place, c.r * c.k, c.lora_dtype));
  const std::unique_ptr<Tensor> lora_b(optional_tensor(c.r > 0, c.place, c.n * c.r, c.lora_dtype));
  dy.fill_normal(rng, 1.0f);
  if (lora_a) lora_a->fill_normal(rng, 0.2f);
  if (lora_b) lora_b->fill_normal(rng, 0.2f);

  const std::vector<float> w = weight.dense(), sizes = weight.magnitudes();
  const Bound share = bound_of(c.dtype);
  std::vector<double> v(static_cast<size_t>(c.m * c.r)), v_size(v.size());
  std::vector<double> dx(static_cast<size_t>(c.m * c.k)), dx_bound(dx.size());
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t q = 0; q < c.r; ++q) {
      double sum = 0.0, size = 0.0;
      for (int64_t o = 0; o < c.n; ++o) {
        const double product = static_cast<double>(c.scaling) * static_cast<double>(dy[i * c.n + o]) *
                               static_cast<double>((*lora_b)[o * c.r + q]);
        sum += product;
        size += std::fabs(product);
      }
      v[static_cast<size_t>(i * c.r + q)] = sum;
      v_size[static_cast<size_t>(i * c.r + q)] = size;
    }
    double peak = 0.0;
    for (int64_t o = 0; o < c.n; ++o) peak = std::fmax(peak, std::fabs(static_cast<double>(dy[i * c.n + o])));
    for (int64_t j = 0; j < c.k; ++j) {
      double sum = 0.0, size = 0.0, weights = 0.0, lora_size = 0.0;
      for (int64_t o = 0; o < c.n; ++o) {
        const double wj = static_cast<double>(w[static_cast<size_t>(o * c.k + j)]);
        const double product = static_cast<double>(dy[i * c.n + o]) * wj;
        const double magnitude = static_cast<double>(sizes[static_cast<size_t>(o * c.k + j)]);
        sum += product;
        size += std::fabs(static_cast<double>(dy[i * c.n + o])) * magnitude;
        weights += magnitude;
      }
      for (int64_t q = 0; q < c.r; ++q) {
        const double a = static_cast<double>((*lora_a)[q * c.k + j]);
        sum += a * v[static_cast<size_t>(i * c.r + q)];
        lora_size += std::fabs(a) * v_size[static_cast<size_t>(i * c.r + q)];
      }
      dx[static_cast<size_t>(i * c.k + j)] = sum;
      dx_bound[static_cast<size_t>(i * c.k + j)] = share.products * size + share.peak * peak * weights +
                                                   share.lora * lora_size + share.output * std::fabs(sum) + 1e-6;
    }
  }

  for (const Isa isa : levels()) {
    std::unique_ptr<Tensor> first_dx, first_v;
    for (const int32_t threads : {1, 3}) {
      label("nf4_linear_grad_input", isa, c, threads);
      auto got_dx = std::make_unique<Tensor>(c.place, c.m * c.k, c.dtype);
      auto got_v = std::make_unique<Tensor>(c.place, c.m * c.r, c.dtype);
      const Nf4LinearGradInputArgs args{.dy = dy.buffer.bytes(),
                                        .weight = weight.view(),
                                        .lora_a = address(lora_a.get()),
                                        .lora_b = address(lora_b.get()),
                                        .v = c.r == 0 ? nullptr : got_v->buffer.bytes(),
                                        .dx = got_dx->buffer.bytes(),
                                        .m = c.m,
                                        .r = c.r,
                                        .scaling = c.scaling,
                                        .dtype = c.dtype,
                                        .lora_dtype = c.lora_dtype,
                                        .threads = threads};
      if (!check(nf4_linear_grad_input(args, isa) == Status::kOk, "status")) continue;
      for (int64_t i = 0; i < c.m * c.k; ++i) {
        const double error = std::fabs(static_cast<double>((*got_dx)[i]) - dx[static_cast<size_t>(i)]);
        if (!check(error <= dx_bound[static_cast<size_t>(i)], "dx(%lld, %lld) is %.9g, expected %.9g within %.3g",
                   static_cast<long long>(i / c.k), static_cast<long long>(i % c.k),
                   static_cast<double>((*got_dx)[i]), dx[static_cast<size_t>(i)],
                   dx_bound[static_cast<size_t>(i)])) {
          break;
        }
      }
      for (int64_t i = 0; i < c.m * c.r; ++i) {
        const double allowed = 0.5 * share.lora * v_size[static_cast<size_t>(i)] + 1e-6;
        const double error = std::fabs(static_cast<double>((*got_v)[i]) - v[static_cast<size_t>(i)]);
        if (!check(error <= allowed, "v(%lld, %lld) is %.9g, expected %.9g within %.3g",
                   static_cast<long long>(i / c.r), static_cast<long long>(i % c.r),
                   static_cast<double>((*got_v)[i]), v[static_cast<size_t>(i)], allowed)) {
          break;
        }
      }
      if (!first_dx) {
        first_dx = std::move(got_dx);
        first_v = std::move(got_v);
      } else {
        check(got_dx->buffer.equals(first_dx->buffer), "dx depends on the number of threads");
        check(got_v->buffer.equals(first_v->buffer), "v depends on the number of threads");
      }
    }
  }
}

// Shapes that cross the strips and panels of the GEMM routes, and the two that are known to break others.
constexpr Case kDirected[] = {
    {5, 123, 123, 7, 64, DType::kBFloat16, DType::kFloat32, true, true, false, 1.0f, Place::kBeforeGuard},
    {2, 24, 4304, 16, 64, DType::kBFloat16, DType::kBFloat16, true, false, false, 1.0f, Place::kBeforeGuard},
    {2, 24, 4304, 16, 64, DType::kFloat32, DType::kFloat32, false, false, false, 1.0f, Place::kAfterGuard},
    {130, 70, 600, 16, 64, DType::kBFloat16, DType::kFloat32, true, true, false, 0.5f, Place::kBeforeGuard},
    {130, 70, 600, 16, 64, DType::kBFloat16, DType::kFloat32, true, true, false, 0.5f, Place::kBeforeGuard, true},
    {200, 40, 1030, 5, 128, DType::kBFloat16, DType::kBFloat16, true, true, true, 0.5f, Place::kHeap},
    {40, 600, 640, 16, 64, DType::kBFloat16, DType::kBFloat16, true, true, false, 0.5f, Place::kBeforeGuard},
    {17, 1030, 772, 40, 64, DType::kBFloat16, DType::kFloat32, true, false, false, 0.5f, Place::kBeforeGuard},
    {70, 530, 1184, 3, 32, DType::kBFloat16, DType::kBFloat16, false, true, false, 0.5f, Place::kAfterGuard},
    {130, 70, 600, 16, 64, DType::kFloat32, DType::kFloat32, true, true, false, 0.5f, Place::kBeforeGuard},
    {130, 70, 600, 16, 64, DType::kFloat32, DType::kFloat32, true, true, false, 0.5f, Place::kBeforeGuard, true},
    {70, 300, 257, 33, 32, DType::kFloat16, DType::kFloat16, true, true, false, 0.5f, Place::kOddHeap},
    {33, 515, 96, 64, 4096, DType::kBFloat16, DType::kBFloat16, false, false, false, 2.0f, Place::kOddHeap},
    {1, 1, 8200, 1, 256, DType::kBFloat16, DType::kFloat32, true, true, false, 1.0f, Place::kBeforeGuard},
    {1, 1, 8200, 1, 256, DType::kBFloat16, DType::kFloat32, true, true, false, 1.0f, Place::kBeforeGuard, true},
    {3, 4, 0, 2, 64, DType::kFloat32, DType::kFloat32, false, true, false, 1.0f, Place::kHeap},
    {1, 4, 0, 0, 64, DType::kBFloat16, DType::kFloat32, false, true, false, 1.0f, Place::kHeap},
    {3, 4, 0, 0, 64, DType::kBFloat16, DType::kFloat32, true, true, false, 1.0f, Place::kHeap},
    {2, 0, 0, 3, 64, DType::kFloat32, DType::kFloat32, true, true, false, 1.0f, Place::kHeap},
    {3, 0, 5, 2, 64, DType::kBFloat16, DType::kBFloat16, true, false, false, 1.0f, Place::kHeap},
    {3, 0, 5, 2, 64, DType::kBFloat16, DType::kBFloat16, true, false, false, 1.0f, Place::kHeap, true},
    {4, 3, 70, 200, 64, DType::kBFloat16, DType::kFloat16, true, true, false, 1.0f, Place::kBeforeGuard},
    {18, 3, 6, 13000, 64, DType::kFloat32, DType::kFloat32, true, true, false, 1.0f, Place::kBeforeGuard},
    {18, 3, 14000, 3, 64, DType::kBFloat16, DType::kBFloat16, true, true, false, 1.0f, Place::kBeforeGuard, true},
    {18, 3, 6, 33000, 64, DType::kBFloat16, DType::kBFloat16, true, true, false, 1.0f, Place::kBeforeGuard},
};

}  // namespace

void test_linear() {
  Rng rng(7);
  for (const Case& c : kDirected) {
    linear_case(c, rng);
    if (!c.given_u) grad_input_case(c, rng);
  }
  for (int round = 0; round < 260; ++round) {
    for (const Place place : kPlaces) {
      linear_case(random_case(rng, place), rng);
      Case c = random_case(rng, place);
      c.given_u = false;
      grad_input_case(c, rng);
    }
  }
}

}  // namespace fastlora::testing
