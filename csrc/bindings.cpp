// pybind11 over the kernel entry points: raw addresses and sizes in, a status out. No arithmetic, no torch.
// ops.py has checked every size against the tensor an address came from.
#include "bindings.h"

#include "fastlora/cpu.h"
#include "fastlora/lora_dropout.h"
#include "fastlora/nf4.h"
#include "fastlora/nf4_linear.h"
#include "nf4_linear_direct.h"

namespace py = pybind11;
using namespace fastlora;

namespace {

int32_t bind_nf4_quantize(uintptr_t weight, int32_t dtype, int64_t rows, int64_t cols, int64_t blocksize,
                          uintptr_t packed, uintptr_t absmax, int32_t threads, int32_t isa) {
  const Nf4QuantizeArgs args{.weight = at<const void>(weight),
                             .dtype = static_cast<DType>(dtype),
                             .rows = rows,
                             .cols = cols,
                             .blocksize = blocksize,
                             .packed = at<uint8_t>(packed),
                             .absmax = at<float>(absmax),
                             .threads = threads};
  return static_cast<int32_t>(nf4_quantize(args, static_cast<Isa>(isa)));
}

int32_t bind_nf4_double_quantize(uintptr_t absmax, int64_t blocks, uintptr_t codes, uintptr_t nested,
                                 int32_t threads) {
  const Nf4DoubleQuantizeArgs args{.absmax = at<const float>(absmax),
                                   .blocks = blocks,
                                   .codes = at<uint8_t>(codes),
                                   .nested = at<uint8_t>(nested),
                                   .threads = threads};
  return static_cast<int32_t>(nf4_double_quantize(args));
}

int32_t bind_nf4_dequantize(uintptr_t packed, uintptr_t scales, uintptr_t nested, int64_t n, int64_t k,
                            int64_t blocksize, uintptr_t offsets, int64_t groups, uintptr_t out, int32_t dtype,
                            int32_t threads, int32_t isa) {
  const Nf4DequantizeArgs args{.weight = weight_at(packed, scales, nested, n, k, blocksize, offsets, groups),
                               .out = at<void>(out),
                               .dtype = static_cast<DType>(dtype),
                               .threads = threads};
  return static_cast<int32_t>(nf4_dequantize(args, static_cast<Isa>(isa)));
}

int32_t bind_nf4_decode_absmax(uintptr_t scales, uintptr_t nested, int64_t blocks, uintptr_t absmax,
                               int32_t threads) {
  const Nf4Scales from{.codes = at<const uint8_t>(scales), .nested = at<const uint8_t>(nested)};
  return static_cast<int32_t>(nf4_decode_absmax(from, blocks, at<float>(absmax), threads));
}

int32_t bind_nf4_linear(uintptr_t x, uintptr_t packed, uintptr_t scales, uintptr_t nested, uintptr_t bias,
                        uintptr_t lora_a, uintptr_t lora_b, uintptr_t gain, uintptr_t u, uintptr_t y, int64_t m,
                        int64_t n, int64_t k, int64_t r, int64_t blocksize, uintptr_t offsets, int64_t groups,
                        float scaling, int32_t dtype, int32_t lora_dtype, int32_t threads, int32_t isa) {
  const Nf4LinearArgs args{.x = at<const void>(x),
                           .weight = weight_at(packed, scales, nested, n, k, blocksize, offsets, groups),
                           .bias = at<const void>(bias),
                           .lora_a = at<const void>(lora_a),
                           .lora_b = at<const void>(lora_b),
                           .u = at<void>(u),
                           .y = at<void>(y),
                           .m = m,
                           .r = r,
                           .scaling = scaling,
                           .dtype = static_cast<DType>(dtype),
                           .lora_dtype = static_cast<DType>(lora_dtype),
                           .threads = threads,
                           .gain = at<const float>(gain)};
  return static_cast<int32_t>(nf4_linear(args, static_cast<Isa>(isa)));
}

int32_t bind_nf4_linear_grad_input(uintptr_t dy, uintptr_t packed, uintptr_t scales, uintptr_t nested,
                                   uintptr_t lora_a, uintptr_t lora_b, uintptr_t v, uintptr_t dx, int64_t m,
                                   int64_t n, int64_t k, int64_t r, int64_t blocksize, uintptr_t offsets,
                                   int64_t groups, float scaling, int32_t dtype, int32_t lora_dtype,
                                   int32_t threads, int32_t isa) {
  const Nf4LinearGradInputArgs args{.dy = at<const void>(dy),
                                    .weight = weight_at(packed, scales, nested, n, k, blocksize, offsets, groups),
                                    .lora_a = at<const void>(lora_a),
                                    .lora_b = at<const void>(lora_b),
                                    .v = at<void>(v),
                                    .dx = at<void>(dx),
                                    .m = m,
                                    .r = r,
                                    .scaling = scaling,
                                    .dtype = static_cast<DType>(dtype),
                                    .lora_dtype = static_cast<DType>(lora_dtype),
                                    .threads = threads};
  return static_cast<int32_t>(nf4_linear_grad_input(args, static_cast<Isa>(isa)));
}

int32_t bind_lora_dropout(uintptr_t x, uintptr_t out, int64_t count, uint64_t seed, double p, int32_t dtype,
                          int32_t threads) {
  const LoraDropoutArgs args{.x = at<const void>(x),
                             .out = at<void>(out),
                             .count = count,
                             .seed = seed,
                             .p = p,
                             .dtype = static_cast<DType>(dtype),
                             .threads = threads};
  return static_cast<int32_t>(lora_dropout(args));
}

int64_t bind_prefer_huge_pages(uintptr_t data, int64_t bytes, bool now) {
  return prefer_huge_pages(at<void>(data), bytes, now);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastlora's kernels on raw addresses; use fastlora.ops";
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("nf4_quantize", &bind_nf4_quantize, unlocked);
  m.def("nf4_double_quantize", &bind_nf4_double_quantize, unlocked);
  m.def("nf4_dequantize", &bind_nf4_dequantize, unlocked);
  m.def("nf4_decode_absmax", &bind_nf4_decode_absmax, unlocked);
  m.def("nf4_linear", &bind_nf4_linear, unlocked);
  m.def("nf4_linear_grad_input", &bind_nf4_linear_grad_input, unlocked);
  m.def("lora_dropout", &bind_lora_dropout, unlocked);
  bind_segmented_lora(m);
  bind_adamw(m);
  if (add_nf4_linear_direct(m.ptr()) != 0) throw py::error_already_set();
  m.def("best_isa", [] { return static_cast<int32_t>(best_isa()); });
  m.def("isa_available", [](int32_t isa) { return isa_available(static_cast<Isa>(isa)); });
  m.def("isa_name", [](int32_t isa) { return isa_name(static_cast<Isa>(isa)); });
  m.def("scratch_bytes", [] { return scratch_bytes(); });
  m.def("prefer_huge_pages", &bind_prefer_huge_pages, unlocked);
  m.attr("isa_count") = kIsaCount;
#ifdef FASTLORA_WITH_CUDA
  py::module_ cuda = m.def_submodule("cuda", "the same on addresses of a CUDA device");
  bind_cuda(cuda);
  m.attr("cuda_built") = true;
#else
  m.attr("cuda_built") = false;
#endif
  m.attr("__version__") = FASTLORA_VERSION;
}
