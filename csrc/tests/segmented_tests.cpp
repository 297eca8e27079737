// Many adapters in one batch against float64 sums row by row: every level, one and three threads (the same bits),
// random small tables, every placement of the buffers; and what must be refused before anything is written.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "fastlora/cpu.h"
#include "fastlora/segmented_lora.h"
#include "tests/buffer.h"
#include "tests/tests.h"

namespace fastlora::testing {
namespace {

constexpr int64_t kM[] = {0, 1, 2, 5, 11, 16, 30, 67, 150};
constexpr int64_t kSizes[] = {1, 2, 7, 16, 31, 33, 64, 97, 130, 257};
constexpr int64_t kRanks[] = {0, 1, 3, 8, 16, 17, 33};

struct Tolerance {
  double narrow, sum, output;
};
Tolerance tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return {4e-6, 8e-6, 1e-6};
    case DType::kBFloat16: return {0x1p-7, 0x1p-6, 0x1p-8};
    case DType::kFloat16: return {0x1p-9, 0x1p-8, 0x1p-10};
  }
  return {};
}

double value(const Tensor& t, int64_t i) { return static_cast<double>(t[i]); }

// A table of one or two slices over random slots, and what the entry points read and write.
struct Batch {
  int64_t m, k, n, capacity, slices, narrow = 0;
  DType dtype, pools;
  Place place;
  std::vector<int32_t> slots, order, segments, entries;
  std::vector<float> scaling;
  std::vector<std::unique_ptr<Tensor>> a, b;
  std::vector<int64_t> columns, widths, at;  // of a slice: out_features, columns of u, its first
  std::unique_ptr<Tensor> x_rows, dy_rows;

  Batch(Rng& rng, Place where, DType type, int64_t rows)
      : m(rows),
        k(rng.pick(kSizes)),
        n(0),
        capacity(1 + rng.below(6)),
        slices(1 + rng.below(2)),
        dtype(type),
        pools(rng.coin() ? type : rng.pick(kDTypes)),
        place(where) {
    for (int64_t j = 0; j < slices; ++j) add_slice(rng);
    for (int64_t i = 0; i < m; ++i) slots.push_back(static_cast<int32_t>(rng.below(capacity + 1) - 1));
    order.resize(static_cast<size_t>(m));
    segments.resize(static_cast<size_t>(2 * (std::min(m, capacity) + 1)));
    x_rows = std::make_unique<Tensor>(where, m * k, type);
    dy_rows = std::make_unique<Tensor>(where, m * n, type);
    x_rows->fill_normal(rng, 1.0f);
    dy_rows->fill_normal(rng, 1.0f);
  }
  Tensor& x() const { return *x_rows; }
  Tensor& dy() const { return *dy_rows; }
  void add_slice(Rng& rng) {
    columns.push_back(rng.pick(kSizes));
    int64_t first = rng.below(3), widest = 0;
    for (int64_t s = 0; s < capacity; ++s) {
      const int64_t rank = rng.pick(kRanks);
      entries.push_back(static_cast<int32_t>(first));
      entries.push_back(static_cast<int32_t>(rank));
      scaling.push_back(0.25f + 0.25f * static_cast<float>(rng.below(6)));
      first += rank;
      widest = std::max(widest, rank);
    }
    a.push_back(std::make_unique<Tensor>(place, first * k, pools));
    b.push_back(std::make_unique<Tensor>(place, first * columns.back(), pools));
    a.back()->fill_normal(rng, 0.2f);
    b.back()->fill_normal(rng, 0.2f);
    widths.push_back(widest + rng.below(2));
    at.push_back(narrow);
    narrow += widths.back();
    n += columns.back();
  }

