// The CUDA entry points: what the CPU's take, with addresses on the device, and a stream. None synchronises, none
// allocates: scratch comes from the caller. Launches go to the current device.
#pragma once

#include <cstdint>

#include "fastlora/adamw.h"
#include "fastlora/nf4.h"
#include "fastlora/nf4_linear.h"
#include "fastlora/segmented_lora.h"

namespace fastlora {

// Of a build with CUDA, on a machine with a driver and a device.
int cuda_device_count();
// Processors (SMs) of the current device; 0 after an error.
int cuda_processors();
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
  int64_t first_row, rows, first_column, columns;  // the part that is wanted; first_column even
  const float* map;                                // (256) the dynamic map, with nested scales
  void* out;                                       // (rows, columns), dtype
  DType dtype;
  void* stream;
};
Status nf4_dequantize_cuda(const Nf4DequantizeCudaArgs& args);

// For the dense route in 16 bits the low-rank term, and the bias, are part of the contraction:
//   y = [x | 0 | u | 1 | 0] · [W | 0 | s·B | bias | 0]ᵀ      dx = [dy | 0 | v | 0] · [W ; 0 ; A ; 0]
// so that the result is rounded once and written once. u and v begin at wide_rank_at(inner), a multiple of 8;
// zeros fill a row to wide_size() elements, whole sectors of 32 bytes: so the GEMM may take its kernels for
// aligned rows. `ones`: with a bias.
constexpr int64_t wide_rank_at(int64_t inner) { return (inner + 7) / 8 * 8; }
constexpr int64_t wide_size(int64_t inner, int64_t r, bool ones) {
  return (wide_rank_at(inner) + r + (ones ? 1 : 0) + 15) / 16 * 16;
}

// A part of W as the right operand of such a product. With r == 0 just that part.
struct Nf4SlabCudaArgs {
  Nf4Weight weight;
  int64_t first_row, rows, first_column, columns;  // of W; first_column even
  const float* map;                                // (256) the dynamic map, with nested scales
  void* out;           // (rows, out_stride), or (wide_size(rows, r, false), out_stride) with `below`; dtype
  int64_t out_stride;  // at least columns; wide_size(columns, r, bias != nullptr) unless `below` or r == 0. What
                       // lies beyond the columns otherwise is left as it is
  const void* factor;  // right of the columns: lora_b (n, r). Below the rows: lora_a (r, k). lora_dtype
  const void* bias;    // (n), dtype, or null; not with `below`
  int64_t r;
  float scaling;  // of the factor
  bool below;
  DType dtype, lora_dtype;  // dtype: 16-bit
  void* stream;
};
// One launch; W's values have the bits that nf4_dequantize_cuda gives them.
Status nf4_slab_cuda(const Nf4SlabCudaArgs& args);

// How the layer's product is made. csrc/cuda/nf4_linear_plan.cu chooses by shape and device, or takes the one it
// is given where that can do the call.
enum class CudaRoute : int32_t {
  kAuto = -1,
  kDense = 0,      // no kernel here: the caller dequantises W, in slabs, and multiplies
  kDecode = 1,     // a few rows of x
  kTile = 2,       // tiles by mma.sync; any shape
  kWarpgroup = 3,  // tiles by wgmma, sm_90a
};

struct CudaPlan {
  CudaRoute route;
  int32_t columns, splits;  // of a tile, in the kernel's own measure; of the contraction
};
// What a call on the current device would take, of operands in whole vectors.
CudaPlan nf4_linear_cuda_plan(bool grad_input, int64_t m, int64_t n, int64_t k, int64_t r, int64_t blocksize,
                              DType dtype, CudaRoute route);

struct Nf4LinearCudaArgs {
  Nf4LinearArgs call;  // u may be null where lora_a is given: then it is not kept
  const float* map;    // (256) the dynamic map, with nested scales
  CudaRoute route;
  void* scratch;  // nf4_linear_cuda_scratch() bytes, aligned to 16
  void* stream;
};
// Bytes of scratch (scratch itself is not looked at), or -1: the route is kDense.
int64_t nf4_linear_cuda_scratch(const Nf4LinearCudaArgs& args);
// At most three launches: u, the product, and the sum of its parts where the contraction was split.
Status nf4_linear_cuda(const Nf4LinearCudaArgs& args);

struct Nf4LinearGradInputCudaArgs {
  Nf4LinearGradInputArgs call;
  const void* u;  // (m, r), dtype, with db
  void* db;       // (n, r), lora_dtype, out: scaling * dyᵀ·u, in the pass over dy that makes v; or null
  const float* map;
  CudaRoute route;
  void* scratch;
  void* stream;
};
int64_t nf4_linear_grad_input_cuda_scratch(const Nf4LinearGradInputCudaArgs& args);
Status nf4_linear_grad_input_cuda(const Nf4LinearGradInputCudaArgs& args);

