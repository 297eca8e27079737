// The layer's CUDA kernels under the emulator against float64 sums over the dequantised weight: every route, small
// ragged shapes, every buffer of exactly its size; and what their main loops cost in banks and sectors.
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "fastlora/cuda.h"
#include "tests/emulated_tensor.h"

namespace fastlora::testing {
namespace {

struct Case {
  int64_t m, n, k, r, blocksize = 64;
  DType dtype = DType::kBFloat16, lora_dtype = DType::kFloat32;
  CudaRoute route = CudaRoute::kAuto;
  bool nested = true, bias = true, given = false, keep_u = false;
  Place place = Place::kHeap;
  int capability = 80;
};

const char* route_name(CudaRoute route) {
  switch (route) {
    case CudaRoute::kAuto: return "auto";
    case CudaRoute::kDense: return "dense";
    case CudaRoute::kDecode: return "decode";
    case CudaRoute::kTile: return "tile";
    case CudaRoute::kWarpgroup: return "warpgroup";
  }
  return "?";
}

void label(const char* op, const Case& c) {
  set_case("%s %s %s lora %s m %lld n %lld k %lld r %lld blocksize %lld%s%s%s%s %s sm_%d", op, route_name(c.route),
           dtype_name(c.dtype), dtype_name(c.lora_dtype), static_cast<long long>(c.m), static_cast<long long>(c.n),
           static_cast<long long>(c.k), static_cast<long long>(c.r), static_cast<long long>(c.blocksize),
           c.nested ? " nested" : "", c.bias ? " bias" : "", c.given ? " given" : "", c.keep_u ? " keep u" : "",
           place_name(c.place), c.capability);
}

// One that is there or not.
using Maybe = std::unique_ptr<EmulatedTensor>;

Maybe input(bool there, const Case& c, Rng& rng, int64_t count, DType dtype, float scale, const char* name) {
  if (!there) return nullptr;
  auto made = std::make_unique<EmulatedTensor>(c.place, count, dtype, false, name);
  made->tensor.fill_normal(rng, scale);
  return made;
}
void* address(const Maybe& tensor) { return tensor ? tensor->data() : nullptr; }

// What rounding may cost, as shares of sums of magnitudes: of the weight's products, of the low-rank term's, of
// the result.
struct Bound {
  double products, lora, output;
};
Bound bound_of(DType dtype) {
  if (dtype == DType::kFloat32) return {0x1p-20, 0x1p-20, 0x1p-22};
  return dtype == DType::kBFloat16 ? Bound{0x1p-8, 0x1p-6, 0x1p-8} : Bound{0x1p-10, 0x1p-9, 0x1p-10};
}

void compare(const char* name, const Tensor& got, const std::vector<double>& want,
             const std::vector<double>& bound, int64_t width) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < got.count; ++i) {
    const auto at = static_cast<size_t>(i);
    if (std::fabs(static_cast<double>(got[i]) - want[at]) <= bound[at] + 1e-6) continue;
    if (++wrong > 3) continue;
    check(false, "%s[%lld, %lld] is %g, expected %g within %g", name, static_cast<long long>(i / width),
          static_cast<long long>(i % width), static_cast<double>(got[i]), want[at], bound[at]);
  }
  check(wrong == 0, "%s: %lld of %lld are outside their bounds", name, static_cast<long long>(wrong),
        static_cast<long long>(got.count));
}

// One way for both directions: out (m, outer) = in (m, inner) · W, + scale · small · factor, small (m, r) = in ·
// first.
struct Reference {
  std::vector<double> small, small_bound, out, bound;
  template <class In, class W, class First, class Factor>
  Reference(const Case& c, int64_t outer, int64_t inner, In in, W w, First first, Factor factor,
            const EmulatedTensor* given) {
    const Bound share = bound_of(c.dtype);
    for (int64_t i = 0; i < c.m; ++i) {
      for (int64_t q = 0; q < c.r; ++q) {
        double sum = 0.0, size = 0.0;
        for (int64_t j = 0; j < inner && given == nullptr; ++j) {
          sum += in(i, j) * first(q, j);
          size += std::fabs(in(i, j) * first(q, j));
        }
        if (given != nullptr) sum = size = given->at(i * c.r + q);
        small.push_back(sum);
        small_bound.push_back(share.lora * std::fabs(size));
      }
      for (int64_t o = 0; o < outer; ++o) {
        double sum = 0.0, size = 0.0, lora = 0.0;
        for (int64_t j = 0; j < inner; ++j) {
          sum += in(i, j) * w(j, o);
          size += std::fabs(in(i, j) * w(j, o));
        }
        for (int64_t q = 0; q < c.r; ++q) {
          const auto at = static_cast<size_t>(i * c.r + q);
          sum += small[at] * factor(q, o);
          lora += small_bound[at] * std::fabs(factor(q, o)) + share.lora * std::fabs(small[at] * factor(q, o));
        }
        out.push_back(sum);
        bound.push_back(share.products * size + lora + share.output * std::fabs(sum));
      }
    }
  }
};

