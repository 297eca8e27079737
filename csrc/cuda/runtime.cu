// What is asked of the CUDA runtime outside a launch.
#include "fastlora/cuda.h"
#include "launch.cuh"

namespace fastlora {

#ifdef __CUDACC__

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;  // no driver, or no device: none
}

const char* cuda_error() { return cudaGetErrorString(cudaGetLastError()); }

#else

int cuda_device_count() { return 1; }

const char* cuda_error() {
  static std::string fault;
  fault = emulator::take_fault();
  return fault.c_str();
}

#endif

}  // namespace fastlora
