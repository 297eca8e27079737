// The CUDA entry points as Python functions.
#include "bindings.h"

#include <type_traits>

#include "fastlora/cuda.h"

namespace py = pybind11;

namespace fastlora {
namespace {

int32_t bind_nf4_quantize(uintptr_t weight, uintptr_t map, uintptr_t packed, uintptr_t absmax, uintptr_t codes,
                          uintptr_t nested, uintptr_t partials, uintptr_t not_finite, int32_t dtype, int64_t rows,
                          int64_t cols, int64_t blocksize, uintptr_t stream) {
  return static_cast<int32_t>(nf4_quantize_cuda({.weight = at<const void>(weight),
                                                 .dtype = static_cast<DType>(dtype),
                                                 .rows = rows,
                                                 .cols = cols,
                                                 .blocksize = blocksize,
                                                 .packed = at<uint8_t>(packed),
                                                 .absmax = at<float>(absmax),
                                                 .codes = at<uint8_t>(codes),
                                                 .nested = at<float>(nested),
                                                 .partials = at<double>(partials),
                                                 .map = at<const float>(map),
                                                 .not_finite = at<uint32_t>(not_finite),
                                                 .stream = at<void>(stream)}));
}

int32_t bind_nf4_dequantize(uintptr_t packed, uintptr_t scales, uintptr_t nested, uintptr_t map, uintptr_t out,
                            int32_t dtype, int64_t n, int64_t k, int64_t blocksize, int64_t first_row,
                            int64_t rows, int64_t first_column, int64_t columns, uintptr_t stream) {
  return static_cast<int32_t>(nf4_dequantize_cuda({.weight = weight_at(packed, scales, nested, n, k, blocksize),
                                                   .first_row = first_row,
                                                   .rows = rows,
                                                   .first_column = first_column,
                                                   .columns = columns,
                                                   .map = at<const float>(map),
                                                   .out = at<void>(out),
                                                   .dtype = static_cast<DType>(dtype),
                                                   .stream = at<void>(stream)}));
}

int32_t bind_nf4_slab(uintptr_t packed, uintptr_t scales, uintptr_t nested, uintptr_t map, uintptr_t factor,
                      uintptr_t bias, uintptr_t out, int32_t dtype, int32_t lora_dtype, int64_t n, int64_t k,
                      int64_t blocksize, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
                      int64_t out_stride, int64_t r, double scaling, bool below, uintptr_t stream) {
  return static_cast<int32_t>(nf4_slab_cuda({.weight = weight_at(packed, scales, nested, n, k, blocksize),
                                             .first_row = first_row,
                                             .rows = rows,
                                             .first_column = first_column,
                                             .columns = columns,
                                             .map = at<const float>(map),
                                             .out = at<void>(out),
                                             .out_stride = out_stride,
                                             .factor = at<const void>(factor),
                                             .bias = at<const void>(bias),
                                             .r = r,
                                             .scaling = static_cast<float>(scaling),
                                             .below = below,
                                             .dtype = static_cast<DType>(dtype),
                                             .lora_dtype = static_cast<DType>(lora_dtype),
                                             .stream = at<void>(stream)}));
}

// Both calls of an op whose scratch the caller brings take the same arguments: the one that asks for its size, and
// the one that runs.
template <auto kRun>
auto bind_nf4_linear(uintptr_t x, uintptr_t packed, uintptr_t scales, uintptr_t nested, uintptr_t map,
                     uintptr_t bias, uintptr_t lora_a, uintptr_t lora_b, uintptr_t gain, uintptr_t u, uintptr_t y,
                     uintptr_t scratch, int64_t m, int64_t n, int64_t k, int64_t r, int64_t blocksize,
                     double scaling, int32_t dtype, int32_t lora_dtype, int32_t route, uintptr_t stream) {
  const Nf4LinearCudaArgs args{.call = {.x = at<const void>(x),
                                        .weight = weight_at(packed, scales, nested, n, k, blocksize),
                                        .bias = at<const void>(bias),
                                        .lora_a = at<const void>(lora_a),
                                        .lora_b = at<const void>(lora_b),
                                        .u = at<void>(u),
                                        .y = at<void>(y),
                                        .m = m,
                                        .r = r,
                                        .scaling = static_cast<float>(scaling),
                                        .dtype = static_cast<DType>(dtype),
                                        .lora_dtype = static_cast<DType>(lora_dtype),
                                        .threads = 0,
                                        .gain = at<const float>(gain)},
                               .map = at<const float>(map),
                               .route = static_cast<CudaRoute>(route),
                               .scratch = at<void>(scratch),
                               .stream = at<void>(stream)};
  return static_cast<int64_t>(kRun(args));
}

template <auto kRun>
auto bind_nf4_linear_grad_input(uintptr_t dy, uintptr_t packed, uintptr_t scales, uintptr_t nested, uintptr_t map,
                                uintptr_t lora_a, uintptr_t lora_b, uintptr_t u, uintptr_t v, uintptr_t db,
                                uintptr_t dx, uintptr_t scratch, int64_t m, int64_t n, int64_t k, int64_t r,
                                int64_t blocksize, double scaling, int32_t dtype, int32_t lora_dtype,
                                int32_t route, uintptr_t stream) {
  const Nf4LinearGradInputCudaArgs args{.call = {.dy = at<const void>(dy),
                                                 .weight = weight_at(packed, scales, nested, n, k, blocksize),
                                                 .lora_a = at<const void>(lora_a),
                                                 .lora_b = at<const void>(lora_b),
                                                 .v = at<void>(v),
                                                 .dx = at<void>(dx),
                                                 .m = m,
                                                 .r = r,
                                                 .scaling = static_cast<float>(scaling),
                                                 .dtype = static_cast<DType>(dtype),
                                                 .lora_dtype = static_cast<DType>(lora_dtype),
                                                 .threads = 0},
                                        .u = at<const void>(u),
                                        .db = at<void>(db),
                                        .map = at<const float>(map),
                                        .route = static_cast<CudaRoute>(route),
                                        .scratch = at<void>(scratch),
                                        .stream = at<void>(stream)};
  return static_cast<int64_t>(kRun(args));
}

py::tuple bind_nf4_linear_plan(bool grad_input, int64_t m, int64_t n, int64_t k, int64_t r, int64_t blocksize,
                               int32_t dtype, int32_t route) {
  const CudaPlan plan = nf4_linear_cuda_plan(grad_input, m, n, k, r, blocksize, static_cast<DType>(dtype),
                                             static_cast<CudaRoute>(route));
  return py::make_tuple(static_cast<int32_t>(plan.route), plan.columns, plan.splits);
}

int32_t bind_lora_project(uintptr_t x, uintptr_t a, uintptr_t u, uintptr_t wide, bool ones, int64_t m, int64_t k,
                          int64_t r, int32_t dtype, int32_t a_dtype, uintptr_t stream) {
  return static_cast<int32_t>(lora_project_cuda({.x = at<const void>(x),
                                                 .a = at<const void>(a),
                                                 .u = at<void>(u),
                                                 .wide = at<void>(wide),
                                                 .ones = ones,
                                                 .m = m,
                                                 .k = k,
                                                 .r = r,
                                                 .dtype = static_cast<DType>(dtype),
                                                 .a_dtype = static_cast<DType>(a_dtype),
                                                 .stream = at<void>(stream)}));
}

template <auto kRun>
auto bind_lora_gradients(uintptr_t tall, uintptr_t narrow, uintptr_t factor, uintptr_t product, uintptr_t gram,
                         uintptr_t wide, uintptr_t scratch, int64_t m, int64_t width, int64_t r, double scaling,
                         bool rank_major, int32_t dtype, int32_t lora_dtype, uintptr_t stream) {
  const LoraGradientsCudaArgs args{.tall = at<const void>(tall),
                                   .small = at<const void>(narrow),
                                   .factor = at<const void>(factor),
                                   .product = at<void>(product),
                                   .gram = at<void>(gram),
                                   .wide = at<void>(wide),
                                   .m = m,
                                   .width = width,
                                   .r = r,
                                   .scaling = static_cast<float>(scaling),
                                   .rank_major = rank_major,
                                   .dtype = static_cast<DType>(dtype),
                                   .lora_dtype = static_cast<DType>(lora_dtype),
                                   .scratch = at<void>(scratch),
                                   .stream = at<void>(stream)};
  return static_cast<int64_t>(kRun(args));
}

int32_t bind_lora_dropout(uintptr_t x, uintptr_t seed, uintptr_t out, int64_t count, double p, int32_t dtype,
                          uintptr_t stream) {
  return static_cast<int32_t>(lora_dropout_cuda({.x = at<const void>(x),
                                                 .out = at<void>(out),
                                                 .seed = at<const int64_t>(seed),
                                                 .count = count,
                                                 .p = p,
                                                 .dtype = static_cast<DType>(dtype),
                                                 .stream = at<void>(stream)}));
}

int32_t bind_adamw_step(uintptr_t grad, uintptr_t param, uintptr_t exp_avg, uintptr_t exp_avg_sq, int64_t count,
                        int32_t dtype, int32_t grad_dtype, double decay, double weight1, double beta2,
                        double weight2, double correction2, double eps, double minus_step, uintptr_t stream) {
  return static_cast<int32_t>(
      adamw_cuda({.call = {.param = at<void>(param),
                           .grad = at<const void>(grad),
                           .exp_avg = at<float>(exp_avg),
                           .exp_avg_sq = at<float>(exp_avg_sq),
                           .count = count,
                           .dtype = static_cast<DType>(dtype),
                           .grad_dtype = static_cast<DType>(grad_dtype),
                           .step = adamw_step_of(decay, weight1, beta2, weight2, correction2, eps, minus_step),
                           .threads = 0},
                  .stream = at<void>(stream)}));
}

int32_t bind_adamw_8bit_step(uintptr_t grad, uintptr_t tables, uintptr_t param, uintptr_t exp_avg,
                             uintptr_t exp_avg_sq, uintptr_t exp_avg_scale, uintptr_t exp_avg_sq_scale,
                             int64_t count, int32_t dtype, int32_t grad_dtype, double decay, double weight1,
                             double beta2, double weight2, double correction2, double eps, double minus_step,
                             uintptr_t stream) {
  return static_cast<int32_t>(adamw_8bit_cuda(
      {.call = {.param = at<void>(param),
                .grad = at<const void>(grad),
                .exp_avg = at<uint8_t>(exp_avg),
                .exp_avg_sq = at<uint8_t>(exp_avg_sq),
                .exp_avg_scale = at<float>(exp_avg_scale),
                .exp_avg_sq_scale = at<float>(exp_avg_sq_scale),
                .count = count,
                .dtype = static_cast<DType>(dtype),
                .grad_dtype = static_cast<DType>(grad_dtype),
                .step = adamw_step_of(decay, weight1, beta2, weight2, correction2, eps, minus_step),
                .threads = 0},
       .tables = at<const AdamwTables>(tables),
       .stream = at<void>(stream)}));
}

// ---- many adapters: as many arguments as there are slices, read in turn --------------------------------------

class Arguments {
 public:
  explicit Arguments(const py::args& args) : args_(args) {}
  template <class T>
  T* at() {
    return fastlora::at<T>(next<uintptr_t>());
  }
  template <class T = int64_t>
  T next() {
    return args_[taken_++].cast<T>();
  }
  DType dtype() { return static_cast<DType>(next<int32_t>()); }