void linear_case(const Case& c, Rng& rng) {
  label("nf4_linear", c);
  emulator::set_traits({.capability = c.capability});
  emulator::set_seed(rng.next());
  EmulatedWeight weight(c.place, rng, c.n, c.k, c.blocksize, c.nested);
  const Maybe x = input(true, c, rng, c.m * c.k, c.dtype, 1.0f, "x");
  const Maybe bias = input(c.bias, c, rng, c.n, c.dtype, 1.0f, "bias");
  const Maybe lora_a = input(c.r > 0 && !c.given, c, rng, c.r * c.k, c.lora_dtype, 0.2f, "lora_a");
  const Maybe lora_b = input(c.r > 0, c, rng, c.n * c.r, c.lora_dtype, 0.2f, "lora_b");
  const Maybe given = input(c.r > 0 && c.given, c, rng, c.m * c.r, c.dtype, 1.0f, "u");
  Maybe kept;
  if (c.r > 0 && c.keep_u && !c.given)
    kept = std::make_unique<EmulatedTensor>(c.place, c.m * c.r, c.dtype, true, "u");
  EmulatedTensor y(c.place, c.m * c.n, c.dtype, true, "y");
  Nf4LinearCudaArgs args{.call = {.x = x->data(),
                                  .weight = weight.weight.view(),
                                  .bias = address(bias),
                                  .lora_a = address(lora_a),
                                  .lora_b = address(lora_b),
                                  .u = given ? given->data() : address(kept),
                                  .y = y.data(),
                                  .m = c.m,
                                  .r = c.r,
                                  .scaling = 0.375f,
                                  .dtype = c.dtype,
                                  .lora_dtype = c.lora_dtype,
                                  .threads = 1},
                         .map = nf4_dynamic_map(),
                         .route = c.route,
                         .scratch = nullptr,
                         .stream = nullptr};
  const int64_t bytes = nf4_linear_cuda_scratch(args);
  if (!check(bytes >= 0, "the route cannot take this call")) return;
  const EmulatedScratch scratch(bytes);
  args.scratch = scratch.data();
  const Status status = nf4_linear_cuda(args);
  if (!check(status == Status::kOk, "status %d: %s", static_cast<int>(status), emulator::take_fault().c_str()))
    return;

  const std::vector<float> w = weight.weight.dense();
  const Reference want(
      c, c.n, c.k, [&](int64_t i, int64_t j) { return x->at(i * c.k + j); },
      [&](int64_t j, int64_t o) { return static_cast<double>(w[static_cast<size_t>(o * c.k + j)]); },
      [&](int64_t q, int64_t j) { return lora_a->at(q * c.k + j); },
      [&](int64_t q, int64_t o) { return 0.375 * lora_b->at(o * c.r + q); }, given.get());
  std::vector<double> sums = want.out;
  for (int64_t i = 0; bias && i < c.m * c.n; ++i) sums[static_cast<size_t>(i)] += bias->at(i % c.n);
  compare("y", y.tensor, sums, want.bound, c.n);
  if (kept) compare("u", kept->tensor, want.small, want.small_bound, c.r);
}

// gram = 0.375 * tallᵀ · small, of tall (m, n): (n, r), or its transpose.
void compare_gram(const Case& c, const EmulatedTensor& tall, const EmulatedTensor& small,
                  const EmulatedTensor& gram, bool rank_major) {
  std::vector<double> want, bound;
  for (int64_t i = 0; i < c.n * c.r; ++i) {
    const int64_t column = rank_major ? i % c.n : i / c.r, q = rank_major ? i / c.n : i % c.r;
    double sum = 0.0, size = 0.0;
    for (int64_t row = 0; row < c.m; ++row) {
      const double product = 0.375 * tall.at(row * c.n + column) * small.at(row * c.r + q);
      sum += product;
      size += std::fabs(product);
    }
    want.push_back(sum);
    bound.push_back(size * 1e-6 + bound_of(c.lora_dtype).output * std::fabs(sum));
  }
  compare("gram", gram.tensor, want, bound, rank_major ? c.n : c.r);
}

