// The CUDA entry points as Python functions.
#include "bindings.h"

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
                            int32_t dtype, int64_t n, int64_t k, int64_t blocksize, uintptr_t stream) {
  return static_cast<int32_t>(nf4_dequantize_cuda({.weight = weight_at(packed, scales, nested, n, k, blocksize),
                                                   .map = at<const float>(map),
                                                   .out = at<void>(out),
                                                   .dtype = static_cast<DType>(dtype),
                                                   .stream = at<void>(stream)}));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("nf4_quantize", &bind_nf4_quantize);
  m.def("nf4_dequantize", &bind_nf4_dequantize);
  m.def("device_count", &cuda_device_count);
  m.def("error", [] { return std::string(cuda_error()); });
  m.attr("quantize_partials") = kQuantizePartials;
}

}  // namespace fastlora
