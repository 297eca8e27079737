// The layer's two products on a device: a plan's launches, and the scratch between them.
#include "fastlora/nf4_linear.h"

#include "kernels.cuh"
#include "nf4_linear_plan.cuh"

namespace fastlora::cuda {
namespace {

constexpr int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }
int64_t inner_bytes(const Plan& plan, const Shape& s) { return round_up(4 * plan.inner_splits * s.m * s.r); }

int widest(const void* p, int64_t width, int bytes) {
  int count = 8;
  while (count > 1 && (width % count != 0 || !aligned(p, count * bytes < 16 ? count * bytes : 16))) count /= 2;
  return count;
}

}  // namespace

int64_t part_bytes(const Plan& plan, const Shape& s) {
  return plan.splits > 1 ? round_up(4 * plan.splits * s.m * s.outer) : 0;
}

ProductArgs product_args(const Plan& plan, const Shape& s, const float* map, void* out, float* parts) {
  const Nf4Weight& w = *s.weight;
  ProductArgs args{};
  args.x = s.x;
  args.packed = w.packed;
  args.scales = {w.scales.codes, w.scales.nested};
  args.map = map;
  args.row_bytes = (w.k + 1) / 2;
  args.m = static_cast<int>(s.m);
  args.n = static_cast<int>(w.n);
  args.k = static_cast<int>(w.k);
  args.r = static_cast<int>(s.r);
  args.shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize));
  args.splits = plan.splits;
  args.span = plan.span;
  args.out = plan.splits > 1 ? nullptr : out;
  args.parts = parts;
  args.out_vector = plan.splits > 1 ? widest(parts, s.outer, 4) : widest(out, s.outer, 2);
  args.weight_vector = 16;
  while (args.weight_vector > 1 &&
         (args.row_bytes % args.weight_vector != 0 || !aligned(w.packed, args.weight_vector))) {
    args.weight_vector /= 2;
  }
  if (args.weight_vector == 2) args.weight_vector = 1;
  args.x_vectors = aligned(s.x, 16) && s.contraction % 8 == 0;
  args.codes = s.dtype == DType::kBFloat16 ? pair_codes<DType::kBFloat16>() : pair_codes<DType::kFloat16>();
  return args;
}

namespace {

bool bad(const Nf4Weight& w, int64_t m, int64_t r) {
  return m < 0 || r < 0 || w.n < 0 || w.k < 0 || w.blocksize < kMinBlocksize || w.blocksize > kMaxBlocksize;
}

Shape shape_of(const Nf4LinearCudaArgs& a) {
  const Nf4LinearArgs& c = a.call;
  return {c.m, c.weight.n, c.weight.k, c.r, &c.weight, c.x, c.dtype, a.route, false};
}

Shape shape_of(const Nf4LinearGradInputCudaArgs& a) {
  const Nf4LinearGradInputArgs& c = a.call;
  return {c.m, c.weight.k, c.weight.n, c.r, &c.weight, c.dy, c.dtype, a.route, true};
}

// v, and dB with it.
LoraGradientsCudaArgs thin_args(const Nf4LinearGradInputCudaArgs& a) {
  const Nf4LinearGradInputArgs& c = a.call;
  return {.tall = c.dy,
          .small = a.u,
          .factor = c.lora_b,
          .product = c.v,
          .gram = a.db,
          .wide = nullptr,
          .m = c.m,
          .width = c.weight.n,
          .r = c.r,
          .scaling = c.scaling,
          .rank_major = false,
          .dtype = c.dtype,
          .lora_dtype = c.lora_dtype,
          .scratch = a.scratch,
          .stream = a.stream};
}

}  // namespace
}  // namespace fastlora::cuda

