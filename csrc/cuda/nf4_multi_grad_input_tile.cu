// nf4_multi_lora_grad_input: the kernels of nf4_linear_grad_input_tile.cuh, with rows gathered and an adapter for
// every row.
#include "launch.cuh"
#include "nf4_linear_grad_input_tile.cuh"
#include "segmented_kernels.cuh"

namespace fastlora::cuda {
namespace {

template <DType D, int kColumns, bool kRagged>
FASTLORA_KERNEL(kTileThreads, kColumns <= 2 ? 2 : 1)
nf4_multi_grad_input_tile(FASTLORA_PARAMETER RoutedArgs args) {
  Tile<D, kColumns, kRagged, RoutedArgs> tile(args);
  tile.multiply_base();
  let_next_launch_begin();
  tile.add_teams();
  wait_for_previous_launch();
  tile.multiply_adapters();
  tile.store();
}

template <DType D, int kColumns, bool kRagged>
Status launch_as(const RoutedArgs& args, void* stream) {
  const LaunchShape shape{.blocks = static_cast<int>(ceil_div(args.m, 8 * kColumns)),
                          .blocks_y = static_cast<int>(ceil_div(args.k, kTileStep)),
                          .blocks_z = args.splits,
                          .threads = kTileThreads,
                          .shared_bytes = tile_shared_bytes(kColumns, args.shift, kRagged),
                          .overlaps = true};
  return FASTLORA_LAUNCH((nf4_multi_grad_input_tile<D, kColumns, kRagged>), shape, args, stream);
}

template <DType D>
Status launch_dtype(const RoutedArgs& args, int columns, bool ragged, void* stream) {
  if (ragged) {
    return columns <= 2 ? launch_as<D, 2, true>(args, stream) : launch_as<D, 8, true>(args, stream);
  }
  return columns <= 2 ? launch_as<D, 2, false>(args, stream) : launch_as<D, 8, false>(args, stream);
}

}  // namespace

Status launch_nf4_multi_grad_input_tile(const RoutedArgs& args, DType dtype, int columns, bool ragged,
                                        void* stream) {
  return dtype == DType::kBFloat16 ? launch_dtype<DType::kBFloat16>(args, columns, ragged, stream)
                                   : launch_dtype<DType::kFloat16>(args, columns, ragged, stream);
}

}  // namespace fastlora::cuda
