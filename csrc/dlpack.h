// The part of DLPack's C interface, version 1, through which torch lets other libraries read its tensors without
// being built against it (https://dmlc.github.io/dlpack): the address, sizes and strides of a tensor that a Python
// object holds, at a few nanoseconds instead of a Python call for each. Layouts are the specification's.
#pragma once

#include <cstdint>

namespace fastlora::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;                                      // device_type
constexpr uint8_t kUnsignedInt = 1, kFloat = 2, kBFloat = 4;     // dtype.code
constexpr const char* kExchangeApiName = "dlpack_exchange_api";  // of the capsule

struct Tensor {
  void* data;
  struct {
    int32_t device_type, device_id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;    // ndim sizes
  int64_t* strides;  // ndim strides in elements; null: contiguous
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void* allocate;
  void* managed_from_py_object;
  void* managed_to_py_object;
  int (*tensor_from_py_object)(void* object, Tensor* out);  // borrows; 0, or -1 with a Python error; may be null
  void* current_stream;
};

}  // namespace fastlora::dlpack
