// The kernels of many adapters under the emulator against float64 sums: every buffer of exactly its size, at even
// and at odd places; and what their main loops cost in banks and sectors.
#include <cmath>
#include <memory>
#include <vector>

#include "fastlora/cuda.h"
#include "tests/emulated_tensor.h"

namespace fastlora::testing {
namespace {

struct Case {
  int64_t m, k, n;
  std::vector<int>
      ranks;  // of the slots; row i has slot i * 7 % (slots + 1) - 1, or with `runs` one after another
  DType dtype = DType::kBFloat16, pools = DType::kBFloat16;
  Place place = Place::kHeap;
  bool runs = false;
};

void label(const char* what, const Case& c) {
  set_case("%s %s pools %s m %lld k %lld n %lld, %zu adapters, %s", what, dtype_name(c.dtype), dtype_name(c.pools),
           static_cast<long long>(c.m), static_cast<long long>(c.k), static_cast<long long>(c.n), c.ranks.size(),
           place_name(c.place));
}

struct Ints {
  Buffer buffer;
  EmulatedBuffer registered;
  Ints(Place place, int64_t count, bool writable, const char* name)
      : buffer(place, 4 * count, 4), registered(buffer.bytes(), buffer.size(), writable, name) {}
  int32_t* data() { return buffer.as<int32_t>(); }
};

struct Made {
  const Case& c;
  int64_t slots, rows, width;
  EmulatedTensor x, dy, y, dx, u, v, a, b, da, db, scaling;
  Ints entries, slot_of, order, segments;

  static int64_t rows_of(const Case& c) {
    int64_t rows = 3;
    for (const int rank : c.ranks) rows += rank;
    return rows;
  }
  static int64_t width_of(const Case& c) {
    int64_t width = 1;
    for (const int rank : c.ranks) width = rank > width ? rank : width;
    return (width + 7) / 8 * 8;
  }

  Made(const Case& made, Rng& rng)
      : c(made),
        slots(static_cast<int64_t>(made.ranks.size())),
        rows(rows_of(made)),
        width(width_of(made)),
        x(c.place, c.m * c.k, c.dtype, false, "x"),
        dy(c.place, c.m * c.n, c.dtype, false, "dy"),
        y(c.place, c.m * c.n, c.dtype, true, "y"),
        dx(c.place, c.m * c.k, c.dtype, true, "dx"),
        u(c.place, c.m * width, c.dtype, true, "u"),
        v(c.place, c.m * width, c.dtype, true, "v"),
        a(c.place, rows * c.k, c.pools, false, "a"),
        b(c.place, rows * c.n, c.pools, false, "b"),
        da(c.place, rows * c.k, c.pools, true, "da"),
        db(c.place, rows * c.n, c.pools, true, "db"),
        scaling(c.place, slots, DType::kFloat32, false, "scaling"),
        entries(c.place, 2 * slots, false, "entries"),
        slot_of(c.place, c.m, false, "slots"),
        // Made by a launch here: 8-byte pairs, at such addresses.
        order(Place::kHeap, c.m, true, "order"),
        segments(Place::kHeap, 2 * ((c.m < slots ? c.m : slots) + 1), true, "segments") {
    for (EmulatedTensor* t : {&x, &dy, &y, &dx}) t->tensor.fill_normal(rng, 1.0f);
    a.tensor.fill_normal(rng, 1.0f / std::sqrt(static_cast<float>(c.k)));
    b.tensor.fill_normal(rng, 0.2f);
    int first = 2;
    for (int64_t s = 0; s < slots; ++s) {
      const int rank = c.ranks[static_cast<size_t>(s)];
      scaling.tensor.set(s, 0.5f + 0.25f * static_cast<float>(s % 5));
      entries.data()[2 * s] = first;
      entries.data()[2 * s + 1] = rank;
      first += rank;
    }
    for (int64_t i = 0; i < c.m; ++i) slot_of.data()[i] = static_cast<int32_t>(slot(i));
  }

