// The fused layer with an adapter for every row, on a device: u or v by the shrink, then the layer's own kernels
// with rows gathered, where its plan takes one of those. Else, for many rows and on sm_90a by warpgroups, the
// caller takes the product as it is and adds the term to its result, which is then rounded twice.
#include "launch.cuh"
#include "nf4_linear_plan.cuh"
#include "nf4_tile.cuh"
#include "segmented_kernels.cuh"

namespace fastlora::cuda {
namespace {

constexpr int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Both directions as one: x is dy, out is dx, inner is v where `grad`.
struct Call {
  const void* x;
  const Nf4Weight& weight;
  const void* bias;
  void* out;
  void* inner;
  int64_t m;
  const AdapterTable& table;
  const Routing& routing;
  DType dtype;
  bool batch_invariant;
  const float* map;
  CudaRoute route;
  void* scratch;
  void* stream;
  bool grad;
};

Call call_of(const Nf4MultiLoraLinearCudaArgs& a) {
  const Nf4MultiLoraLinearArgs& c = a.call;
  return {c.x,     c.weight,          c.bias, c.y,     c.u,       c.m,      c.table, c.routing,
          c.dtype, c.batch_invariant, a.map,  a.route, a.scratch, a.stream, false};
}

Call call_of(const Nf4MultiLoraGradInputCudaArgs& a) {
  const Nf4MultiLoraGradInputArgs& c = a.call;
  return {c.dy,    c.weight,          nullptr, c.dx,    c.v,       c.m,      c.table, c.routing,
          c.dtype, c.batch_invariant, a.map,   a.route, a.scratch, a.stream, true};
}

Shape shape_of(const Call& c) {
  return {.m = c.m,
          .outer = c.grad ? c.weight.k : c.weight.n,
          .contraction = c.grad ? c.weight.n : c.weight.k,
          .r = 0,
          .weight = &c.weight,
          .x = c.x,
          .dtype = c.dtype,
          .wanted = c.batch_invariant ? CudaRoute::kTile : c.route,
          .grad = c.grad};
}

SegmentedLoraCudaArgs inner_args(const Call& c) {
  return {.call = {.x = c.x,
                   .y = c.out,
                   .u = c.inner,
                   .m = c.m,
                   .k = c.weight.k,
                   .n = c.weight.n,
                   .table = c.table,
                   .routing = c.routing,
                   .dtype = c.dtype,
                   .threads = 0,
                   .isa = Isa::kScalar},
          .batch_invariant = c.batch_invariant,
          .scratch = c.scratch,
          .stream = c.stream};
}

// The plan's columns as there are kernels for them: 2 or 8, or 4 where sums are scaled. Where a block cannot have
// the shared memory that 8 take with scale blocks of 32, 2.
int columns_of(const Call& c, const Plan& plan) {
  const bool small = c.weight.blocksize == 32;
  if (plan.columns <= 2) return 2;
  if (plan.columns <= 4 && !c.grad && !plan.ragged && !small && !c.batch_invariant) return 4;
  const DeviceTraits* traits = device_traits();
  return tile_shared_bytes(8, small ? 5 : 6, plan.ragged) <= traits->shared_bytes ? 8 : 2;
}

// Whether a kernel here takes the call, and how.
bool fused_plan(const Call& c, Plan* plan) {
  if (bad_table(c.table, c.routing, c.m, c.weight.k, c.weight.n) || c.dtype == DType::kFloat32) return false;
  const Shape s = shape_of(c);
  if (slices_of(c.table, c.weight.k, true, true).ranks == 0 || !make_plan(s, true, plan)) return false;
  if (plan->route == CudaRoute::kDecode) return true;
  if (plan->route != CudaRoute::kTile) return false;
  if (c.batch_invariant) {
    // Weights are scaled and nothing is split, whatever m: then a tile's width does not show.
    plan->columns = c.m <= 16 ? 2 : 8;
    plan->splits = 1;
    plan->span = static_cast<int>(ceil_div(s.contraction, 128) * 128);
  }
  plan->columns = columns_of(c, *plan);
  return true;
}

int64_t scratch_of(const Call& c) {
  Plan plan;
  if (!fused_plan(c, &plan)) return -1;
  return round_up(inner_scratch(inner_args(c), c.grad)) + part_bytes(plan, shape_of(c));
}

Status run(const Call& c) {
  Plan plan;
  if (!fused_plan(c, &plan)) return Status::kBadArgument;
  const SegmentedLoraCudaArgs inner = inner_args(c);
  Status status = launch_inner(inner, c.grad);
  if (status != Status::kOk) return status;
  const Shape s = shape_of(c);
  auto* parts =
      reinterpret_cast<float*>(static_cast<uint8_t*>(c.scratch) + round_up(inner_scratch(inner, c.grad)));
  RoutedArgs args{};
  static_cast<ProductArgs&>(args) = product_args(plan, s, c.map, c.out, parts);
  args.bias = plan.splits > 1 ? nullptr : c.bias;
  args.inner = c.inner;
  args.segments = segments_of(c.routing);
  args.slices = slices_of(c.table, c.weight.k, !c.grad, !c.grad);
  args.inner_quads = whole_quads(c.inner, args.slices);
  for (int j = 0; j < args.slices.count; ++j) {
    args.slices.vectors = args.slices.vectors && args.slices.of[j].column % 8 == 0;
  }
  if (plan.route == CudaRoute::kDecode) return launch_nf4_multi_decode(args, c.dtype, plan.columns, c.stream);
  status = c.grad ? launch_nf4_multi_grad_input_tile(args, c.dtype, plan.columns, plan.ragged, c.stream)
                  : launch_nf4_multi_tile(args, c.dtype, plan.columns, plan.ragged, c.batch_invariant, c.stream);
  if (status != Status::kOk || plan.splits == 1) return status;
  args.bias = c.bias;
  return launch_split_sum(args, c.out, static_cast<int>(s.outer), c.dtype, c.stream);
}

}  // namespace
}  // namespace fastlora::cuda

namespace fastlora {

int64_t nf4_multi_lora_linear_cuda_scratch(const Nf4MultiLoraLinearCudaArgs& a) {
  return cuda::scratch_of(cuda::call_of(a));
}
Status nf4_multi_lora_linear_cuda(const Nf4MultiLoraLinearCudaArgs& a) { return cuda::run(cuda::call_of(a)); }
int64_t nf4_multi_lora_grad_input_cuda_scratch(const Nf4MultiLoraGradInputCudaArgs& a) {
  return cuda::scratch_of(cuda::call_of(a));
}
Status nf4_multi_lora_grad_input_cuda(const Nf4MultiLoraGradInputCudaArgs& a) {
  return cuda::run(cuda::call_of(a));
}

}  // namespace fastlora