void grad_input_case(const Case& c, Rng& rng) {
  label("nf4_linear_grad_input", c);
  emulator::set_traits({.capability = c.capability});
  emulator::set_seed(rng.next());
  EmulatedWeight weight(c.place, rng, c.n, c.k, c.blocksize, c.nested);
  const Maybe dy = input(true, c, rng, c.m * c.n, c.dtype, 1.0f, "dy");
  const Maybe lora_a = input(c.r > 0, c, rng, c.r * c.k, c.lora_dtype, 0.2f, "lora_a");
  const Maybe lora_b = input(c.r > 0, c, rng, c.n * c.r, c.lora_dtype, 0.2f, "lora_b");
  const Maybe u = input(c.r > 0 && c.given, c, rng, c.m * c.r, c.dtype, 1.0f, "u");
  Maybe v, db;
  if (c.r > 0) v = std::make_unique<EmulatedTensor>(c.place, c.m * c.r, c.dtype, true, "v");
  if (u) db = std::make_unique<EmulatedTensor>(c.place, c.n * c.r, c.lora_dtype, true, "db");
  EmulatedTensor dx(c.place, c.m * c.k, c.dtype, true, "dx");
  Nf4LinearGradInputCudaArgs args{.call = {.dy = dy->data(),
                                           .weight = weight.weight.view(),
                                           .lora_a = address(lora_a),
                                           .lora_b = address(lora_b),
                                           .v = address(v),
                                           .dx = dx.data(),
                                           .m = c.m,
                                           .r = c.r,
                                           .scaling = 0.375f,
                                           .dtype = c.dtype,
                                           .lora_dtype = c.lora_dtype,
                                           .threads = 1},
                                  .u = address(u),
                                  .db = address(db),
                                  .map = nf4_dynamic_map(),
                                  .route = c.route,
                                  .scratch = nullptr,
                                  .stream = nullptr};
  const int64_t bytes = nf4_linear_grad_input_cuda_scratch(args);
  if (!check(bytes >= 0, "the route cannot take this call")) return;
  const EmulatedScratch scratch(bytes);
  args.scratch = scratch.data();
  const Status status = nf4_linear_grad_input_cuda(args);
  if (!check(status == Status::kOk, "status %d: %s", static_cast<int>(status), emulator::take_fault().c_str()))
    return;

  const std::vector<float> w = weight.weight.dense();
  const Reference want(
      c, c.k, c.n, [&](int64_t i, int64_t j) { return dy->at(i * c.n + j); },
      [&](int64_t j, int64_t o) { return static_cast<double>(w[static_cast<size_t>(j * c.k + o)]); },
      [&](int64_t q, int64_t j) { return 0.375 * lora_b->at(j * c.r + q); },
      [&](int64_t q, int64_t o) { return lora_a->at(q * c.k + o); }, nullptr);
  compare("dx", dx.tensor, want.out, want.bound, c.k);
  if (v) compare("v", v->tensor, want.small, want.small_bound, c.r);
  if (db) compare_gram(c, *dy, *u, *db, false);
}

