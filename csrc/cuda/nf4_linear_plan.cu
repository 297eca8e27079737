// Which kernels a call of the layer takes, how it is cut into tiles, and over how many blocks its contraction is
// split. Nothing else decides.
#include "nf4_linear_plan.cuh"

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
constexpr TileCost kForwardTiles[] = {{2, 630}, {4, 785}, {8, 1140}, {12, 1460}};
constexpr TileCost kGradInputTiles[] = {{1, 740}, {2, 750}, {4, 800}, {8, 880}};
constexpr TileCost kForwardGroups[] = {{16, 375}, {32, 420}, {64, 520}, {128, 710}, {256, 1095}};
constexpr TileCost kGradInputGroups[] = {{16, 490}, {32, 540}, {64, 635}, {128, 825}, {256, 1210}};

// Multiply-adds of 16-bit floats a clock of a processor. GeForce devices have half of it from 86 on.
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

// The better of `best` and tiles of `columns` (8 * columns, or columns rows of x) with the best number of splits.
void consider(Tiling& best, const Shape& s, const DeviceTraits& traits, const TileCost& tile, int rows, int step,
              int rate) {
  const int64_t blocks = ceil_div(s.m, rows) * ceil_div(s.outer, 128), steps = ceil_div(s.contraction, step);
  const int tensor_clocks = 128 * rows * step / rate;
  const int step_clocks = tile.clocks > tensor_clocks ? tile.clocks : tensor_clocks;
  for (int splits = 1; splits <= 16 && splits <= steps; ++splits) {
    const int64_t waves = ceil_div(blocks * splits, traits.processors);
    int64_t clocks = waves * (ceil_div(steps, splits) * step_clocks + traits.block_clocks);
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
    const int bytes = s.grad ? grad_input_tile_shared_bytes(tile.columns, s.weight->blocksize)
                             : tile_shared_bytes(tile.columns, s.weight->blocksize);
    if (there && bytes <= traits.shared_bytes) consider(best, s, traits, tile, 8 * tile.columns, kTileSteps, rate);
  }
  return best;
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
  const bool fits = s.dtype != DType::kFloat32 && s.contraction > 0 && s.outer > 0 && s.m > 0 && s.m < kMost &&
                    w.n < kMost && w.k < kMost && w.n * w.k / w.blocksize < kMost && traits->capability >= 80;
  const Crossovers& rows = s.grad ? row_of(kGradInput, traits->capability) : row_of(kForward, traits->capability);
  const bool decodes = fits && !s.grad && !plan.ragged && s.m <= 8 && w.blocksize >= 64;
#ifdef FASTLORA_SM90
  const bool warpgroups = fits && !plan.ragged && traits->capability == 90;
#else
  const bool warpgroups = false;
#endif
  struct Choice {
    CudaRoute route;
    bool can;
    int most;  // rows of x
  };
  const Choice choices[] = {{CudaRoute::kDecode, decodes, rows.decode},
                            {CudaRoute::kWarpgroup, warpgroups, rows.warpgroup},
                            {CudaRoute::kTile, fits, plan.ragged ? rows.ragged_tile : rows.tile}};
  bool given = s.wanted == CudaRoute::kDense;
  for (const Choice& c : choices) {
    if (c.route == s.wanted && c.can) {
      plan.route = c.route;
      given = true;
    }
  }
  for (const Choice& c : choices) {
    if (!given && plan.route == CudaRoute::kDense && c.can && s.m <= c.most) plan.route = c.route;
  }
  *out = plan;
  if (plan.route == CudaRoute::kDense) return true;

  if (plan.route == CudaRoute::kDecode) {
    // Blocks of 16 rows where those of 32 would leave processors without one.
    plan.columns = ceil_div(w.n, 32) < 2 * traits->processors ? 16 : 32;
  } else {
    const Tiling tiling = best_tiling(s, plan.ragged, plan.route, *traits);
    const int step = plan.route == CudaRoute::kWarpgroup ? kWarpgroupSteps : kTileSteps;
    const int64_t steps = ceil_div(s.contraction, step), span = ceil_div(steps, tiling.splits);
    plan.columns = tiling.columns;
    plan.span = static_cast<int>(span) * step;
    plan.splits = static_cast<int>(ceil_div(steps, span));
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