// u = x·Aᵀ
struct LoraProjectCudaArgs {
  const void* x;  // (m, k), dtype (16-bit)
  const void* a;  // (r, k), a_dtype
  void* u;        // (m, r), dtype, out; may be null with
  void* wide;     // (m, wide_size(k, r, ones)), dtype, out, aligned to 16: x widened by u; or null
  bool ones;
  int64_t m, k, r;
  DType dtype, a_dtype;
  void* stream;
};
Status lora_project_cuda(const LoraProjectCudaArgs& args);

// What backward takes of one large operand in one pass over it:
//   product = scaling * tall · factor    v  of dy and B
//   gram = scaling * tallᵀ · small       dB of dy and u; dA, transposed, of x and v
struct LoraGradientsCudaArgs {
  const void* tall;    // (m, width), dtype (16-bit)
  const void* small;   // (m, r), dtype; null without gram
  const void* factor;  // (width, r), lora_dtype; null without product
  void* product;       // (m, r), dtype, out, or null
  void* gram;          // (width, r), or (r, width) with rank_major, lora_dtype, out, or null
  void* wide;          // (m, wide_size(width, r, false)), dtype, out, aligned to 16: tall widened by the product,
                       // which must be wanted; or null
  int64_t m, width, r;
  float scaling;
  bool rank_major;
  DType dtype, lora_dtype;
  void* scratch;  // lora_gradients_cuda_scratch() bytes, aligned to 16
  void* stream;
};
int64_t lora_gradients_cuda_scratch(const LoraGradientsCudaArgs& args);
Status lora_gradients_cuda(const LoraGradientsCudaArgs& args);

// The entry points of segmented_lora.h. Sizes are known here, what is in memory is not: a slot out of range counts
// as none, an entry that leaves its pool and a row outside x make no work.
struct LoraRouteCudaArgs {
  LoraRouteArgs call;
  void* scratch;  // lora_route_cuda_scratch() bytes, aligned to 16
  void* stream;
};
int64_t lora_route_cuda_scratch(const LoraRouteCudaArgs& args);
// One launch.
Status lora_route_cuda(const LoraRouteCudaArgs& args);

// Two launches, or three where few rows have a long contraction.
struct SegmentedLoraCudaArgs {
  SegmentedLoraArgs call;
  bool batch_invariant;  // a row's bits do not depend on the other rows
  void* scratch;
  void* stream;
};
int64_t segmented_lora_cuda_scratch(const SegmentedLoraCudaArgs& args);
Status segmented_lora_cuda(const SegmentedLoraCudaArgs& args);
int64_t segmented_lora_grad_input_cuda_scratch(const SegmentedLoraCudaArgs& args);
Status segmented_lora_grad_input_cuda(const SegmentedLoraCudaArgs& args);

// Two launches, or three where long segments were cut.
struct SegmentedLoraGradPoolsCudaArgs {
  SegmentedLoraGradPoolsArgs call;
  void* scratch;
  void* stream;
};
int64_t segmented_lora_grad_pools_cuda_scratch(const SegmentedLoraGradPoolsCudaArgs& args);
Status segmented_lora_grad_pools_cuda(const SegmentedLoraGradPoolsCudaArgs& args);

// Scratch -1: no kernel here takes the call; the caller makes the product without adapters, and adds their term by
// segmented_lora_cuda. Else at most four launches: u (or v), the sum of its parts, the product, the sum of its
// parts.
struct Nf4MultiLoraLinearCudaArgs {
  Nf4MultiLoraLinearArgs call;
  const float* map;
  CudaRoute route;
  void* scratch;
  void* stream;
};
int64_t nf4_multi_lora_linear_cuda_scratch(const Nf4MultiLoraLinearCudaArgs& args);
Status nf4_multi_lora_linear_cuda(const Nf4MultiLoraLinearCudaArgs& args);

struct Nf4MultiLoraGradInputCudaArgs {
  Nf4MultiLoraGradInputArgs call;
  const float* map;
  CudaRoute route;
  void* scratch;
  void* stream;
};
int64_t nf4_multi_lora_grad_input_cuda_scratch(const Nf4MultiLoraGradInputCudaArgs& args);
Status nf4_multi_lora_grad_input_cuda(const Nf4MultiLoraGradInputCudaArgs& args);

// The same bits as lora_dropout.
struct LoraDropoutCudaArgs {
  const void* x;
  void* out;
  const int64_t* seed;  // (1), on the device
  int64_t count;
  double p;
  DType dtype;
  void* stream;
};
Status lora_dropout_cuda(const LoraDropoutCudaArgs& args);

// The same bits as adamw and adamw_8bit, where they are finite; threads are not looked at.
struct AdamwCudaArgs {
  AdamwArgs call;
  void* stream;
};
Status adamw_cuda(const AdamwCudaArgs& args);

struct Adamw8bitCudaArgs {
  Adamw8bitArgs call;
  const AdamwTables* tables;  // adamw_tables(), on the device, aligned to 16
  void* stream;
};
Status adamw_8bit_cuda(const Adamw8bitCudaArgs& args);

}  // namespace fastlora