// dB and v of one pass, dA of another: n is the tall operand's width.
void thin_case(const Case& c, bool rank_major, bool product, Rng& rng) {
  label(rank_major ? "lora_grad_a" : product ? "lora_grad_b" : "gram", c);
  emulator::set_seed(rng.next());
  const Maybe tall = input(true, c, rng, c.m * c.n, c.dtype, 1.0f, "tall");
  const Maybe small = input(true, c, rng, c.m * c.r, c.dtype, 1.0f, "small");
  const Maybe factor = input(product, c, rng, c.n * c.r, c.lora_dtype, 0.2f, "factor");
  Maybe out;
  if (product) out = std::make_unique<EmulatedTensor>(c.place, c.m * c.r, c.dtype, true, "product");
  EmulatedTensor gram(c.place, c.n * c.r, c.lora_dtype, true, "gram");
  LoraGradientsCudaArgs args{.tall = tall->data(),
                             .small = small->data(),
                             .factor = address(factor),
                             .product = address(out),
                             .gram = gram.data(),
                             .wide = nullptr,
                             .m = c.m,
                             .width = c.n,
                             .r = c.r,
                             .scaling = 0.375f,
                             .rank_major = rank_major,
                             .dtype = c.dtype,
                             .lora_dtype = c.lora_dtype,
                             .scratch = nullptr,
                             .stream = nullptr};
  const EmulatedScratch scratch(lora_gradients_cuda_scratch(args));
  args.scratch = scratch.data();
  const Status status = lora_gradients_cuda(args);
  if (!check(status == Status::kOk, "status %d: %s", static_cast<int>(status), emulator::take_fault().c_str()))
    return;
  compare_gram(c, *tall, *small, gram, rank_major);
  if (!product) return;
  std::vector<double> want, bound;
  for (int64_t i = 0; i < c.m * c.r; ++i) {
    double sum = 0.0, size = 0.0;
    for (int64_t column = 0; column < c.n; ++column) {
      const double product_of = 0.375 * tall->at(i / c.r * c.n + column) * factor->at(column * c.r + i % c.r);
      sum += product_of;
      size += std::fabs(product_of);
    }
    want.push_back(sum);
    bound.push_back(bound_of(c.dtype).lora * size);
  }
  compare("product", out->tensor, want, bound, c.r);
}

// What the main loops move through shared memory meets in no bank, and what they read of global memory are full
// sectors. Lines that pass few bytes (scales, the low-rank steps, the ends of tiles) are not what the time goes
// into.
void test_patterns(Rng& rng) {
  struct Pattern {
    const char* name;
    Case c;
    bool grad;
  };
  const CudaRoute tile = CudaRoute::kTile, groups = CudaRoute::kWarpgroup;
  const Pattern patterns[] = {
      {"decode, 32 rows", {.m = 8, .n = 192, .k = 2048, .r = 0, .route = CudaRoute::kDecode}, false},
      {"decode, 16 rows", {.m = 8, .n = 64, .k = 4096, .r = 0, .route = CudaRoute::kDecode}, false},
      {"tile, 2", {.m = 16, .n = 128, .k = 1024, .r = 0, .route = tile}, false},
      {"tile, 4", {.m = 32, .n = 128, .k = 1024, .r = 0, .route = tile}, false},
      {"tile, 8", {.m = 64, .n = 128, .k = 1024, .r = 0, .route = tile}, false},
      {"tile, 12", {.m = 96, .n = 128, .k = 1024, .r = 0, .route = tile}, false},
      {"grad tile, 1", {.m = 8, .n = 1024, .k = 128, .r = 0, .route = tile}, true},
      {"grad tile, 2", {.m = 16, .n = 1024, .k = 128, .r = 0, .route = tile}, true},
      {"grad tile, 8", {.m = 64, .n = 1024, .k = 128, .r = 0, .route = tile}, true},
      {"warpgroup", {.m = 64, .n = 128, .k = 1024, .r = 0, .route = groups, .capability = 90}, false},
      {"grad warpgroup", {.m = 64, .n = 1024, .k = 128, .r = 0, .route = groups, .capability = 90}, true},
  };
  for (const Pattern& p : patterns) {
    emulator::take_counts();
    Case c = p.c;
    c.place = Place::kAfterGuard;  // buffers at whole pages, as allocators have them at whole lines
    p.grad ? grad_input_case(c, rng) : linear_case(c, rng);
    set_case("access patterns: %s", p.name);
    int64_t seen = 0;
    for (const emulator::LineCount& line : emulator::take_counts()) {
      if (line.bytes < (64 << 10)) continue;
      ++seen;
      // x of a few rows: a lane's 32 bytes are two loads, each of half of every sector; the second finds it in L1.
      const bool halves = p.c.route == CudaRoute::kDecode && line.cost == 2 * line.least &&
                          line.bytes == p.c.m * p.c.k * 2 * ((p.c.n + 31) / 32) * (p.c.n > 64 ? 1 : 2);
      // Eight adjacent float32 results of a lane are two stores in a row.
      const bool parts = line.access == emulator::Access::kGlobalStore && line.cost == 2 * line.least;
      if (halves || parts) continue;
      const bool shared =
          line.access == emulator::Access::kSharedLoad || line.access == emulator::Access::kSharedStore;
      check(line.cost == line.least, "%s:%d: %lld %s for %lld bytes where %lld would do", line.file.c_str(),
            line.line, static_cast<long long>(line.cost), shared ? "wavefronts" : "sectors",
            static_cast<long long>(line.bytes), static_cast<long long>(line.least));
    }
    check(seen >= 4, "only %lld lines were busy", static_cast<long long>(seen));
  }
}

}  // namespace

