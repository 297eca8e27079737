// nf4_linear for more rows of x: the kernels of nf4_linear_tile.cuh.
#include "kernels.cuh"
#include "launch.cuh"
#include "nf4_linear_tile.cuh"

namespace fastlora::cuda {
namespace {

template <DType D, int kColumns, Scaling kScaling>
FASTLORA_KERNEL(kTileThreads, kColumns <= 4 ? 2 : 1)
nf4_linear_tile(FASTLORA_PARAMETER ProductArgs args) {
  Tile<D, kColumns, kScaling> tile(args);
  tile.multiply_base();
  let_next_launch_begin();
  tile.add_teams();
  wait_for_previous_launch();
  tile.multiply_factor();
  tile.store();
}

template <DType D, int kColumns, Scaling kScaling>
Status launch_as(const ProductArgs& args, bool overlaps, void* stream) {
  const LaunchShape shape{.blocks = static_cast<int>(ceil_div(args.m, 8 * kColumns)),
                          .blocks_y = static_cast<int>(ceil_div(args.n, kTileStep)),
                          .blocks_z = args.splits,
                          .threads = kTileThreads,
                          .shared_bytes = tile_shared_bytes(kColumns, args.shift, kScaling == Scaling::kRagged),
                          .overlaps = overlaps};
  return FASTLORA_LAUNCH((nf4_linear_tile<D, kColumns, kScaling>), shape, args, stream);
}

template <DType D>
Status launch_dtype(const ProductArgs& args, int columns, bool ragged, bool overlaps, void* stream) {
  if (ragged) {
    return columns <= 2 ? launch_as<D, 2, Scaling::kRagged>(args, overlaps, stream)
                        : launch_as<D, 8, Scaling::kRagged>(args, overlaps, stream);
  }
  const bool sums = args.shift > 5;  // within 64 columns no block ends
  switch (columns) {
    case 2:
      return sums ? launch_as<D, 2, Scaling::kSums>(args, overlaps, stream)
                  : launch_as<D, 2, Scaling::kWeights>(args, overlaps, stream);
    case 4:
      return sums ? launch_as<D, 4, Scaling::kSums>(args, overlaps, stream)
                  : launch_as<D, 4, Scaling::kWeights>(args, overlaps, stream);
    case 8: return launch_as<D, 8, Scaling::kWeights>(args, overlaps, stream);
    default: return launch_as<D, 12, Scaling::kWeights>(args, overlaps, stream);
  }
}

}  // namespace

Status launch_nf4_linear_tile(const ProductArgs& args, DType dtype, int columns, bool ragged, bool overlaps,
                              void* stream) {
  return dtype == DType::kBFloat16 ? launch_dtype<DType::kBFloat16>(args, columns, ragged, overlaps, stream)
                                   : launch_dtype<DType::kFloat16>(args, columns, ragged, overlaps, stream);
}

}  // namespace fastlora::cuda