  int64_t slot(int64_t row) const { return c.runs ? row * slots / c.m : row * 7 % (slots + 1) - 1; }
  int rank_of(int64_t row) const { return slot(row) < 0 ? 0 : c.ranks[static_cast<size_t>(slot(row))]; }
  int64_t first_of(int64_t row) { return slot(row) < 0 ? 0 : entries.data()[2 * slot(row)]; }
  double scale_of(int64_t row) const { return slot(row) < 0 ? 0.0 : scaling.at(slot(row)); }
  AdapterTable table() {
    AdapterTable t{};
    t.slice[0] = {.a = a.data(), .b = b.data(), .rows = rows, .n = c.n, .width = width};
    t.slices = 1;
    t.capacity = slots;
    t.entries = entries.data();
    t.scaling = static_cast<const float*>(scaling.data());
    t.dtype = c.pools;
    return t;
  }
  Routing routing() {
    return {order.data(), segments.data(), c.m, static_cast<int64_t>(segments.buffer.size()) / 8};
  }
};

double rounding(DType dtype) {
  return dtype == DType::kFloat32 ? 0x1p-20 : dtype == DType::kBFloat16 ? 0x1p-7 : 0x1p-9;
}

void compare(const char* name, double got, double want, double bound, int64_t row, int64_t column) {
  check(std::fabs(got - want) <= bound + 1e-6, "%s[%lld, %lld] is %g, expected %g within %g", name,
        static_cast<long long>(row), static_cast<long long>(column), got, want, bound);
}

// u and y, or v and dx; u is compared with float64 sums, y with those over the u that was made.
void compare_products(Made& t, const EmulatedTensor& y_before, bool grad) {
  const Case& c = t.c;
  const EmulatedTensor &x = grad ? t.dy : t.x, &u = grad ? t.v : t.u, &y = grad ? t.dx : t.y;
  const EmulatedTensor &in = grad ? t.b : t.a, &out = grad ? t.a : t.b;
  const int64_t inner = grad ? c.n : c.k, outer = grad ? c.k : c.n;
  const double share = rounding(c.dtype);
  for (int64_t p = 0; p < c.m; ++p) {
    const int64_t row = t.order.data()[p], first = t.first_of(row);
    for (int64_t q = 0; q < t.width; ++q) {
      double sum = 0.0, size = 0.0;
      for (int64_t j = 0; q < t.rank_of(row) && j < inner; ++j) {
        const double product = x.at(row * inner + j) * in.at((first + q) * inner + j);
        sum += product;
        size += std::fabs(product);
      }
      const double scale = grad ? t.scale_of(row) : 1.0;
      compare(grad ? "v" : "u", u.at(p * t.width + q), scale * sum, 2 * share * scale * size, p, q);
    }
    for (int64_t o = 0; o < outer; ++o) {
      double sum = 0.0, size = 0.0;
      for (int q = 0; q < t.rank_of(row); ++q) {
        const double product = u.at(p * t.width + q) * out.at((first + q) * outer + o);
        sum += product;
        size += std::fabs(product);
      }
      const double scale = grad ? 1.0 : t.scale_of(row), before = y_before.at(row * outer + o);
      const double want = before + scale * sum;
      compare(grad ? "dx" : "y", y.at(row * outer + o), want, share * (2 * scale * size + std::fabs(want)), row,
              o);
      if (t.rank_of(row) == 0) check(y.at(row * outer + o) == before, "a row without an adapter was touched");
    }
  }
}

void compare_gradient(Made& t, bool of_b) {
  const Case& c = t.c;
  const EmulatedTensor &tall = of_b ? t.dy : t.x, &small = of_b ? t.u : t.v, &got = of_b ? t.db : t.da;
  const int64_t width = of_b ? c.n : c.k;
  std::vector<double> want(static_cast<size_t>(t.rows * width)), size(want.size());
  for (int64_t p = 0; p < c.m; ++p) {
    const int64_t row = t.order.data()[p];
    for (int q = 0; q < t.rank_of(row); ++q) {
      const double factor = small.at(p * t.width + q) * (of_b ? t.scale_of(row) : 1.0);
      for (int64_t j = 0; j < width; ++j) {
        const auto at = static_cast<size_t>((t.first_of(row) + q) * width + j);
        want[at] += factor * tall.at(row * width + j);
        size[at] += std::fabs(factor * tall.at(row * width + j));
      }
    }
  }
  for (size_t i = 0; i < want.size(); ++i) {
    compare(of_b ? "db" : "da", got.at(static_cast<int64_t>(i)), want[i],
            0x1p-18 * size[i] + rounding(c.pools) * std::fabs(want[i]), static_cast<int64_t>(i) / width,
            static_cast<int64_t>(i) % width);
  }
}

bool route_rows(Made& t) {
  LoraRouteCudaArgs args{.call = {.slots = t.slot_of.data(),
                                  .wide = false,
                                  .m = t.c.m,
                                  .capacity = t.slots,
                                  .order = t.order.data(),
                                  .segments = t.segments.data()},
                         .scratch = nullptr,
                         .stream = nullptr};
  const EmulatedScratch scratch(lora_route_cuda_scratch(args));
  args.scratch = scratch.data();
  return succeeded("lora_route", lora_route_cuda(args));
}

void segmented_case(const Case& c, Rng& rng) {
  label("segmented_lora", c);
  emulator::set_seed(rng.next());
  Made t(c, rng);
  if (!route_rows(t)) return;
  for (const bool grad : {false, true}) {
    EmulatedTensor& y = grad ? t.dx : t.y;
    EmulatedTensor before(Place::kHeap, y.tensor.count, c.dtype, false, "before");
    for (int64_t i = 0; i < y.tensor.count; ++i) before.tensor.set(i, y.tensor[i]);
    SegmentedLoraCudaArgs args{};
    args.call.x = grad ? t.dy.data() : t.x.data();
    args.call.y = y.data();
    args.call.u = grad ? t.v.data() : t.u.data();
    args.call.m = c.m;
    args.call.k = c.k;
    args.call.n = c.n;
    args.call.table = t.table();
    args.call.routing = t.routing();
    args.call.dtype = c.dtype;
    const EmulatedScratch scratch(grad ? segmented_lora_grad_input_cuda_scratch(args)
                                       : segmented_lora_cuda_scratch(args));
    args.scratch = scratch.data();
    if (!succeeded("products", grad ? segmented_lora_grad_input_cuda(args) : segmented_lora_cuda(args))) return;
    compare_products(t, before, grad);
  }
  SegmentedLoraGradPoolsCudaArgs args{};
  args.call.x = t.x.data();
  args.call.dy = t.dy.data();
  args.call.u = t.u.data();
  args.call.v = t.v.data();
  args.call.da[0] = t.da.data();
  args.call.db[0] = t.db.data();
  args.call.m = c.m;
  args.call.k = c.k;
  args.call.n = c.n;
  args.call.table = t.table();
  args.call.routing = t.routing();
  args.call.dtype = c.dtype;
  const EmulatedScratch scratch(segmented_lora_grad_pools_cuda_scratch(args));
  args.scratch = scratch.data();
  if (!succeeded("gradients", segmented_lora_grad_pools_cuda(args))) return;
  compare_gradient(t, false);
  compare_gradient(t, true);
}

void multi_case(const Case& c, CudaRoute route, Rng& rng) {
  label("nf4_multi_lora_linear", c);
  emulator::set_seed(rng.next());
  Made t(c, rng);
  if (!route_rows(t)) return;
  EmulatedWeight weight(c.place, rng, c.n, c.k, 64, true);
  const std::vector<float> dense = weight.weight.dense();
  for (const bool grad : {false, true}) {
    const int64_t inner = grad ? c.n : c.k, outer = grad ? c.k : c.n;
    EmulatedTensor base(Place::kHeap, c.m * outer, DType::kFloat32, false, "base");
    const EmulatedTensor& x = grad ? t.dy : t.x;
    EmulatedTensor& y = grad ? t.dx : t.y;
    for (int64_t i = 0; i < c.m * outer; ++i) {
      double sum = 0.0;
      for (int64_t j = 0; j < inner; ++j) {
        const int64_t row = grad ? j : i % outer, column = grad ? i % outer : j;
        sum += x.at(i / outer * inner + j) * dense[static_cast<size_t>(row * c.k + column)];
      }
      base.tensor.set(i, static_cast<float>(sum));
    }
    Status status = Status::kBadArgument;
    if (grad) {
      Nf4MultiLoraGradInputCudaArgs args{};
      args.call = {t.dy.data(), weight.weight.view(), y.data(), t.v.data(), c.m,
                   t.table(),   t.routing(),          c.dtype,  false,      0,
                   Isa::kScalar};
      args.map = nf4_dynamic_map();
      args.route = route == CudaRoute::kDecode ? CudaRoute::kTile : route;
      const EmulatedScratch scratch(nf4_multi_lora_grad_input_cuda_scratch(args));
      args.scratch = scratch.data();
      status = nf4_multi_lora_grad_input_cuda(args);
    } else {
      Nf4MultiLoraLinearCudaArgs args{};
      args.call = {t.x.data(), weight.weight.view(), nullptr, y.data(), t.u.data(), c.m,
                   t.table(),  t.routing(),          c.dtype, false,    0,          Isa::kScalar};
      args.map = nf4_dynamic_map();
      args.route = route;
      const EmulatedScratch scratch(nf4_multi_lora_linear_cuda_scratch(args));
      args.scratch = scratch.data();
      status = nf4_multi_lora_linear_cuda(args);
    }
    if (!succeeded("a product", status)) return;
    // W is rounded to the products' dtype: its share of the sum's size is what that may cost.
    const double share = rounding(c.dtype);
    for (int64_t p = 0; p < c.m; ++p) {
      const int64_t row = t.order.data()[p];
      for (int64_t o = 0; o < outer; ++o) {
        double size = 0.0, sum = base.at(row * outer + o);
        for (int64_t j = 0; j < inner; ++j) {
          const int64_t at = grad ? j * c.k + o : o * c.k + j;
          size += std::fabs(x.at(row * inner + j) * dense[static_cast<size_t>(at)]);
        }
        for (int q = 0; q < t.rank_of(row); ++q) {
          const double factor = (grad ? t.a : t.b).at((t.first_of(row) + q) * outer + o);
          const double product = (grad ? t.v : t.u).at(p * t.width + q) * factor;
          sum += product * (grad ? 1.0 : t.scale_of(row));
          size += 2 * std::fabs(product);
        }
        compare(grad ? "dx" : "y", y.at(row * outer + o), sum, share * (size + std::fabs(sum)), row, o);
      }
    }
  }
}

// Lines that pass 64 KiB at least, by 8 or 16 bytes a lane where they are of global memory: no bank meets another,
// no sector is read in part. What is left out are looks at the routing.
void check_patterns(const char* name, int64_t at_least) {
  set_case("access patterns: %s", name);
  int64_t seen = 0;
  for (const emulator::LineCount& line : emulator::take_counts()) {
    const bool global =
        line.access == emulator::Access::kGlobalLoad || line.access == emulator::Access::kGlobalStore;
    if (line.bytes < (64 << 10) || (global && line.bytes < 220 * line.instructions)) continue;
    ++seen;
    // Eight adjacent float32 results of a lane are two stores in a row.
    if (line.access == emulator::Access::kGlobalStore && line.cost == 2 * line.least) continue;
    check(line.cost == line.least, "%s:%d: %lld for %lld bytes where %lld would do", line.file.c_str(), line.line,
          static_cast<long long>(line.cost), static_cast<long long>(line.bytes),
          static_cast<long long>(line.least));
  }
  check(seen >= at_least, "only %lld lines were busy", static_cast<long long>(seen));
}

}  // namespace

void test_cuda_segmented() {
  Rng rng(37);
  emulator::set_traits({});
  emulator::take_counts();
  const Place page = Place::kAfterGuard;
  segmented_case({.m = 64, .k = 1024, .n = 1024, .ranks = {16, 32, 16, 64}, .place = page, .runs = true}, rng);
  check_patterns("few rows", 6);
  segmented_case({.m = 600, .k = 256, .n = 256, .ranks = {64, 64}, .place = page, .runs = true}, rng);
  check_patterns("many rows", 6);
  segmented_case({.m = 32,
                  .k = 1024,
                  .n = 1024,
                  .ranks = {16, 16},
                  .dtype = DType::kFloat32,
                  .pools = DType::kFloat32,
                  .place = page,
                  .runs = true},
                 rng);
  check_patterns("float32", 4);
  emulator::set_traits({.processors = 1});  // nothing is split: parts are not at whole sectors here
  emulator::take_counts();
  multi_case({.m = 64, .k = 1024, .n = 128, .ranks = {16, 32}, .place = page, .runs = true}, CudaRoute::kTile,
             rng);
  check_patterns("tiles with adapters", 4);
  emulator::set_traits({});

  for (const DType dtype : kDTypes) {
    for (const DType pools : kDTypes) {
      for (const Place place : {Place::kHeap, Place::kOddHeap, Place::kBeforeGuard}) {
        segmented_case(
            {.m = 21, .k = 72, .n = 40, .ranks = {1, 17, 0, 8}, .dtype = dtype, .pools = pools, .place = place},
            rng);
        segmented_case(
            {.m = 9, .k = 67, .n = 129, .ranks = {3, 64, 5}, .dtype = dtype, .pools = pools, .place = place}, rng);
      }
      if (dtype == DType::kFloat32) continue;
      for (const Place place : {Place::kHeap, Place::kOddHeap}) {
        multi_case(
            {.m = 21, .k = 75, .n = 40, .ranks = {1, 17, 0, 8}, .dtype = dtype, .pools = pools, .place = place},
            CudaRoute::kTile, rng);
        multi_case(
            {.m = 70, .k = 128, .n = 72, .ranks = {16, 33, 0, 8}, .dtype = dtype, .pools = pools, .place = place},
            CudaRoute::kTile, rng);
      }
      multi_case({.m = 8, .k = 192, .n = 72, .ranks = {16, 33, 0, 8, 2, 3, 4, 64}, .dtype = dtype, .pools = pools},
                 CudaRoute::kDecode, rng);
    }
  }
}

}  // namespace fastlora::testing
