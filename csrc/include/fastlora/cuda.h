// The CUDA entry points: what the CPU's take, with addresses on the device, and a stream. None synchronises, none
// allocates: scratch comes from the caller. Launches go to the current device.
#pragma once

#include <cstdint>

#include "fastlora/nf4.h"

namespace fastlora {

// Of a build with CUDA, on a machine with a driver and a device.
int cuda_device_count();
// What the last kDeviceError was.
const char* cuda_error();

// Scratch of a double quantisation: two float64 a block of the launch.
inline constexpr int64_t kQuantizePartials = 4096;

struct Nf4QuantizeCudaArgs {
  const void* weight;  // (rows, cols), dtype
  DType dtype;
  int64_t rows, cols, blocksize;
  uint8_t* packed;   // (rows, ceil(cols / 2)) out
  float* absmax;     // (ceil(rows*cols / blocksize)) out
  uint8_t* codes;    // as many, out; nullptr: absmax is not quantised
  float* nested;     // (1 + ceil(blocks / 256)) out, with codes
  double* partials;  // (kQuantizePartials, 2) scratch, with codes
  const float* map;  // (256) the dynamic map, with codes
  uint32_t*
      not_finite;  // (1) zero before; 1 after if any weight is NaN or Inf (the other outputs are unspecified)
  void* stream;    // cudaStream_t
};
// The same bits as nf4_quantize and nf4_double_quantize, in one launch.
Status nf4_quantize_cuda(const Nf4QuantizeCudaArgs& args);

struct Nf4DequantizeCudaArgs {
  Nf4Weight weight;
  const float* map;  // (256) the dynamic map, with nested scales
  void* out;         // (n, k), dtype
  DType dtype;
  void* stream;
};
Status nf4_dequantize_cuda(const Nf4DequantizeCudaArgs& args);

}  // namespace fastlora
