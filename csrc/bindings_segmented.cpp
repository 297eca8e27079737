// The entry points of many adapters for Python: pools as lists of addresses, the rest as in bindings.cpp.
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "bindings.h"
#include "fastlora/segmented_lora.h"

namespace py = pybind11;

namespace fastlora {
namespace {

using Addresses = std::vector<uintptr_t>;
using Sizes = std::vector<int64_t>;

// a, b, rows, columns of b and widths by slices; the Python above has compared their lengths.
struct Table {
  Addresses a, b;
  Sizes rows, n, widths;
  int64_t capacity;
  uintptr_t entries, scaling;
  int32_t dtype;

  AdapterTable view() const {
    AdapterTable t{};
    t.slices = static_cast<int32_t>(std::min<size_t>(widths.size(), kMaxSlices));
    for (size_t j = 0; j < static_cast<size_t>(t.slices); ++j) {
      t.slice[j] = {.a = at<const void>(a.at(j)),
                    .b = at<const void>(b.at(j)),
                    .rows = rows.at(j),
                    .n = n.at(j),
                    .width = widths[j]};
    }
    t.capacity = capacity;
    t.entries = at<const int32_t>(entries);
    t.scaling = at<const float>(scaling);
    t.dtype = static_cast<DType>(dtype);
    return t;
  }
  int64_t out_features() const {
    int64_t sum = 0;
    for (const int64_t columns : n) sum += columns;
    return sum;
  }
};

Routing routing_at(uintptr_t order, uintptr_t segments, int64_t m, int64_t segment_rows) {
  return {.order = at<const int32_t>(order),
          .segments = at<const int32_t>(segments),
          .m = m,
          .segment_rows = segment_rows};
}

int32_t bind_lora_route(uintptr_t slots, bool wide, int64_t m, int64_t capacity, uintptr_t order,
                        uintptr_t segments) {
  return static_cast<int32_t>(lora_route({.slots = at<const void>(slots),
                                          .wide = wide,
                                          .m = m,
                                          .capacity = capacity,
                                          .order = at<int32_t>(order),
                                          .segments = at<int32_t>(segments)}));
}

template <auto kRun>
int32_t bind_segmented(uintptr_t x, uintptr_t y, uintptr_t u, int64_t m, int64_t k, const Table& table,
                       uintptr_t order, uintptr_t segments, int64_t segment_rows, int32_t dtype, int32_t threads,
                       int32_t isa) {
  return static_cast<int32_t>(kRun({.x = at<const void>(x),
                                    .y = at<void>(y),
                                    .u = at<void>(u),
                                    .m = m,
                                    .k = k,
                                    .n = table.out_features(),
                                    .table = table.view(),
                                    .routing = routing_at(order, segments, m, segment_rows),
                                    .dtype = static_cast<DType>(dtype),
                                    .threads = threads,
                                    .isa = static_cast<Isa>(isa)}));
}

int32_t bind_grad_pools(uintptr_t x, uintptr_t dy, uintptr_t u, uintptr_t v, const Addresses& da,
                        const Addresses& db, int64_t m, int64_t k, const Table& table, uintptr_t order,
                        uintptr_t segments, int64_t segment_rows, int32_t dtype, int32_t threads, int32_t isa) {
  SegmentedLoraGradPoolsArgs args{.x = at<const void>(x),
                                  .dy = at<const void>(dy),
                                  .u = at<const void>(u),
                                  .v = at<const void>(v),
                                  .da = {},
                                  .db = {},
                                  .m = m,
                                  .k = k,
                                  .n = table.out_features(),
                                  .table = table.view(),
                                  .routing = routing_at(order, segments, m, segment_rows),
                                  .dtype = static_cast<DType>(dtype),
                                  .threads = threads,
                                  .isa = static_cast<Isa>(isa)};
  for (size_t j = 0; j < static_cast<size_t>(args.table.slices); ++j) {
    args.da[j] = at<void>(da.at(j));
    args.db[j] = at<void>(db.at(j));
  }
  return static_cast<int32_t>(segmented_lora_grad_pools(args));
}

int32_t bind_multi_linear(uintptr_t x, uintptr_t packed, uintptr_t scales, uintptr_t nested, int64_t blocksize,
                          uintptr_t offsets, int64_t groups, uintptr_t bias, uintptr_t y, uintptr_t u, int64_t m,
                          int64_t n, int64_t k, const Table& table, uintptr_t order, uintptr_t segments,
                          int64_t segment_rows, bool batch_invariant, int32_t dtype, int32_t threads,
                          int32_t isa) {
  return static_cast<int32_t>(
      nf4_multi_lora_linear({.x = at<const void>(x),
                             .weight = weight_at(packed, scales, nested, n, k, blocksize, offsets, groups),
                             .bias = at<const void>(bias),
                             .y = at<void>(y),
                             .u = at<void>(u),
                             .m = m,
                             .table = table.view(),
                             .routing = routing_at(order, segments, m, segment_rows),
                             .dtype = static_cast<DType>(dtype),
                             .batch_invariant = batch_invariant,
                             .threads = threads,
                             .isa = static_cast<Isa>(isa)}));
}

int32_t bind_multi_grad_input(uintptr_t dy, uintptr_t packed, uintptr_t scales, uintptr_t nested,
                              int64_t blocksize, uintptr_t offsets, int64_t groups, uintptr_t dx, uintptr_t v,
                              int64_t m, int64_t n, int64_t k, const Table& table, uintptr_t order,
                              uintptr_t segments, int64_t segment_rows, bool batch_invariant, int32_t dtype,
                              int32_t threads, int32_t isa) {
  return static_cast<int32_t>(
      nf4_multi_lora_grad_input({.dy = at<const void>(dy),
                                 .weight = weight_at(packed, scales, nested, n, k, blocksize, offsets, groups),
                                 .dx = at<void>(dx),
                                 .v = at<void>(v),
                                 .m = m,
                                 .table = table.view(),
                                 .routing = routing_at(order, segments, m, segment_rows),
                                 .dtype = static_cast<DType>(dtype),
                                 .batch_invariant = batch_invariant,
                                 .threads = threads,
                                 .isa = static_cast<Isa>(isa)}));
}

}  // namespace

void bind_segmented_lora(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  py::class_<Table>(m, "AdapterTable")
      .def(py::init<Addresses, Addresses, Sizes, Sizes, Sizes, int64_t, uintptr_t, uintptr_t, int32_t>());
  m.def("lora_route", &bind_lora_route, unlocked);
  m.def("segmented_lora", &bind_segmented<segmented_lora>, unlocked);
  m.def("segmented_lora_grad_input", &bind_segmented<segmented_lora_grad_input>, unlocked);
  m.def("segmented_lora_grad_pools", &bind_grad_pools, unlocked);
  m.def("nf4_multi_lora_linear", &bind_multi_linear, unlocked);
  m.def("nf4_multi_lora_grad_input", &bind_multi_grad_input, unlocked);
}

}  // namespace fastlora
