// The one way to start a kernel: on the caller's stream, with errors as a Status. Never synchronises.
#pragma once

#include <cstdint>

#include "fastlora/status.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "../emulator/launch.h"
#endif

namespace fastlora::cuda {

struct LaunchShape {
  int blocks;
  int threads;
  int shared_bytes = 0;
  bool cooperative = false;  // every block resident at once, so that sync_grid may be called
};

#ifdef __CUDACC__

// A kernel takes one struct by value, however many its arguments are.
template <class Args>
Status launch(const char*, void (*kernel)(Args), const LaunchShape& shape, const Args& args, void* stream) {
  if (shape.shared_bytes > 48 << 10) {
    const cudaError_t raised = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (raised != cudaSuccess) return Status::kDeviceError;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args) == cudaSuccess ? Status::kOk : Status::kDeviceError;
}

// How many blocks the current device holds at once; 0 after an error.
template <class Args>
int resident_blocks(void (*kernel)(Args), int threads, int shared_bytes) {
  int device = 0, processors = 0, blocks = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared_bytes)) !=
          cudaSuccess) {
    return 0;
  }
  return processors * blocks;
}

#else

template <class Args>
Status launch(const char* name, void (*kernel)(Args), const LaunchShape& shape, const Args& args, void*) {
  const int grid[3] = {shape.blocks, 1, 1};
  const bool ran =
      emulator::launch(name, grid, shape.threads, shape.shared_bytes, shape.cooperative, [&] { kernel(args); });
  return ran ? Status::kOk : Status::kDeviceError;
}

// Few, so that small tests have blocks that walk on and blocks that meet.
template <class Args>
int resident_blocks(void (*)(Args), int, int) {
  return 3;
}

#endif

}  // namespace fastlora::cuda

// The kernel's name comes with it, for the emulator's reports.
#define FASTLORA_LAUNCH(kernel, shape, args, stream) ::fastlora::cuda::launch(#kernel, kernel, shape, args, stream)
