// nf4_multi_lora_linear for more rows of x: the kernels of nf4_linear_tile.cuh, with rows gathered and an adapter
// for every row.
#include "launch.cuh"
#include "nf4_linear_tile.cuh"
#include "segmented_kernels.cuh"

namespace fastlora::cuda {
namespace {

// Of 32 rows one block a processor: gathering them takes the registers that a second one would need.
template <DType D, int kColumns, Scaling kScaling>
FASTLORA_KERNEL(kTileThreads, kColumns <= 2 ? 2 : 1)
nf4_multi_tile(FASTLORA_PARAMETER RoutedArgs args) {
  Tile<D, kColumns, kScaling, RoutedArgs> tile(args);
  tile.multiply_base();
  let_next_launch_begin();
  tile.add_teams();
  wait_for_previous_launch();
  tile.multiply_adapters();
  tile.store();
}

template <DType D, int kColumns, Scaling kScaling>
Status launch_as(const RoutedArgs& args, void* stream) {
  const LaunchShape shape{.blocks = static_cast<int>(ceil_div(args.m, 8 * kColumns)),
                          .blocks_y = static_cast<int>(ceil_div(args.n, kTileStep)),
                          .blocks_z = args.splits,
                          .threads = kTileThreads,
                          .shared_bytes = tile_shared_bytes(kColumns, args.shift, kScaling == Scaling::kRagged),
                          .overlaps = true};
  return FASTLORA_LAUNCH((nf4_multi_tile<D, kColumns, kScaling>), shape, args, stream);
}

template <DType D>
Status launch_dtype(const RoutedArgs& args, int columns, bool ragged, bool weights, void* stream) {
  if (ragged) {
    return columns <= 2 ? launch_as<D, 2, Scaling::kRagged>(args, stream)
                        : launch_as<D, 8, Scaling::kRagged>(args, stream);
  }
  if (columns > 4) return launch_as<D, 8, Scaling::kWeights>(args, stream);
  if (weights || args.shift == 5) {
    return columns <= 2 ? launch_as<D, 2, Scaling::kWeights>(args, stream)
                        : launch_as<D, 8, Scaling::kWeights>(args, stream);
  }
  return columns <= 2 ? launch_as<D, 2, Scaling::kSums>(args, stream)
                      : launch_as<D, 4, Scaling::kSums>(args, stream);
}

}  // namespace

Status launch_nf4_multi_tile(const RoutedArgs& args, DType dtype, int columns, bool ragged, bool weights,
                             void* stream) {
  return dtype == DType::kBFloat16 ? launch_dtype<DType::kBFloat16>(args, columns, ragged, weights, stream)
                                   : launch_dtype<DType::kFloat16>(args, columns, ragged, weights, stream);
}

}  // namespace fastlora::cuda