void test_cuda_linear() {
  Rng rng(29);
  test_patterns(rng);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t m : {1, 3, 8}) {
      for (const int64_t n : {7, 48, 130}) {
        linear_case({.m = m, .n = n, .k = 192, .r = m == 3 ? 0 : 16, .dtype = dtype, .route = CudaRoute::kDecode},
                    rng);
      }
      linear_case({.m = m,
                   .n = 40,
                   .k = 2176,
                   .r = 9,
                   .blocksize = 128,
                   .dtype = dtype,
                   .route = CudaRoute::kDecode,
                   .nested = false,
                   .keep_u = true},
                  rng);
    }
    for (const int64_t m : {1, 9, 20, 33, 70, 130}) {
      if (dtype == DType::kFloat16 && (m == 9 || m == 33)) continue;  // the same code but for conversions
      const Case whole{.m = m, .n = 72, .k = 320, .r = 16, .dtype = dtype, .route = CudaRoute::kTile};
      const Case odd{
          .m = m, .n = 133, .k = 123, .r = 5, .dtype = dtype, .route = CudaRoute::kTile, .place = Place::kOddHeap};
      const Case fine{.m = m,
                      .n = 1040,
                      .k = 160,
                      .r = 33,
                      .blocksize = 32,
                      .dtype = dtype,
                      .route = CudaRoute::kTile,
                      .given = true};
      for (const Case& c : {whole, odd, fine}) {
        linear_case(c, rng);
        grad_input_case(c, rng);
      }
      linear_case({.m = m,
                   .n = 33,
                   .k = 2080,
                   .r = 33,
                   .blocksize = 32,
                   .dtype = dtype,
                   .route = CudaRoute::kTile,
                   .given = true},
                  rng);
    }
    for (const int64_t m : {1, 9, 20, 70, 130, 300}) {
      if (dtype == DType::kFloat16 && (m == 9 || m == 300)) continue;
      for (const int64_t k : {64, 320, 576}) {
        linear_case({.m = m,
                     .n = m == 70 ? 300 : 133,
                     .k = k,
                     .r = k == 320 ? 70 : 16,
                     .dtype = dtype,
                     .route = CudaRoute::kWarpgroup,
                     .keep_u = k == 64,
                     .capability = 90},
                    rng);
        grad_input_case({.m = m,
                         .n = k,
                         .k = m == 70 ? 320 : 192,
                         .r = k == 320 ? 70 : 16,
                         .dtype = dtype,
                         .route = CudaRoute::kWarpgroup,
                         .given = k == 64,
                         .capability = 90},
                        rng);
      }
      linear_case({.m = m,
                   .n = 72,
                   .k = 160,
                   .r = 5,
                   .blocksize = 32,
                   .dtype = dtype,
                   .route = CudaRoute::kWarpgroup,
                   .nested = false,
                   .given = true,
                   .capability = 90},
                  rng);
      grad_input_case({.m = m,
                       .n = 1544,
                       .k = 160,
                       .r = 5,
                       .blocksize = 32,
                       .dtype = dtype,
                       .route = CudaRoute::kWarpgroup,
                       .nested = false,
                       .capability = 90},
                      rng);
      linear_case({.m = m,
                   .n = 16,
                   .k = 1536,
                   .r = 0,
                   .blocksize = 512,
                   .dtype = dtype,
                   .route = CudaRoute::kWarpgroup,
                   .bias = false,
                   .capability = 90},
                  rng);
    }
    for (const int64_t r : {1, 16, 24, 40, 70}) {
      for (const int64_t m : {1, 70, 200}) {
        const Case c{.m = m,
                     .n = r == 1 ? 77 : 600,
                     .k = 0,
                     .r = r,
                     .dtype = dtype,
                     .lora_dtype = m == 70 ? dtype : DType::kFloat32,
                     .place = m == 1 ? Place::kOddHeap : Place::kHeap};
        thin_case(c, false, true, rng);
        thin_case(c, true, false, rng);
      }
    }
  }
}

}  // namespace fastlora::testing
