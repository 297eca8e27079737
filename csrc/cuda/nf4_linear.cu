// The layer's two products on a device: which kernels a call takes, and what scratch. Nothing else decides.
#include "fastlora/nf4_linear.h"

#include "kernels.cuh"
#include "launch.cuh"

namespace fastlora::cuda {
namespace {

// ---- the table ----------------------------------------------------------------------------------------------

// For how many rows of x which kernels are the fastest, from a compute capability on. Beyond the last the caller
// dequantises and multiplies. Predicted by the cost model in docs/cuda_kernels.md; not yet measured.
struct Crossovers {
  int capability;
  int decode;     // forward alone
  int warpgroup;  // 0: none
  int tile;
  int ragged_tile;  // scale blocks that straddle rows of W
};
constexpr Crossovers kForward[] = {
    {80, 8, 0, 1024, 64}, {90, 8, 1536, 256, 64}, {100, 8, 0, 512, 64}, {120, 8, 0, 512, 64}};
constexpr Crossovers kGradInput[] = {
    {80, 0, 0, 768, 64}, {90, 0, 1024, 256, 64}, {100, 0, 0, 384, 64}, {120, 0, 0, 384, 64}};

template <size_t kCount>
const Crossovers& row_of(const Crossovers (&table)[kCount], int capability) {
  const Crossovers* found = &table[0];
  for (const Crossovers& row : table) {
    if (row.capability <= capability) found = &row;
  }
  return *found;
}

// ---- a call -------------------------------------------------------------------------------------------------

struct Plan {
  CudaRoute route;
  bool ragged;
  int columns;       // right operands of 8 rows of x in a tile; rows of W in a block of the decode kernel
  int splits, span;  // of the contraction
  int inner_splits;  // of that of u; 0: u is whole
};

// What both directions have in common.
struct Shape {
  int64_t m, outer, contraction, r;
  const Nf4Weight* weight;
  const void* x;
  DType dtype;
  CudaRoute wanted;
  bool grad;
};

bool aligned(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

bool is_ragged(const Shape& s) {
  return s.weight->k % s.weight->blocksize != 0 || !aligned(s.weight->packed, 16) || !aligned(s.x, 16) ||
         s.contraction % 8 != 0;
}

int tile_columns(const Shape& s, bool ragged, const DeviceTraits& traits) {
  if (ragged) return s.m <= 16 ? 2 : 8;
  if (s.grad) {
    const bool eight = grad_input_tile_shared_bytes(8, s.weight->blocksize) <= traits.shared_bytes;
    return s.m <= 8 ? 1 : s.m <= 16 ? 2 : s.m <= 32 || !eight ? 4 : 8;
  }
  if (s.m <= 16) return 2;
  if (s.m <= 32) return 4;
  // A tile costs its columns, and about three more for W.
  const auto cost = [&](int columns) { return ceil_div(s.m, 8 * columns) * (columns + 3); };
  int best = 4;
  for (const int columns : {8, 12}) {
    if (tile_shared_bytes(columns, s.weight->blocksize) > traits.shared_bytes) break;
    if (s.m <= 64 ? best == 4 : cost(columns) < cost(best)) best = columns;
  }
  return best;
}

// As many splits as fill the device once, each of at least four steps.
void split(Plan& plan, const Shape& s, int64_t tiles, int64_t slots, int step) {
  const int64_t steps = ceil_div(s.contraction, step);
  int64_t splits = slots / tiles;
  if (splits > steps / 4) splits = steps / 4;
  if (splits > 8) splits = 8;
  if (splits < 1) splits = 1;
  const int64_t span = ceil_div(steps, splits);
  plan.splits = static_cast<int>(ceil_div(steps, span > 0 ? span : 1));
  if (plan.splits < 1) plan.splits = 1;
  plan.span = static_cast<int>(span) * step;
}

bool make_plan(const Shape& s, bool inner_is_wanted, Plan* out) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const DeviceTraits* traits = device_traits();
  if (traits == nullptr) return false;
  Plan plan{.route = CudaRoute::kDense,
            .ragged = is_ragged(s),
            .columns = 0,
            .splits = 1,
            .span = static_cast<int>(s.contraction),
            .inner_splits = 0};
  const Nf4Weight& w = *s.weight;
  const bool fits = s.dtype != DType::kFloat32 && s.m < kMost && w.n < kMost && w.k < kMost &&
                    w.n * w.k / w.blocksize < kMost && traits->capability >= 80;
  const Crossovers& rows = s.grad ? row_of(kGradInput, traits->capability) : row_of(kForward, traits->capability);
  const bool decodes = fits && !s.grad && !plan.ragged && s.m <= 8 && w.blocksize >= 64;
  const auto choose = [&](CudaRoute route, bool can, int64_t most) {
    if (can &&
        (s.wanted == route || (s.wanted == CudaRoute::kAuto && plan.route == CudaRoute::kDense && s.m <= most))) {
      plan.route = route;
    }
  };
  choose(CudaRoute::kDecode, decodes, rows.decode);
  choose(CudaRoute::kTile, fits, plan.ragged ? rows.ragged_tile : rows.tile);
  *out = plan;
  if (plan.route == CudaRoute::kDense) return true;

  if (plan.route == CudaRoute::kDecode) {
    // Blocks of 16 rows where those of 32 would leave processors without one.
    plan.columns = ceil_div(w.n, 32) < 2 * traits->processors ? 16 : 32;
  } else {
    plan.columns = tile_columns(s, plan.ragged, *traits);
    const int64_t tiles = ceil_div(s.m, 8 * plan.columns) * ceil_div(s.outer, 128);
    split(plan, s, tiles, traits->processors * (plan.columns <= (s.grad ? 2 : 4) ? 2 : 1), 128);
  }
  if (s.r > 0 && !s.grad && !inner_is_wanted) {
    // About 32 blocks for u; but whoever uses it adds the parts, so not more than 16 KiB of them.
    const int64_t tiles = ceil_div(s.m, s.m <= 8 ? 8 : 32) * ceil_div(s.r, s.r <= 16 ? 16 : s.r <= 32 ? 32 : 64);
    int64_t parts = 32 / tiles;
    if (parts > 16384 / (4 * s.m * s.r)) parts = 16384 / (4 * s.m * s.r);
    if (parts > ceil_div(s.contraction, 512)) parts = ceil_div(s.contraction, 512);
    plan.inner_splits = static_cast<int>(parts < 1 ? 1 : parts);
  }
  *out = plan;
  return true;
}

constexpr int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }
int64_t inner_bytes(const Plan& plan, const Shape& s) { return round_up(4 * plan.inner_splits * s.m * s.r); }
int64_t part_bytes(const Plan& plan, const Shape& s) {
  return plan.splits > 1 ? round_up(4 * plan.splits * s.m * s.outer) : 0;
}

int widest(const void* p, int64_t width, int bytes) {
  int count = 8;
  while (count > 1 && (width % count != 0 || !aligned(p, count * bytes < 16 ? count * bytes : 16))) count /= 2;
  return count;
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
  if (plan.route == CudaRoute::kDense || s.contraction == 0) return Status::kBadArgument;
  auto* scratch = static_cast<uint8_t*>(a.scratch);
  auto* inner_parts = reinterpret_cast<float*>(scratch);
  ProductArgs args = product_args(plan, s, a.map, c.y, reinterpret_cast<float*>(scratch + inner_bytes(plan, s)));
  args.bias = plan.splits > 1 ? nullptr : c.bias;
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
  Status status = plan.route == CudaRoute::kDecode
                      ? launch_nf4_linear_decode(args, c.dtype, plan.columns, projects, a.stream)
                      : launch_nf4_linear_tile(args, c.dtype, plan.columns, plan.ragged, projects, a.stream);
  if (status != Status::kOk || plan.splits == 1) return status;
  args.bias = c.bias;
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
  if (plan.route == CudaRoute::kDense || s.contraction == 0) return Status::kBadArgument;
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
  const Status status =
      launch_nf4_linear_grad_input_tile(args, c.dtype, plan.columns, plan.ragged, c.r > 0, a.stream);
  if (status != Status::kOk || plan.splits == 1) return status;
  return launch_split_sum(args, c.dx, args.k, c.dtype, a.stream);
}

}  // namespace fastlora