namespace fastlora {

using namespace cuda;

int64_t nf4_linear_cuda_scratch(const Nf4LinearCudaArgs& a) {
  Plan plan;
  const Shape s = shape_of(a);
  if (!make_plan(s, a.call.u != nullptr, &plan) || plan.route == CudaRoute::kDense) return -1;
  return inner_bytes(plan, s) + part_bytes(plan, s);
}

Status nf4_linear_cuda(const Nf4LinearCudaArgs& a) {
  const Nf4LinearArgs& c = a.call;
  if (bad(c.weight, c.m, c.r) || (c.lora_a == nullptr && c.r > 0 && c.u == nullptr)) return Status::kBadArgument;
  if (c.m == 0 || c.weight.n == 0) return Status::kOk;
  Plan plan;
  const Shape s = shape_of(a);
  if (!make_plan(s, c.u != nullptr, &plan)) return Status::kDeviceError;
  if (plan.route == CudaRoute::kDense) return Status::kBadArgument;
  auto* scratch = static_cast<uint8_t*>(a.scratch);
  auto* inner_parts = reinterpret_cast<float*>(scratch);
  ProductArgs args = product_args(plan, s, a.map, c.y, reinterpret_cast<float*>(scratch + inner_bytes(plan, s)));
  args.bias = plan.splits > 1 ? nullptr : c.bias;
  args.gain = plan.splits > 1 ? nullptr : c.gain;
  args.factor = c.lora_b;
  args.factor_dtype = c.lora_dtype;
  args.scaling = c.scaling;
  args.inner = c.u;
  args.inner_parts = inner_parts;
  args.inner_splits = plan.inner_splits;
  args.inner_pairs = c.r % 2 == 0 && aligned(c.u, 4);

  const bool projects = c.lora_a != nullptr && c.r > 0;
  if (projects) {
    const ProjectArgs project{.x = c.x,
                              .a = c.lora_a,
                              .u = c.u,
                              .parts = inner_parts,
                              .wide = {},
                              .m = args.m,
                              .k = args.k,
                              .r = args.r,
                              .splits = plan.inner_splits > 0 ? plan.inner_splits : 1,
                              .ones = false,
                              .a_dtype = c.lora_dtype,
                              .x_vectors = args.x_vectors,
                              .a_vectors = whole_vectors(c.lora_a, c.weight.k * bytes_of(c.lora_dtype))};
    const Status status = launch_lora_project(project, c.dtype, a.stream);
    if (status != Status::kOk) return status;
  }
  Status status = Status::kBadArgument;
  if (plan.route == CudaRoute::kDecode) {
    status = launch_nf4_linear_decode(args, c.dtype, plan.columns, projects, a.stream);
  } else if (plan.route == CudaRoute::kTile) {
    status = launch_nf4_linear_tile(args, c.dtype, plan.columns, plan.ragged, projects, a.stream);
  }
#ifdef FASTLORA_SM90
  if (plan.route == CudaRoute::kWarpgroup) {
    status = launch_nf4_linear_sm90(args, c.dtype, plan.columns, projects, a.stream);
  }
#endif
  if (status != Status::kOk || plan.splits == 1) return status;
  args.bias = c.bias;
  args.gain = c.gain;
  return launch_split_sum(args, c.y, args.n, c.dtype, a.stream);
}

int64_t nf4_linear_grad_input_cuda_scratch(const Nf4LinearGradInputCudaArgs& a) {
  Plan plan;
  const Shape s = shape_of(a);
  if (!make_plan(s, true, &plan) || plan.route == CudaRoute::kDense) return -1;
  return part_bytes(plan, s) + (s.r > 0 ? lora_gradients_cuda_scratch(thin_args(a)) : 0);
}

Status nf4_linear_grad_input_cuda(const Nf4LinearGradInputCudaArgs& a) {
  const Nf4LinearGradInputArgs& c = a.call;
  if (bad(c.weight, c.m, c.r) || (c.r > 0 && c.v == nullptr) || (a.db != nullptr && a.u == nullptr)) {
    return Status::kBadArgument;
  }
  if (c.m == 0 || c.weight.k == 0) return Status::kOk;
  Plan plan;
  const Shape s = shape_of(a);
  if (!make_plan(s, true, &plan)) return Status::kDeviceError;
  if (plan.route == CudaRoute::kDense) return Status::kBadArgument;
  ProductArgs args = product_args(plan, s, a.map, c.dx, static_cast<float*>(a.scratch));
  args.factor = c.lora_a;
  args.factor_dtype = c.lora_dtype;
  args.factor_vectors = whole_vectors(c.lora_a, c.weight.k * bytes_of(c.lora_dtype));
  args.scaling = 1.0f;  // v has it
  args.inner = c.v;
  args.inner_pairs = c.r % 2 == 0 && aligned(c.v, 4);
  if (c.r > 0) {
    LoraGradientsCudaArgs thin = thin_args(a);
    thin.scratch = static_cast<uint8_t*>(a.scratch) + part_bytes(plan, s);
    const Status status = lora_gradients_cuda(thin);
    if (status != Status::kOk) return status;
  }
  Status status = Status::kBadArgument;
  if (plan.route == CudaRoute::kTile) {
    status = launch_nf4_linear_grad_input_tile(args, c.dtype, plan.columns, plan.ragged, c.r > 0, a.stream);
  }
#ifdef FASTLORA_SM90
  if (plan.route == CudaRoute::kWarpgroup) {
    status = launch_nf4_linear_grad_input_sm90(args, c.dtype, plan.columns, c.r > 0, a.stream);
  }
#endif
  if (status != Status::kOk || plan.splits == 1) return status;
  return launch_split_sum(args, c.dx, args.k, c.dtype, a.stream);
}

}  // namespace fastlora
