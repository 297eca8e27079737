// nf4_linear called on tensors, for a layer so small that reaching the kernel takes longer than the kernel: no
// torch dispatcher, no Python arithmetic. It answers None, having done nothing, to every call that is not plain;
// the caller then takes the op, whose checks say what was wrong.
//
// The sizes are those of the tensors themselves, read here at each call: nothing is remembered between calls that
// a resize or a swap of .data could make stale.
#include "nf4_linear_direct.h"

#include "dlpack.h"
#include "fastlora/nf4_linear.h"

namespace fastlora {
namespace {

constexpr int kMaxDims = 8;
constexpr int64_t kUBytes = 16 << 10;  // u = x·lora_aᵀ lives on the stack; a call that needs more is not small

// What setup() found in torch; never released.
struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* empty = nullptr;
  PyObject *dtype = nullptr, *is_neg = nullptr, *dtype_keyword = nullptr;
  int (*read)(void*, dlpack::Tensor*) = nullptr;
} g_torch;

// A strided CPU tensor that holds data, contiguous, of a type no one has subclassed.
struct View {
  void* data = nullptr;  // null: None was given
  int32_t ndim = 0;
  const int64_t* shape = nullptr;
  int32_t dtype = -1;  // DType, or -1 for uint8
  bool given() const { return data != nullptr; }
  bool is(int64_t size) const { return ndim == 1 && shape[0] == size; }
  bool is(int64_t rows, int64_t cols) const { return ndim == 2 && shape[0] == rows && shape[1] == cols; }
};

bool contiguous(const dlpack::Tensor& t) {
  int64_t expected = 1;
  for (int32_t i = t.ndim - 1; i >= 0 && t.strides != nullptr; --i) {
    if (t.shape[i] != 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

bool read_dtype(const dlpack::Tensor& t, bool floating, int32_t* dtype) {
  const auto [code, bits, lanes] = t.dtype;
  if (lanes != 1) return false;
  if (!floating) return code == dlpack::kUnsignedInt && bits == 8;
  if (code == dlpack::kFloat && bits == 32) {
    *dtype = static_cast<int32_t>(DType::kFloat32);
  } else if (code == dlpack::kFloat && bits == 16) {
    *dtype = static_cast<int32_t>(DType::kFloat16);
  } else if (code == dlpack::kBFloat && bits == 16) {
    *dtype = static_cast<int32_t>(DType::kBFloat16);
  } else {
    return false;
  }
  return true;
}

// False for a view whose memory holds the negative of its values, as z.conj().imag is.
bool as_stored(PyObject* object) {
  PyObject* negative = PyObject_CallMethodNoArgs(object, g_torch.is_neg);
  if (negative == nullptr) PyErr_Clear();
  Py_XDECREF(negative);
  return negative == Py_False;
}

bool read(PyObject* object, bool floating, View* view) {
  if (Py_TYPE(object) != g_torch.tensor && Py_TYPE(object) != g_torch.parameter) return false;
  dlpack::Tensor t{};
  if (g_torch.read(object, &t) != 0) {  // sparse, meta, quantised, ...
    PyErr_Clear();
    return false;
  }
  if (t.device.device_type != dlpack::kCpu || t.data == nullptr || t.byte_offset != 0) return false;
  if (!read_dtype(t, floating, &view->dtype) || !contiguous(t) || (floating && !as_stored(object))) return false;
  view->data = t.data;
  view->ndim = t.ndim;
  view->shape = t.shape;
  return true;
}

bool read_optional(PyObject* object, bool floating, View* view) {
  return object == Py_None || read(object, floating, view);
}

bool read_int(PyObject* object, int64_t* value) {
  *value = PyLong_AsLongLong(object);
  if (*value != -1 || PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What checks.py demands of a weight (n, k) in `blocksize`; the entry point refuses other block sizes, and groups
// that do not divide k.
bool weight_fits(const View& packed, const View& scales, const View& nested, const View& offsets, int64_t k,
                 int64_t blocksize) {
  if (blocksize < kMinBlocksize || blocksize > kMaxBlocksize || packed.ndim != 2) return false;
  const int64_t n = packed.shape[0], blocks = ceil_div(n * k, blocksize);
  if (packed.shape[1] != ceil_div(k, 2)) return false;
  if (offsets.given() && (offsets.ndim != 2 || offsets.shape[0] != n || offsets.shape[1] % 4 != 0 ||
                          reinterpret_cast<uintptr_t>(offsets.data) % 4 != 0)) {
    return false;
  }
  if (!nested.given()) return scales.is(4 * blocks);
  return scales.is(blocks) && nested.is(4 * (1 + ceil_div(blocks, kNestedBlocksize)));
}

// torch.empty(*lead, n, dtype=x.dtype)
PyObject* new_output(PyObject* x, const View& v, int64_t n) {
  PyObject* args[kMaxDims + 1];
  const int32_t dims = v.ndim;
  bool good = true;
  for (int32_t i = 0; i < dims; ++i) {
    args[i] = PyLong_FromLongLong(i + 1 < dims ? v.shape[i] : n);
    good = good && args[i] != nullptr;
  }
  args[dims] = PyObject_GetAttr(x, g_torch.dtype);
  good = good && args[dims] != nullptr;
  PyObject* out =
      good ? PyObject_Vectorcall(g_torch.empty, args, static_cast<size_t>(dims), g_torch.dtype_keyword) : nullptr;
  for (int32_t i = 0; i <= dims; ++i) Py_XDECREF(args[i]);
  return out;
}

enum Position { kX, kWeight, kBias, kLoraA, kLoraB, kScaling, kThreads, kIsa, kCount };

// (x, (packed, scales, nested or None, blocksize, offsets or None), bias, lora_a, lora_b (or None), scaling,
// threads, isa)
PyObject* nf4_linear_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kCount || !PyTuple_Check(args[kWeight]) || PyTuple_GET_SIZE(args[kWeight]) != 5) {
    PyErr_SetString(PyExc_TypeError, "nf4_linear_direct: expected 8 arguments, a tuple of 5 for the second");
    return nullptr;
  }
  PyObject* weight = args[kWeight];
  View x, packed, scales, nested, offsets, bias, lora_a, lora_b;
  int64_t blocksize, threads, isa;
  if (g_torch.read == nullptr || !read(args[kX], true, &x) || !read(PyTuple_GET_ITEM(weight, 0), false, &packed) ||
      !read(PyTuple_GET_ITEM(weight, 1), false, &scales) ||
      !read_optional(PyTuple_GET_ITEM(weight, 2), false, &nested) ||
      !read_int(PyTuple_GET_ITEM(weight, 3), &blocksize) ||
      !read_optional(PyTuple_GET_ITEM(weight, 4), false, &offsets) || !read_optional(args[kBias], true, &bias) ||
      !read_optional(args[kLoraA], true, &lora_a) || !read_optional(args[kLoraB], true, &lora_b) ||
      !read_int(args[kThreads], &threads) || !read_int(args[kIsa], &isa) || !PyFloat_Check(args[kScaling])) {
    Py_RETURN_NONE;
  }
  if (x.ndim < 1 || x.ndim > kMaxDims) Py_RETURN_NONE;
  int64_t m = 1;
  for (int32_t i = 0; i + 1 < x.ndim; ++i) m *= x.shape[i];
  const int64_t k = x.shape[x.ndim - 1];
  if (m < 1 || k < 1 || !weight_fits(packed, scales, nested, offsets, k, blocksize)) Py_RETURN_NONE;
  const int64_t n = packed.shape[0];
  if (bias.given() && (bias.dtype != x.dtype || !bias.is(n))) Py_RETURN_NONE;
  int64_t r = 0;
  if (lora_a.given() || lora_b.given()) {
    if (!lora_a.given() || !lora_b.given() || lora_a.ndim != 2 || lora_a.dtype != lora_b.dtype) Py_RETURN_NONE;
    r = lora_a.shape[0];
    if (r < 1 || !lora_a.is(r, k) || !lora_b.is(n, r) || r > kUBytes / 4 / m) Py_RETURN_NONE;
  }

  PyObject* y = new_output(args[kX], x, n);
  if (y == nullptr) return nullptr;
  dlpack::Tensor out{};
  if (g_torch.read(y, &out) != 0) {
    Py_DECREF(y);
    return nullptr;
  }
  alignas(64) uint8_t u[kUBytes];
  const Nf4LinearArgs call{.x = x.data,
                           .weight = {.packed = static_cast<const uint8_t*>(packed.data),
                                      .scales = {.codes = static_cast<const uint8_t*>(scales.data),
                                                 .nested = static_cast<const uint8_t*>(nested.data)},
                                      .n = n,
                                      .k = k,
                                      .blocksize = blocksize,
                                      .offsets = static_cast<const float*>(offsets.data),
                                      .groups = offsets.given() ? offsets.shape[1] / 4 : 0},
                           .bias = bias.data,
                           .lora_a = lora_a.data,
                           .lora_b = lora_b.data,
                           .u = r > 0 ? u : nullptr,
                           .y = out.data,
                           .m = m,
                           .r = r,
                           .scaling = static_cast<float>(PyFloat_AS_DOUBLE(args[kScaling])),
                           .dtype = static_cast<DType>(x.dtype),
                           .lora_dtype = static_cast<DType>(r > 0 ? lora_a.dtype : x.dtype),
                           .threads = static_cast<int32_t>(threads)};
  Status status;
  Py_BEGIN_ALLOW_THREADS;
  status = nf4_linear(call, static_cast<Isa>(isa));
  Py_END_ALLOW_THREADS;
  if (status == Status::kOk) return y;
  Py_DECREF(y);
  Py_RETURN_NONE;
}

// (Tensor, Parameter, torch.empty, DLPack capsule): whether the interface is one this file knows.
PyObject* setup(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4 || !PyType_Check(args[0]) || !PyType_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "nf4_linear_direct_setup: expected two types, a function and a capsule");
    return nullptr;
  }
  auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(args[3], dlpack::kExchangeApiName));
  if (api == nullptr) return nullptr;
  if (api->version.major != dlpack::kMajorVersion || api->tensor_from_py_object == nullptr) Py_RETURN_FALSE;
  for (int i = 0; i < 3; ++i) Py_INCREF(args[i]);
  g_torch.tensor = reinterpret_cast<PyTypeObject*>(args[0]);
  g_torch.parameter = reinterpret_cast<PyTypeObject*>(args[1]);
  g_torch.empty = args[2];
  g_torch.dtype = PyUnicode_InternFromString("dtype");
  g_torch.is_neg = PyUnicode_InternFromString("is_neg");
  g_torch.dtype_keyword = PyTuple_Pack(1, g_torch.dtype);
  if (g_torch.dtype == nullptr || g_torch.is_neg == nullptr || g_torch.dtype_keyword == nullptr) return nullptr;
  g_torch.read = api->tensor_from_py_object;
  Py_RETURN_TRUE;
}

template <class Function>
PyCFunction as_c_function(Function f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef kMethods[] = {
    {"nf4_linear_direct", as_c_function(&nf4_linear_direct), METH_FASTCALL, nullptr},
    {"nf4_linear_direct_setup", as_c_function(&setup), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_nf4_linear_direct(PyObject* module) { return PyModule_AddFunctions(module, kMethods); }

}  // namespace fastlora
