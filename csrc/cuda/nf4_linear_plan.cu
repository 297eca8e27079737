// Which kernels a call of the layer takes, how it is cut into tiles, and over how many blocks its contraction is
// split. Nothing else decides.
#include "nf4_linear_plan.cuh"

#include "fastlora/nf4_linear.h"
#include "kernels.cuh"
#include "launch.cuh"
#include "nf4_tile.cuh"

namespace fastlora::cuda {
namespace {

// ---- the table ----------------------------------------------------------------------------------------------

// Up to how many rows of x which kernels are the fastest, from a compute capability on. Beyond `fused` the caller
// dequantises and multiplies; between the kernels for tiles their cost decides. Predicted by the model in
// docs/cuda_kernels.md; not yet measured.
struct Crossovers {
  int capability;
  int decode;  // forward alone
  int fused;
  int ragged;  // the same where scale blocks straddle rows of W
};
constexpr Crossovers kForward[] = {
    {80, 8, 1024, 64}, {86, 8, 1536, 64}, {90, 8, 1536, 64}, {100, 8, 128, 64}, {120, 8, 1536, 64}};
constexpr Crossovers kGradInput[] = {
    {80, 0, 1024, 64}, {86, 0, 1536, 64}, {90, 0, 768, 64}, {100, 0, 128, 64}, {120, 0, 1536, 64}};

template <size_t kCount>
const Crossovers& row_of(const Crossovers (&table)[kCount], int capability) {
  const Crossovers* found = &table[0];
  for (const Crossovers& row : table) {
    if (row.capability <= capability) found = &row;
  }
  return *found;
}

bool is_ragged(const Shape& s) {
  return s.weight->k % s.weight->blocksize != 0 || !aligned(s.weight->packed, 16) || !aligned(s.x, 16) ||
         s.contraction % 8 != 0;
}

// ---- tiles and splits ---------------------------------------------------------------------------------------

// What a block takes for one step of the contraction, in clocks, by its tile's 8 * `columns` (or, with warpgroups,
// `columns`) rows of x: what passes between shared memory and registers, or the instructions it issues, whichever
// takes longer, as docs/cuda_kernels.md counts them. Its tensor instructions may take longer still.
struct TileCost {
  int columns, clocks;
};
constexpr int kTileSteps = 128, kWarpgroupSteps = 64;
constexpr TileCost kForwardTiles[] = {{2, 625}, {4, 784}, {8, 1136}, {12, 1456}};
constexpr TileCost kGradInputTiles[] = {{1, 740}, {2, 752}, {4, 796}, {8, 880}};
constexpr TileCost kForwardGroups[] = {{16, 276}, {32, 324}, {64, 420}, {128, 612}, {256, 996}};
constexpr TileCost kGradInputGroups[] = {{16, 488}, {32, 537}, {64, 632}, {128, 824}, {256, 1208}};

// Multiply-adds of 16-bit floats, summed in float32, a clock of a processor; GeForce devices, from 86 on, half of
// it.
int tensor_rate(int capability, CudaRoute route) {
  if (route == CudaRoute::kWarpgroup) return 2048;
  return capability == 80 || (capability >= 90 && capability < 120) ? 1024 : 512;
}

constexpr int kRaggedColumns[] = {2, 8};
// What a launch that adds parts moves through the L2 cache in a clock.
constexpr int64_t kL2Bytes = 3000;

struct Tiling {
  int columns = 0, splits = 1;
  int64_t clocks = 0;
};

constexpr int64_t ceil_div32(int64_t a, int64_t b) {  // a division of halves the length, which is made often
  return static_cast<uint32_t>(a + b - 1) / static_cast<uint32_t>(b);
}

// The better of `best` and tiles of `columns` (8 * columns, or columns rows of x) with the best number of splits.
void consider(Tiling& best, const Shape& s, const DeviceTraits& traits, const TileCost& tile, int rows, int step,
              int rate) {
  const int tensor_clocks = 128 * rows * step / rate;
  const int step_clocks = tile.clocks > tensor_clocks ? tile.clocks : tensor_clocks;
  const int64_t blocks = ceil_div(s.m, rows) * ceil_div(s.outer, 128), steps = ceil_div(s.contraction, step);
  for (int splits = 1; splits <= 16 && splits <= steps; ++splits) {
    if (splits > 1 && blocks * splits > 3 * traits.processors) break;
    const int64_t waves = ceil_div32(blocks * splits, traits.processors);
    int64_t clocks = waves * (ceil_div32(steps, splits) * step_clocks + traits.block_clocks);
    if (splits > 1) clocks += traits.block_clocks + 8 * splits * s.m * s.outer / kL2Bytes;
    if (best.columns == 0 || clocks < best.clocks) best = {tile.columns, splits, clocks};
  }
}

Tiling best_tiling(const Shape& s, bool ragged, CudaRoute route, const DeviceTraits& traits) {
  Tiling best;
  const int rate = tensor_rate(traits.capability, route);
  if (route == CudaRoute::kWarpgroup) {
    for (const TileCost& tile : s.grad ? kGradInputGroups : kForwardGroups) {
      consider(best, s, traits, tile, tile.columns, kWarpgroupSteps, rate);
    }
    return best;
  }
  for (const TileCost& tile : s.grad ? kGradInputTiles : kForwardTiles) {
    const bool there = !ragged || tile.columns == kRaggedColumns[0] || tile.columns == kRaggedColumns[1];
    const int bytes = tile_shared_bytes(tile.columns, s.weight->blocksize == 32 ? 5 : 6, ragged);
    if (there && bytes <= traits.shared_bytes) consider(best, s, traits, tile, 8 * tile.columns, kTileSteps, rate);
  }
  return best;
}

// Parts of u that are added by whoever uses it: about 32 blocks for them all, but not more than 16 KiB.
int inner_splits(const Shape& s) {
  const int64_t tiles = ceil_div(s.m, s.m <= 8 ? 8 : 32) * ceil_div(s.r, s.r <= 16 ? 16 : s.r <= 32 ? 32 : 64);
  int64_t parts = 32 / tiles;
  if (parts > 16384 / (4 * s.m * s.r)) parts = 16384 / (4 * s.m * s.r);
  if (parts > ceil_div(s.contraction, 512)) parts = ceil_div(s.contraction, 512);
  return static_cast<int>(parts < 1 ? 1 : parts);
}

}  // namespace

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
  const Crossovers& rows = s.grad ? row_of(kGradInput, traits->capability) : row_of(kForward, traits->capability);
  const bool tiles = s.dtype != DType::kFloat32 && s.contraction > 0 && s.outer > 0 && s.m > 0 && s.m < kMost &&
                     w.n < kMost && w.k < kMost && w.n * w.k / w.blocksize < kMost && traits->capability >= 80;
  const bool decodes = tiles && !s.grad && !plan.ragged && s.m <= 8 && w.blocksize >= 64;
#ifdef FASTLORA_SM90
  const bool warpgroups = tiles && !plan.ragged && traits->capability == 90;
#else
  const bool warpgroups = false;
#endif
  const bool given = s.wanted == CudaRoute::kDense || (s.wanted == CudaRoute::kDecode && decodes) ||
                     (s.wanted == CudaRoute::kTile && tiles) || (s.wanted == CudaRoute::kWarpgroup && warpgroups);
  const auto may = [&](CudaRoute route, bool can, int most) {
    return given ? s.wanted == route : can && s.m <= most;
  };
  const int most = plan.ragged ? rows.ragged : rows.fused;
  if (may(CudaRoute::kDecode, decodes, rows.decode)) {
    plan.route = CudaRoute::kDecode;
    // Blocks of 16 rows where those of 32 would leave processors without one.
    plan.columns = ceil_div(w.n, 32) < 2 * traits->processors ? 16 : 32;
  } else {
    Tiling best;
    int step = kTileSteps;
    if (may(CudaRoute::kTile, tiles, most)) {
      plan.route = CudaRoute::kTile;
      best = best_tiling(s, plan.ragged, CudaRoute::kTile, *traits);
    }
    if (may(CudaRoute::kWarpgroup, warpgroups, most)) {
      const Tiling other = best_tiling(s, plan.ragged, CudaRoute::kWarpgroup, *traits);
      if (given || other.clocks < best.clocks) {
        plan.route = CudaRoute::kWarpgroup;
        best = other;
        step = kWarpgroupSteps;
      }
    }
    const int64_t steps = ceil_div(s.contraction, step), span = ceil_div(steps, best.splits);
    if (plan.route != CudaRoute::kDense) {
      plan.columns = best.columns;
      plan.span = static_cast<int>(span) * step;
      plan.splits = static_cast<int>(ceil_div(steps, span));
    }
  }
  const bool in_parts = plan.route != CudaRoute::kDense && s.r > 0 && !s.grad && !inner_is_wanted;
  if (in_parts) plan.inner_splits = inner_splits(s);
  *out = plan;
  return true;
}

}  // namespace fastlora::cuda

namespace fastlora {

CudaPlan nf4_linear_cuda_plan(bool grad_input, int64_t m, int64_t n, int64_t k, int64_t r, int64_t blocksize,
                              DType dtype, CudaRoute route) {
  const Nf4Weight weight{.packed = nullptr, .scales = {}, .n = n, .k = k, .blocksize = blocksize};
  const cuda::Shape shape{.m = m,
                          .outer = grad_input ? k : n,
                          .contraction = grad_input ? n : k,
                          .r = r,
                          .weight = &weight,
                          .x = nullptr,
                          .dtype = dtype,
                          .wanted = route,
                          .grad = grad_input};
  cuda::Plan plan;
  if (!cuda::make_plan(shape, true, &plan)) return {CudaRoute::kDense, 0, 1};
  return {plan.route, plan.columns, plan.splits};
}

}  // namespace fastlora