 private:
  const py::args& args_;
  size_t taken_ = 0;
};

// Addresses of kMaxSlices pools, of which those past the last slice are null.
void read_pools(Arguments& from, AdapterTable& table) {
  for (AdapterSlice& slice : table.slice) slice.a = from.at<const void>();
  for (AdapterSlice& slice : table.slice) slice.b = from.at<const void>();
}
void read_routing(Arguments& from, AdapterTable& table, Routing& routing) {
  table.entries = from.at<const int32_t>();
  table.scaling = from.at<const float>();
  routing.order = from.at<const int32_t>();
  routing.segments = from.at<const int32_t>();
}
// m, rows of the segments, capacity, slices, the pools' dtype; then rows, n and width of each slice.
void read_sizes(Arguments& from, AdapterTable& table, Routing& routing) {
  routing.m = from.next();
  routing.segment_rows = from.next();
  table.capacity = from.next();
  table.slices = from.next<int32_t>();
  table.dtype = from.dtype();
  for (int j = 0; j < table.slices && j < kMaxSlices; ++j) {
    table.slice[j].rows = from.next();
    table.slice[j].n = from.next();
    table.slice[j].width = from.next();
  }
}

template <auto kRun>
auto bind_lora_route(uintptr_t slots, uintptr_t order, uintptr_t segments, uintptr_t scratch, bool wide, int64_t m,
                     int64_t capacity, uintptr_t stream) {
  const LoraRouteCudaArgs args{.call = {.slots = at<const void>(slots),
                                        .wide = wide,
                                        .m = m,
                                        .capacity = capacity,
                                        .order = at<int32_t>(order),
                                        .segments = at<int32_t>(segments)},
                               .scratch = at<void>(scratch),
                               .stream = at<void>(stream)};
  return static_cast<int64_t>(kRun(args));
}

template <auto kRun>
auto bind_segmented_lora(const py::args& all) {
  Arguments from(all);
  SegmentedLoraCudaArgs args{};
  args.call.x = from.at<const void>();
  read_pools(from, args.call.table);
  read_routing(from, args.call.table, args.call.routing);
  args.call.y = from.at<void>();
  args.call.u = from.at<void>();
  args.scratch = from.at<void>();
  read_sizes(from, args.call.table, args.call.routing);
  args.call.m = args.call.routing.m;
  args.call.k = from.next();
  args.call.n = from.next();
  args.call.dtype = from.dtype();
  args.batch_invariant = from.next<bool>();
  args.stream = from.at<void>();
  return static_cast<int64_t>(kRun(args));
}

template <auto kRun>
auto bind_segmented_lora_grad_pools(const py::args& all) {
  Arguments from(all);
  SegmentedLoraGradPoolsCudaArgs args{};
  args.call.x = from.at<const void>();
  args.call.dy = from.at<const void>();
  args.call.u = from.at<const void>();
  args.call.v = from.at<const void>();
  read_routing(from, args.call.table, args.call.routing);
  for (void*& pool : args.call.da) pool = from.at<void>();
  for (void*& pool : args.call.db) pool = from.at<void>();
  args.scratch = from.at<void>();
  read_sizes(from, args.call.table, args.call.routing);
  args.call.m = args.call.routing.m;
  args.call.k = from.next();
  args.call.n = from.next();
  args.call.dtype = from.dtype();
  args.stream = from.at<void>();
  return static_cast<int64_t>(kRun(args));
}

// `grad`: no bias among the addresses.
template <class Args>
Args read_multi_lora(const py::args& all, bool grad) {
  Arguments from(all);
  Args args{};
  const void* x = from.at<const void>();
  auto* packed = from.at<const uint8_t>();
  auto* scales = from.at<const uint8_t>();
  auto* nested = from.at<const uint8_t>();
  args.map = from.at<const float>();
  const void* bias = grad ? nullptr : from.at<const void>();
  read_pools(from, args.call.table);
  read_routing(from, args.call.table, args.call.routing);
  void* out = from.at<void>();
  void* inner = from.at<void>();
  args.scratch = from.at<void>();
  read_sizes(from, args.call.table, args.call.routing);
  args.call.m = args.call.routing.m;
  const int64_t k = from.next(), n = from.next(), blocksize = from.next();
  args.call.weight = {
      .packed = packed, .scales = {.codes = scales, .nested = nested}, .n = n, .k = k, .blocksize = blocksize};
  args.call.dtype = from.dtype();
  args.call.batch_invariant = from.next<bool>();
  args.route = static_cast<CudaRoute>(from.next<int32_t>());
  args.stream = from.at<void>();
  if constexpr (std::is_same_v<Args, Nf4MultiLoraLinearCudaArgs>) {
    args.call.x = x;
    args.call.bias = bias;
    args.call.y = out;
    args.call.u = inner;
  } else {
    args.call.dy = x;
    args.call.dx = out;
    args.call.v = inner;
  }
  return args;
}

template <auto kRun>
auto bind_nf4_multi_lora_linear(const py::args& all) {
  return static_cast<int64_t>(kRun(read_multi_lora<Nf4MultiLoraLinearCudaArgs>(all, false)));
}

template <auto kRun>
auto bind_nf4_multi_lora_grad_input(const py::args& all) {
  return static_cast<int64_t>(kRun(read_multi_lora<Nf4MultiLoraGradInputCudaArgs>(all, true)));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("nf4_quantize", &bind_nf4_quantize);
  m.def("nf4_dequantize", &bind_nf4_dequantize);
  m.def("nf4_slab", &bind_nf4_slab);
  m.def("nf4_linear_scratch", &bind_nf4_linear<nf4_linear_cuda_scratch>);
  m.def("nf4_linear", &bind_nf4_linear<nf4_linear_cuda>);
  m.def("nf4_linear_grad_input_scratch", &bind_nf4_linear_grad_input<nf4_linear_grad_input_cuda_scratch>);
  m.def("nf4_linear_grad_input", &bind_nf4_linear_grad_input<nf4_linear_grad_input_cuda>);
  m.def("nf4_linear_plan", &bind_nf4_linear_plan);
  m.def("lora_project", &bind_lora_project);
  m.def("lora_gradients_scratch", &bind_lora_gradients<lora_gradients_cuda_scratch>);
  m.def("lora_gradients", &bind_lora_gradients<lora_gradients_cuda>);
  m.def("lora_dropout", &bind_lora_dropout);
  m.def("adamw", &bind_adamw_step);
  m.def("adamw_8bit", &bind_adamw_8bit_step);
  m.def("lora_route_scratch", &bind_lora_route<lora_route_cuda_scratch>);
  m.def("lora_route", &bind_lora_route<lora_route_cuda>);
  m.def("segmented_lora_scratch", &bind_segmented_lora<segmented_lora_cuda_scratch>);
  m.def("segmented_lora", &bind_segmented_lora<segmented_lora_cuda>);
  m.def("segmented_lora_grad_input_scratch", &bind_segmented_lora<segmented_lora_grad_input_cuda_scratch>);
  m.def("segmented_lora_grad_input", &bind_segmented_lora<segmented_lora_grad_input_cuda>);
  m.def("segmented_lora_grad_pools_scratch",
        &bind_segmented_lora_grad_pools<segmented_lora_grad_pools_cuda_scratch>);
  m.def("segmented_lora_grad_pools", &bind_segmented_lora_grad_pools<segmented_lora_grad_pools_cuda>);
  m.def("nf4_multi_lora_linear_scratch", &bind_nf4_multi_lora_linear<nf4_multi_lora_linear_cuda_scratch>);
  m.def("nf4_multi_lora_linear", &bind_nf4_multi_lora_linear<nf4_multi_lora_linear_cuda>);
  m.def("nf4_multi_lora_grad_input_scratch",
        &bind_nf4_multi_lora_grad_input<nf4_multi_lora_grad_input_cuda_scratch>);
  m.def("nf4_multi_lora_grad_input", &bind_nf4_multi_lora_grad_input<nf4_multi_lora_grad_input_cuda>);
  m.def("wide_rank_at", &wide_rank_at);
  m.def("wide_size", &wide_size);
  m.def("device_count", &cuda_device_count);
  m.def("processors", &cuda_processors);
  m.def("error", [] { return std::string(cuda_error()); });
  m.attr("quantize_partials") = kQuantizePartials;
  m.attr("most_slices") = kMaxSlices;
}

}  // namespace fastlora
