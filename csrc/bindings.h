// What the files that bind entry points to Python share: addresses as Python has them, and the CUDA half.
#pragma once

#include <pybind11/pybind11.h>

#include "fastlora/adamw.h"
#include "fastlora/nf4.h"

namespace fastlora {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Nf4Weight weight_at(uintptr_t packed, uintptr_t scales, uintptr_t nested, int64_t n, int64_t k,
                           int64_t blocksize, uintptr_t offsets = 0, int64_t groups = 0) {
  return {.packed = at<const uint8_t>(packed),
          .scales = {.codes = at<const uint8_t>(scales), .nested = at<const uint8_t>(nested)},
          .n = n,
          .k = k,
          .blocksize = blocksize,
          .offsets = at<const float>(offsets),
          .groups = groups};
}

// What is the same for every element of a step of AdamW comes as seven numbers.
inline AdamwStep adamw_step_of(double decay, double weight1, double beta2, double weight2, double correction2,
                               double eps, double minus_step) {
  return {.decay = static_cast<float>(decay),
          .weight1 = static_cast<float>(weight1),
          .beta2 = static_cast<float>(beta2),
          .weight2 = static_cast<float>(weight2),
          .correction2 = static_cast<float>(correction2),
          .eps = static_cast<float>(eps),
          .minus_step = static_cast<float>(minus_step)};
}

// For the module _C: the entry points of segmented_lora.h.
void bind_segmented_lora(pybind11::module_& m);

// For the module _C: the entry points of adamw.h.
void bind_adamw(pybind11::module_& m);

// For the module _C of a build with CUDA and for the emulator's: the entry points of cuda.h; addresses, sizes and
// a stream in, a status (or a size) out.
void bind_cuda(pybind11::module_& m);

}  // namespace fastlora
