// The CUDA entry points as Python functions, for the module _C of a build with CUDA and for the emulator's module.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlora {

// nf4_quantize, nf4_dequantize, device_count, error: addresses, sizes and a stream in, a status out.
void bind_cuda(pybind11::module_& m);

}  // namespace fastlora
