// Many adapters in one batch on a device: the launches of each op, and the scratch between them.
#include "launch.cuh"
#include "segmented_kernels.cuh"

namespace fastlora::cuda {
namespace {

constexpr int64_t kMost = int64_t{1} << 30;
constexpr int64_t kMostPartBytes = int64_t{64} << 20;

int ranks_of(const AdapterTable& table) {
  int64_t ranks = 0;
  for (int j = 0; j < table.slices; ++j) ranks += table.slice[j].width;
  return static_cast<int>(ranks);
}

// Rows of a matrix, and the slices in them, are whole 16-byte vectors.
bool whole_slices(const void* p, int64_t width, const Slices& slices, DType dtype) {
  bool whole = whole_vectors(p, bytes_of(dtype) * width);
  for (int j = 0; j < slices.count; ++j) whole = whole && slices.of[j].column * bytes_of(dtype) % 16 == 0;
  return whole;
}

// ---- the two thin products ----------------------------------------------------------------------------------

// Blocks for about half of the processors, each with 512 steps of the contraction at least.
int shrink_splits(const SegmentedLoraCudaArgs& a, const Slices& slices) {
  const DeviceTraits* traits = device_traits();
  if (a.batch_invariant || traits == nullptr || a.call.m > kFewRows) return 1;
  int64_t blocks = 0, longest = 0;
  for (int j = 0; j < slices.count; ++j) {
    blocks += ceil_div(slices.of[j].ranks, slices.of[j].ranks <= 16 ? 16 : 64);
    longest = slices.of[j].width > longest ? slices.of[j].width : longest;
  }
  blocks *= ceil_div(a.call.m, 8);
  if (blocks == 0) return 1;
  int64_t splits = traits->processors / 2 / blocks;
  if (splits > longest / 512) splits = longest / 512;
  if (splits > 16) splits = 16;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

ShrinkArgs shrink_args(const SegmentedLoraCudaArgs& a, bool grad) {
  const SegmentedLoraArgs& c = a.call;
  ShrinkArgs args{};
  args.x = c.x;
  args.segments = segments_of(c.routing);
  args.slices = slices_of(c.table, c.k, grad, grad);
  args.width = static_cast<int>(grad ? c.n : c.k);
  args.splits = shrink_splits(a, args.slices);
  args.u = args.splits > 1 ? nullptr : c.u;
  args.parts = args.splits > 1 ? static_cast<float*>(a.scratch) : nullptr;
  args.x_vectors = whole_slices(c.x, args.width, args.slices, c.dtype);
  return args;
}

}  // namespace

bool bad_table(const AdapterTable& table, const Routing& routing, int64_t m, int64_t k, int64_t n) {
  if (m < 0 || m > kMost || k < 0 || k > kMost || n < 0 || n > kMost || routing.m != m) return true;
  if (table.slices < 1 || table.slices > kMaxSlices || table.capacity < 0 || table.capacity > kMost) return true;
  if (routing.segment_rows < 1 || routing.segment_rows > kMost) return true;
  int64_t columns = 0, ranks = 0;
  for (int j = 0; j < table.slices; ++j) {
    const AdapterSlice& slice = table.slice[j];
    if (slice.rows < 0 || slice.rows > kMost || slice.n < 0 || slice.width < 0) return true;
    columns += slice.n;
    ranks += slice.width;
  }
  return columns != n || ranks > kMost;
}

Segments segments_of(const Routing& routing) {
  return {routing.order, routing.segments, static_cast<int>(routing.m), static_cast<int>(routing.segment_rows)};
}

Slices slices_of(const AdapterTable& table, int64_t k, bool b, bool scaled) {
  Slices slices{};
  slices.entries = table.entries;
  slices.scaling = scaled ? table.scaling : nullptr;
  slices.count = table.slices;
  slices.capacity = static_cast<int>(table.capacity);
  slices.ranks = ranks_of(table);
  slices.dtype = table.dtype;
  slices.vectors = true;
  int64_t column = 0, rank = 0;
  for (int j = 0; j < table.slices; ++j) {
    const AdapterSlice& from = table.slice[j];
    const int64_t width = b ? from.n : k;
    slices.of[j] = {.pool = b ? from.b : from.a,
                    .pool_rows = static_cast<int>(from.rows),
                    .width = static_cast<int>(width),
                    .column = static_cast<int>(b ? column : 0),
                    .ranks = static_cast<int>(from.width),
                    .rank_at = static_cast<int>(rank)};
    slices.vectors = slices.vectors && whole_vectors(slices.of[j].pool, bytes_of(table.dtype) * width);
    column += from.n;
    rank += from.width;
  }
  return slices;
}

bool whole_quads(const void* u, const Slices& slices) {
  bool whole = slices.ranks % 4 == 0 && aligned(u, 8);
  for (int j = 0; j < slices.count; ++j) whole = whole && slices.of[j].rank_at % 4 == 0;
  return whole;
}

int64_t inner_scratch(const SegmentedLoraCudaArgs& a, bool grad) {
  if (bad_table(a.call.table, a.call.routing, a.call.m, a.call.k, a.call.n)) return 0;
  const Slices slices = slices_of(a.call.table, a.call.k, grad, grad);
  const int splits = shrink_splits(a, slices);
  return splits > 1 ? 4 * splits * a.call.m * slices.ranks : 0;
}

Status launch_inner(const SegmentedLoraCudaArgs& a, bool grad) {
  const ShrinkArgs args = shrink_args(a, grad);
  const Status status = launch_segmented_shrink(args, a.call.dtype, a.stream);
  if (status != Status::kOk || args.splits == 1) return status;
  const PartSum sum{.parts = args.parts,
                    .out = a.call.u,
                    .wide = {},
                    .count = a.call.m * args.slices.ranks,
                    .splits = args.splits,
                    .scaling = 1.0f,
                    .dtype = a.call.dtype};
  return launch_lora_sum(sum, {}, a.stream);
}

namespace {

ExpandArgs expand_args(const SegmentedLoraCudaArgs& a, bool grad) {
  const SegmentedLoraArgs& c = a.call;
  ExpandArgs args{};
  args.u = c.u;
  args.y = c.y;
  args.segments = segments_of(c.routing);
  args.slices = slices_of(c.table, c.k, !grad, !grad);
  args.width = static_cast<int>(grad ? c.k : c.n);
  args.same_columns = grad;
  args.y_vectors = whole_slices(c.y, args.width, args.slices, c.dtype);
  args.u_quads = whole_quads(c.u, args.slices);
  return args;
}

Status run_products(const SegmentedLoraCudaArgs& a, bool grad) {
  const SegmentedLoraArgs& c = a.call;
  if (bad_table(c.table, c.routing, c.m, c.k, c.n)) return Status::kBadArgument;
  if (c.m == 0 || ranks_of(c.table) == 0) return Status::kOk;
  const Status status = launch_inner(a, grad);
  const ExpandArgs args = expand_args(a, grad);
  if (status != Status::kOk || args.width == 0) return status;
  return launch_segmented_expand(args, c.dtype, a.stream);
}

// ---- the gradients of the pools -----------------------------------------------------------------------------

GradientArgs gradient_args(const SegmentedLoraGradPoolsCudaArgs& a) {
  const SegmentedLoraGradPoolsArgs& c = a.call;
  GradientArgs args{};
  args.segments = segments_of(c.routing);
  args.slices = slices_of(c.table, c.k, true, true);
  args.ranks = args.slices.ranks;
  args.small_vectors = whole_vectors(c.u, bytes_of(c.dtype) * args.ranks) && aligned(c.v, 16);
  args.pool_vectors = true;
  bool wide = false;
  for (int side = 0; side < 2; ++side) {
    const Slices slices = slices_of(c.table, c.k, side == 1, true);
    const bool vectors =
        side == 0 ? whole_slices(c.x, c.k, slices, c.dtype) : whole_slices(c.dy, c.n, slices, c.dtype);
    for (int j = 0; j < slices.count; ++j) {
      const SliceView& slice = slices.of[j];
      void* pool = side == 0 ? c.da[j] : c.db[j];
      args.small_vectors = args.small_vectors && slice.rank_at * bytes_of(c.dtype) % 16 == 0;
      // Whole vectors, in the parts as well.
      args.pool_vectors = args.pool_vectors && slice.width % 8 == 0 && aligned(pool, 16);
      wide = wide || slice.ranks > 16;
      args.of[args.count++] = {.tall = side == 0 ? c.x : c.dy,
                               .small = side == 0 ? c.v : c.u,
                               .pool = pool,
                               .part_at = args.part_size,
                               .tall_width = static_cast<int>(side == 0 ? c.k : c.n),
                               .width = slice.width,
                               .column = slice.column,
                               .pool_rows = slice.pool_rows,
                               .rank_at = slice.rank_at,
                               .ranks = slice.ranks,
                               .slice = j,
                               .scaled = side == 1,
                               .vectors = vectors};
      args.part_size += static_cast<int64_t>(slice.ranks) * slice.width;
    }
  }
  // About one block for every processor, if one adapter has all of the rows.
  int64_t blocks = 0, shares = 1;
  for (int i = 0; i < args.count; ++i) {
    blocks += ceil_div(args.of[i].width, 128) * ceil_div(args.of[i].ranks, wide ? 64 : 16);
  }
  const DeviceTraits* traits = device_traits();
  if (traits != nullptr && blocks > 0) shares = traits->processors / blocks;
  if (shares > c.m / 256) shares = c.m / 256;
  if (args.part_size > 0 && shares > kMostPartBytes / (8 * args.part_size)) {
    shares = kMostPartBytes / (8 * args.part_size);
  }
  args.row_share = static_cast<int>(ceil_div(ceil_div(c.m > 0 ? c.m : 1, shares < 1 ? 1 : shares), 64) * 64);
  args.sum_blocks = static_cast<int>(ceil_div(args.part_size, 32 * 256 * 8));
  if (args.sum_blocks < 1) args.sum_blocks = 1;
  args.parts = static_cast<float*>(a.scratch);
  return args;
}

int64_t shares_of(const GradientArgs& args) { return ceil_div(args.segments.m, args.row_share); }

}  // namespace
}  // namespace fastlora::cuda

namespace fastlora {

using namespace cuda;

int64_t segmented_lora_cuda_scratch(const SegmentedLoraCudaArgs& a) { return inner_scratch(a, false); }
Status segmented_lora_cuda(const SegmentedLoraCudaArgs& a) { return run_products(a, false); }
int64_t segmented_lora_grad_input_cuda_scratch(const SegmentedLoraCudaArgs& a) { return inner_scratch(a, true); }
Status segmented_lora_grad_input_cuda(const SegmentedLoraCudaArgs& a) { return run_products(a, true); }

int64_t segmented_lora_grad_pools_cuda_scratch(const SegmentedLoraGradPoolsCudaArgs& a) {
  if (bad_table(a.call.table, a.call.routing, a.call.m, a.call.k, a.call.n)) return 0;
  const GradientArgs args = gradient_args(a);
  return shares_of(args) > 1 ? 8 * shares_of(args) * args.part_size : 0;
}

Status segmented_lora_grad_pools_cuda(const SegmentedLoraGradPoolsCudaArgs& a) {
  const SegmentedLoraGradPoolsArgs& c = a.call;
  if (bad_table(c.table, c.routing, c.m, c.k, c.n)) return Status::kBadArgument;
  const GradientArgs args = gradient_args(a);
  Status status = launch_segmented_zero(args, a.stream);
  if (status != Status::kOk || c.m == 0 || args.part_size == 0) return status;
  status = launch_segmented_gradients(args, c.dtype, a.stream);
  if (status != Status::kOk || shares_of(args) == 1) return status;
  return launch_segmented_sum(args, a.stream);
}

}  // namespace fastlora
