// pybind11 over the entry points of the optimisers: raw addresses and sizes in, a status out.
#include <cstring>

#include "bindings.h"
#include "fastlora/adamw.h"

namespace py = pybind11;

namespace fastlora {
namespace {

int32_t bind_adamw_step(uintptr_t param, uintptr_t grad, uintptr_t exp_avg, uintptr_t exp_avg_sq, int64_t count,
                        int32_t dtype, int32_t grad_dtype, double decay, double weight1, double beta2,
                        double weight2, double correction2, double eps, double minus_step, int32_t threads,
                        int32_t isa) {
  const AdamwArgs args{.param = at<void>(param),
                       .grad = at<const void>(grad),
                       .exp_avg = at<float>(exp_avg),
                       .exp_avg_sq = at<float>(exp_avg_sq),
                       .count = count,
                       .dtype = static_cast<DType>(dtype),
                       .grad_dtype = static_cast<DType>(grad_dtype),
                       .step = adamw_step_of(decay, weight1, beta2, weight2, correction2, eps, minus_step),
                       .threads = threads};
  return static_cast<int32_t>(adamw(args, static_cast<Isa>(isa)));
}

int32_t bind_adamw_8bit_step(uintptr_t param, uintptr_t grad, uintptr_t exp_avg, uintptr_t exp_avg_sq,
                             uintptr_t exp_avg_scale, uintptr_t exp_avg_sq_scale, int64_t count, int32_t dtype,
                             int32_t grad_dtype, double decay, double weight1, double beta2, double weight2,
                             double correction2, double eps, double minus_step, int32_t threads, int32_t isa) {
  const Adamw8bitArgs args{.param = at<void>(param),
                           .grad = at<const void>(grad),
                           .exp_avg = at<uint8_t>(exp_avg),
                           .exp_avg_sq = at<uint8_t>(exp_avg_sq),
                           .exp_avg_scale = at<float>(exp_avg_scale),
                           .exp_avg_sq_scale = at<float>(exp_avg_sq_scale),
                           .count = count,
                           .dtype = static_cast<DType>(dtype),
                           .grad_dtype = static_cast<DType>(grad_dtype),
                           .step = adamw_step_of(decay, weight1, beta2, weight2, correction2, eps, minus_step),
                           .threads = threads};
  return static_cast<int32_t>(adamw_8bit(args, static_cast<Isa>(isa)));
}

void bind_unsigned_dynamic_map(uintptr_t out) {
  for (int i = 0; i < 256; ++i) at<float>(out)[i] = unsigned_dynamic_map()[i];
}

void bind_fill_adamw_tables(uintptr_t out) { std::memcpy(at<void>(out), &adamw_tables(), sizeof(AdamwTables)); }

}  // namespace

void bind_adamw(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("adamw", &bind_adamw_step, unlocked);
  m.def("adamw_8bit", &bind_adamw_8bit_step, unlocked);
  m.def("unsigned_dynamic_map", &bind_unsigned_dynamic_map);
  m.def("fill_adamw_tables", &bind_fill_adamw_tables);
  m.attr("adamw_tables_bytes") = sizeof(AdamwTables);
}

}  // namespace fastlora