  AdapterTable table() const {
    AdapterTable t{};
    t.slices = static_cast<int32_t>(slices);
    for (size_t j = 0; j < static_cast<size_t>(slices); ++j) {
      t.slice[j] = {.a = a[j]->buffer.bytes(),
                    .b = b[j]->buffer.bytes(),
                    .rows = a[j]->count / k,
                    .n = columns[j],
                    .width = widths[j]};
    }
    t.capacity = capacity;
    t.entries = entries.data();
    t.scaling = scaling.data();
    t.dtype = pools;
    return t;
  }
  Routing routing() const { return {order.data(), segments.data(), m, static_cast<int64_t>(segments.size() / 2)}; }
  int64_t first(int64_t j, int64_t s) const { return entries[static_cast<size_t>(2 * (j * capacity + s))]; }
  int64_t rank(int64_t j, int64_t s) const { return entries[static_cast<size_t>(2 * (j * capacity + s) + 1)]; }
  double scale(int64_t j, int64_t s) const {
    return static_cast<double>(scaling[static_cast<size_t>(j * capacity + s)]);
  }
};

void check_route(Batch& t) {
  set_case("lora_route m %lld capacity %lld", static_cast<long long>(t.m), static_cast<long long>(t.capacity));
  const LoraRouteArgs args{.slots = t.slots.data(),
                           .wide = false,
                           .m = t.m,
                           .capacity = t.capacity,
                           .order = t.order.data(),
                           .segments = t.segments.data()};
  check(lora_route(args) == Status::kOk, "status");
  std::vector<int32_t> rows(static_cast<size_t>(t.m));
  for (int64_t i = 0; i < t.m; ++i) rows[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  const auto key = [&](int32_t row) { return static_cast<uint32_t>(t.slots[static_cast<size_t>(row)]); };
  std::stable_sort(rows.begin(), rows.end(), [&](int32_t i, int32_t j) { return key(i) < key(j); });
  check(rows == t.order, "order is not the stable one");
  if (t.m == 0) return;
  auto bad = args;
  std::vector<int32_t> slots = t.slots;
  slots.back() = static_cast<int32_t>(t.capacity);
  bad.slots = slots.data();
  check(lora_route(bad) == Status::kBadArgument, "a slot past the last was taken");
}

// Float64: what a direction's u (v) and its term are, and the magnitudes that bound them.
struct Expected {
  std::vector<double> narrow, narrow_size, sum, size;
};
Expected expect(const Batch& t, bool forward) {
  const int64_t out = forward ? t.n : t.k, in = forward ? t.k : t.n;
  Expected e;
  e.narrow.assign(static_cast<size_t>(t.m * t.narrow), 0.0);
  e.narrow_size = e.narrow;
  e.sum.assign(static_cast<size_t>(t.m * out), 0.0);
  e.size = e.sum;
  for (int64_t p = 0; p < t.m; ++p) {
    const int64_t row = t.order[static_cast<size_t>(p)], slot = t.slots[static_cast<size_t>(row)];
    if (slot < 0) continue;
    int64_t column = 0;
    for (size_t j = 0; j < static_cast<size_t>(t.slices); column += t.columns[j], ++j) {
      const auto slice = static_cast<int64_t>(j);
      const int64_t cols = t.columns[j];
      const double scale = t.scale(slice, slot);
      for (int64_t q = 0; q < t.rank(slice, slot); ++q) {
        const int64_t pool = t.first(slice, slot) + q;
        double sum = 0.0, size = 0.0;
        for (int64_t c = 0; c < (forward ? t.k : cols); ++c) {
          const double w = forward ? value(*t.a[j], pool * t.k + c) : scale * value(*t.b[j], pool * cols + c);
          const double v = value(forward ? t.x() : t.dy(), row * in + (forward ? c : column + c));
          sum += w * v;
          size += std::fabs(w * v);
        }
        const auto narrow = static_cast<size_t>(p * t.narrow + t.at[j] + q);
        e.narrow[narrow] = sum;
        e.narrow_size[narrow] = size;
        for (int64_t c = 0; c < (forward ? cols : t.k); ++c) {
          const double w = forward ? scale * value(*t.b[j], pool * cols + c) : value(*t.a[j], pool * t.k + c);
          const auto at = static_cast<size_t>(row * out + (forward ? column + c : c));
          e.sum[at] += w * sum;
          e.size[at] += std::fabs(w) * size;
        }
      }
    }
  }
  return e;
}

void compare(const char* name, const Tensor& got, const std::vector<double>& want,
             const std::vector<double>& bound) {
  for (int64_t i = 0; i < got.count; ++i) {
    const auto at = static_cast<size_t>(i);
    if (!check(std::fabs(value(got, i) - want[at]) <= bound[at] + 1e-6,
               "%s[%lld] is %.9g, expected %.9g within %.3g", name, static_cast<long long>(i), value(got, i),
               want[at], bound[at])) {
      return;
    }
  }
}

// One direction, alone (`weight` null) and in the layer.
void check_direction(const Batch& t, bool forward, const Weight* weight, Rng& rng) {
  const int64_t out = forward ? t.n : t.k;
  const Expected e = expect(t, forward);
  const Tolerance share = tolerance_of(t.dtype);
  Tensor base(t.place, t.m * out, t.dtype);
  base.fill_normal(rng, 1.0f);
  std::vector<double> want(e.sum), bound(e.sum.size()), narrow_bound(e.narrow.size());
  const std::vector<float> dense = weight == nullptr ? std::vector<float>() : weight->dense();
  for (int64_t i = 0; i < t.m; ++i) {
    for (int64_t o = 0; o < out; ++o) {
      const auto at = static_cast<size_t>(i * out + o);
      double sum = 0.0, size = 0.0, weights = 0.0, peak = 0.0;
      for (int64_t c = 0; weight != nullptr && c < (forward ? t.k : t.n); ++c) {
        const double w = static_cast<double>(dense[static_cast<size_t>(forward ? o * t.k + c : c * t.k + o)]);
        const double v = forward ? value(t.x(), i * t.k + c) : value(t.dy(), i * t.n + c);
        sum += w * v;
        size += std::fabs(w * v);
        weights += std::fabs(w);
        peak = std::fmax(peak, std::fabs(v));
      }
      if (weight == nullptr) sum = value(base, i * out + o);
      want[at] += sum;
      const bool wide = t.dtype == DType::kFloat32;
      bound[at] = share.sum * e.size[at] + share.output * std::fabs(want[at]) + (wide ? 4e-6 : 0x1p-8) * size +
                  (wide ? 0.0 : 0x1p-14) * weights * peak;
    }
  }
  for (size_t i = 0; i < narrow_bound.size(); ++i) narrow_bound[i] = share.narrow * e.narrow_size[i];
  for (const Isa isa : levels()) {
    std::unique_ptr<Tensor> first_y, first_u;
    for (const bool batch_invariant : {false, true}) {
      if (weight == nullptr && batch_invariant) continue;
      first_y.reset();
      for (const int32_t threads : {1, 3}) {
        set_case("many adapters, %s%s %s pools %s m %lld k %lld n %lld slices %lld%s threads %d %s %s",
                 weight == nullptr ? "" : "layer, ", forward ? "forward" : "backward", dtype_name(t.dtype),
                 dtype_name(t.pools), static_cast<long long>(t.m), static_cast<long long>(t.k),
                 static_cast<long long>(t.n), static_cast<long long>(t.slices),
                 batch_invariant ? " invariant" : "", threads, isa_name(isa), place_name(t.place));
        auto y = std::make_unique<Tensor>(t.place, t.m * out, t.dtype);
        auto u = std::make_unique<Tensor>(t.place, t.m * t.narrow, t.dtype);
        if (weight == nullptr && y->buffer.size() > 0)
          memcpy(y->buffer.bytes(), base.buffer.bytes(), y->buffer.size());
        Status status;
        if (weight == nullptr) {
          const SegmentedLoraArgs args{.x = (forward ? t.x() : t.dy()).buffer.bytes(),
                                       .y = y->buffer.bytes(),
                                       .u = u->buffer.bytes(),
                                       .m = t.m,
                                       .k = t.k,
                                       .n = t.n,
                                       .table = t.table(),
                                       .routing = t.routing(),
                                       .dtype = t.dtype,
                                       .threads = threads,
                                       .isa = isa};
          status = forward ? segmented_lora(args) : segmented_lora_grad_input(args);
        } else if (forward) {
          status = nf4_multi_lora_linear({.x = t.x().buffer.bytes(),
                                          .weight = weight->view(),
                                          .bias = nullptr,
                                          .y = y->buffer.bytes(),
                                          .u = u->buffer.bytes(),
                                          .m = t.m,
                                          .table = t.table(),
                                          .routing = t.routing(),
                                          .dtype = t.dtype,
                                          .batch_invariant = batch_invariant,
                                          .threads = threads,
                                          .isa = isa});
        } else {
          status = nf4_multi_lora_grad_input({.dy = t.dy().buffer.bytes(),
                                              .weight = weight->view(),
                                              .dx = y->buffer.bytes(),
                                              .v = u->buffer.bytes(),
                                              .m = t.m,
                                              .table = t.table(),
                                              .routing = t.routing(),
                                              .dtype = t.dtype,
                                              .batch_invariant = batch_invariant,
                                              .threads = threads,
                                              .isa = isa});
        }
        if (!check(status == Status::kOk, "status %d", static_cast<int>(status))) continue;
        compare(forward ? "y" : "dx", *y, want, bound);
        compare(forward ? "u" : "v", *u, e.narrow, narrow_bound);
        if (!first_y) {
          first_y = std::move(y);
          first_u = std::move(u);
        } else {
          check(y->buffer.equals(first_y->buffer), "the result depends on the number of threads");
          check(u->buffer.equals(first_u->buffer), "u depends on the number of threads");
        }
      }
    }
  }
}

void check_grad_pools(const Batch& t, Rng& rng) {
  Tensor u(t.place, t.m * t.narrow, t.dtype), v(t.place, t.m * t.narrow, t.dtype);
  u.fill_normal(rng, 1.0f);
  v.fill_normal(rng, 1.0f);
  for (const Isa isa : levels()) {
    std::vector<std::unique_ptr<Tensor>> first;
    for (const int32_t threads : {1, 3}) {
      set_case("gradients of the pools %s pools %s m %lld k %lld n %lld threads %d %s %s", dtype_name(t.dtype),
               dtype_name(t.pools), static_cast<long long>(t.m), static_cast<long long>(t.k),
               static_cast<long long>(t.n), threads, isa_name(isa), place_name(t.place));
      std::vector<std::unique_ptr<Tensor>> got;
      SegmentedLoraGradPoolsArgs args{.x = t.x().buffer.bytes(),
                                      .dy = t.dy().buffer.bytes(),
                                      .u = u.buffer.bytes(),
                                      .v = v.buffer.bytes(),
                                      .da = {},
                                      .db = {},
                                      .m = t.m,
                                      .k = t.k,
                                      .n = t.n,
                                      .table = t.table(),
                                      .routing = t.routing(),
                                      .dtype = t.dtype,
                                      .threads = threads,
                                      .isa = isa};
      for (size_t j = 0; j < static_cast<size_t>(t.slices); ++j) {
        got.push_back(std::make_unique<Tensor>(t.place, t.a[j]->count, t.pools));
        args.da[j] = got.back()->buffer.bytes();
        got.push_back(std::make_unique<Tensor>(t.place, t.b[j]->count, t.pools));
        args.db[j] = got.back()->buffer.bytes();
      }
      if (!check(segmented_lora_grad_pools(args) == Status::kOk, "status")) continue;
      const double share = tolerance_of(t.pools).output + 8e-6;
      int64_t column = 0;
      for (size_t j = 0; j < static_cast<size_t>(t.slices); column += t.columns[j], ++j) {
        for (const bool side_a : {true, false}) {
          const Tensor& grad = *got[2 * j + (side_a ? 0 : 1)];
          const int64_t cols = side_a ? t.k : t.columns[j];
          std::vector<double> want(static_cast<size_t>(grad.count), 0.0), size(want);
          for (int64_t p = 0; p < t.m; ++p) {
            const int64_t row = t.order[static_cast<size_t>(p)], slot = t.slots[static_cast<size_t>(row)];
            if (slot < 0) continue;
            const auto slice = static_cast<int64_t>(j);
            for (int64_t q = 0; q < t.rank(slice, slot); ++q) {
              const double weight = side_a ? value(v, p * t.narrow + t.at[j] + q)
                                           : t.scale(slice, slot) * value(u, p * t.narrow + t.at[j] + q);
              for (int64_t c = 0; c < cols; ++c) {
                const double other = side_a ? value(t.x(), row * t.k + c) : value(t.dy(), row * t.n + column + c);
                const auto at = static_cast<size_t>((t.first(slice, slot) + q) * cols + c);
                want[at] += weight * other;
                size[at] += std::fabs(weight * other);
              }
            }
          }
          for (double& s : size) s *= share;
          compare(side_a ? "da" : "db", grad, want, size);
        }
      }
      if (first.empty()) {
        first = std::move(got);
      } else {
        for (size_t i = 0; i < got.size(); ++i) {
          check(got[i]->buffer.equals(first[i]->buffer), "a gradient depends on the number of threads");
        }
      }
    }
  }
}

// What a table or a routing may not say; y and u stay as they were.
void check_refusals(Batch& t) {
  const auto refused = [&](const char* what) {
    set_case("refusals");
    Tensor y(t.place, t.m * t.n, t.dtype), u(t.place, t.m * t.narrow, t.dtype);
    y.buffer.fill_bytes(0x3c);
    u.buffer.fill_bytes(0x3c);
    const SegmentedLoraArgs args{.x = t.x().buffer.bytes(),
                                 .y = y.buffer.bytes(),
                                 .u = u.buffer.bytes(),
                                 .m = t.m,
                                 .k = t.k,
                                 .n = t.n,
                                 .table = t.table(),
                                 .routing = t.routing(),
                                 .dtype = t.dtype,
                                 .threads = 1,
                                 .isa = best_isa()};
    check(segmented_lora(args) == Status::kBadArgument, "%s was taken", what);
    const auto untouched = [](const Buffer& buffer) {
      return std::all_of(buffer.bytes(), buffer.bytes() + buffer.size(),
                         [](uint8_t byte) { return byte == 0x3c; });
    };
    check(untouched(y.buffer) && untouched(u.buffer), "%s was refused after writing", what);
  };
  const auto with = [&](int32_t& place, int64_t wrong, const char* what) {
    const int32_t right = place;
    place = static_cast<int32_t>(wrong);
    refused(what);
    place = right;
  };
  with(t.entries[1], t.widths[0] + 1, "a rank above the width");
  with(t.entries[1], -1, "a negative rank");
  t.entries[1] = std::max(t.entries[1], 1);
  if (t.widths[0] > 0 && t.a[0]->count > 0) {
    with(t.entries[0], t.a[0]->count / t.k, "an entry past its pool");
    with(t.entries[0], -1, "an entry before its pool");
  }
  with(t.order[0], t.m, "a row past the last");
  with(t.order[0], -1, "a negative row");
  with(t.order[0], t.order[1], "a row twice");
  with(t.segments[0], t.capacity, "a slot past the last");
  with(t.segments[1], 1, "rows before the first segment");
  with(t.segments.back(), t.m + 1, "a last segment past the rows");
}

}  // namespace

void test_segmented() {
  Rng rng(11);
  for (int round = 0; round < 40; ++round) {
    for (const Place place : kPlaces) {
      const DType dtype = rng.pick(kDTypes);
      Batch t(rng, place, dtype, rng.pick(kM));
      check_route(t);
      const Weight weight(place, rng, t.n, t.k, rng.coin() ? 64 : 128, rng.coin());
      for (const bool forward : {true, false}) {
        check_direction(t, forward, nullptr, rng);
        check_direction(t, forward, &weight, rng);
      }
      check_grad_pools(t, rng);
      if (t.m > 1) check_refusals(t);
    }
  }
}

}  // namespace fastlora::testing
