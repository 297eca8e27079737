// The one way to start a kernel: on the caller's stream, with errors as a Status. Never synchronises.
#pragma once

#include <cstdint>

#include "fastlora/status.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <atomic>
#else
#include "../emulator/launch.h"
#endif

namespace fastlora::cuda {

struct LaunchShape {
  int blocks;  // along the grid's first axis; and along the others:
  int blocks_y = 1, blocks_z = 1;
  int threads;
  int shared_bytes = 0;
  bool cooperative = false;  // every block resident at once, so that sync_grid may be called
  bool overlaps = false;     // may begin before the launch before it ends: see wait_for_previous_launch
};

// What a launch is cut to.
struct DeviceTraits {
  int capability;    // 10 * major + minor: 80, 90, ...
  int processors;    // SMs
  int shared_bytes;  // that one block may have
  int block_clocks;  // that a block takes before its first product and after its last; and a launch that adds
                     // parts
};

// Of the current device; null after an error. Asked of the driver once a device.
const DeviceTraits* device_traits();

#ifdef __CUDACC__

// Devices on which a kernel's limit of dynamic shared memory has been raised, a bit each.
using RaisedOn = std::atomic<uint64_t>;

inline bool raise_shared_limit(const void* kernel, int bytes, RaisedOn& raised) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((raised.load(std::memory_order_relaxed) & bit) != 0) return true;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return false;
  raised.fetch_or(bit, std::memory_order_relaxed);
  return true;
}

// A kernel takes one struct by value, however many its arguments are.
template <class Args>
Status launch(const char*, void (*kernel)(Args), const LaunchShape& shape, const Args& args, void* stream,
              RaisedOn& raised) {
  const DeviceTraits* traits = device_traits();
  if (traits == nullptr) return Status::kDeviceError;
  // Always to the most there is: a kernel's own size may differ from launch to launch.
  if (shape.shared_bytes > 48 << 10 &&
      !raise_shared_limit(reinterpret_cast<const void*>(kernel), traits->shared_bytes, raised)) {
    return Status::kDeviceError;
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (shape.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (shape.overlaps && traits->capability >= 90) {  // older devices wait
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.blocks_y),
                        static_cast<unsigned>(shape.blocks_z));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, args) == cudaSuccess ? Status::kOk : Status::kDeviceError;
}

// How many blocks the current device holds at once; 0 after an error.
template <class Args>
int resident_blocks(void (*kernel)(Args), int threads, int shared_bytes) {
  const DeviceTraits* traits = device_traits();
  int blocks = 0;
  if (traits == nullptr || cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                               &blocks, kernel, threads, static_cast<size_t>(shared_bytes)) != cudaSuccess) {
    return 0;
  }
  return traits->processors * blocks;
}

#else

template <class Args>
Status launch(const char* name, void (*kernel)(Args), const LaunchShape& shape, const Args& args, void*) {
  const int grid[3] = {shape.blocks, shape.blocks_y, shape.blocks_z};
  const bool ran = emulator::launch(name, grid, shape.threads, shape.shared_bytes, shape.cooperative,
                                    shape.overlaps, [&] { kernel(args); });
  return ran ? Status::kOk : Status::kDeviceError;
}

// Few, so that small tests have blocks that walk on and blocks that meet.
template <class Args>
int resident_blocks(void (*)(Args), int, int) {
  return 3;
}

#endif

}  // namespace fastlora::cuda

// The kernel's name comes with it, for the emulator's reports; and its own flags, one set for every instantiation
// of a template that this stands in.
#ifdef __CUDACC__
#define FASTLORA_LAUNCH(kernel, shape, args, stream)                               \
  [&] {                                                                            \
    static ::fastlora::cuda::RaisedOn raised{0};                                   \
    return ::fastlora::cuda::launch(#kernel, kernel, shape, args, stream, raised); \
  }()
#else
#define FASTLORA_LAUNCH(kernel, shape, args, stream) \
  ::fastlora::cuda::launch(::fastlora::emulator::name_of<kernel>(), kernel, shape, args, stream)
#endif
