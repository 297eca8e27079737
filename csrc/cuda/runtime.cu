// What is asked of the CUDA runtime outside a launch.
#include "fastlora/cuda.h"
#include "launch.cuh"

#ifdef __CUDACC__
#include <mutex>
#endif

namespace fastlora::cuda {

#ifdef __CUDACC__

const DeviceTraits* device_traits() {
  constexpr int kDevices = 64;
  static DeviceTraits known[kDevices];
  static std::atomic<bool> asked[kDevices];
  static std::mutex asking;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return nullptr;
  if (!asked[device].load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> guard(asking);
    int major = 0, minor = 0;
    DeviceTraits traits{};
    const auto ask = [device](int* value, cudaDeviceAttr what) {
      return cudaDeviceGetAttribute(value, what, device) == cudaSuccess;
    };
    if (!ask(&major, cudaDevAttrComputeCapabilityMajor) || !ask(&minor, cudaDevAttrComputeCapabilityMinor) ||
        !ask(&traits.processors, cudaDevAttrMultiProcessorCount) ||
        !ask(&traits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin)) {
      return nullptr;
    }
    traits.capability = 10 * major + minor;
    traits.block_clocks = 2500;  // not yet measured
    known[device] = traits;
    asked[device].store(true, std::memory_order_release);
  }
  return &known[device];
}

#else

const DeviceTraits* device_traits() {
  static DeviceTraits traits;
  const emulator::Traits& t = emulator::traits();
  traits = {t.capability, t.processors, t.shared_bytes, t.block_clocks};
  return &traits;
}

#endif

}  // namespace fastlora::cuda

namespace fastlora {

int cuda_processors() {
  const cuda::DeviceTraits* traits = cuda::device_traits();
  return traits == nullptr ? 0 : traits->processors;
}

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
