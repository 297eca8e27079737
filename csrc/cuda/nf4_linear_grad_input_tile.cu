// nf4_linear_grad_input on any device and for any shape: the kernels of nf4_linear_grad_input_tile.cuh.
#include "kernels.cuh"
#include "launch.cuh"
#include "nf4_linear_grad_input_tile.cuh"

namespace fastlora::cuda {
namespace {

template <DType D, int kColumns, bool kRagged>
FASTLORA_KERNEL(kTileThreads, kColumns <= 2 ? 2 : 1)
nf4_linear_grad_input_tile(FASTLORA_PARAMETER ProductArgs args) {
  Tile<D, kColumns, kRagged> tile(args);
  tile.multiply_base();
  let_next_launch_begin();
  tile.add_teams();
  wait_for_previous_launch();
  tile.multiply_factor();
  tile.store();
}

template <DType D, int kColumns, bool kRagged>
Status launch_as(const ProductArgs& args, bool overlaps, void* stream) {
  const LaunchShape shape{.blocks = static_cast<int>(ceil_div(args.m, 8 * kColumns)),
                          .blocks_y = static_cast<int>(ceil_div(args.k, kTileStep)),
                          .blocks_z = args.splits,
                          .threads = kTileThreads,
                          .shared_bytes = tile_shared_bytes(kColumns, args.shift, kRagged),
                          .overlaps = overlaps};
  return FASTLORA_LAUNCH((nf4_linear_grad_input_tile<D, kColumns, kRagged>), shape, args, stream);
}

template <DType D>
Status launch_dtype(const ProductArgs& args, int columns, bool ragged, bool overlaps, void* stream) {
  if (ragged) {
    return columns <= 2 ? launch_as<D, 2, true>(args, overlaps, stream)
                        : launch_as<D, 8, true>(args, overlaps, stream);
  }
  switch (columns) {
    case 1: return launch_as<D, 1, false>(args, overlaps, stream);
    case 2: return launch_as<D, 2, false>(args, overlaps, stream);
    case 4: return launch_as<D, 4, false>(args, overlaps, stream);
    default: return launch_as<D, 8, false>(args, overlaps, stream);
  }
}

}  // namespace

Status launch_nf4_linear_grad_input_tile(const ProductArgs& args, DType dtype, int columns, bool ragged,
                                         bool overlaps, void* stream) {
  return dtype == DType::kBFloat16 ? launch_dtype<DType::kBFloat16>(args, columns, ragged, overlaps, stream)
                                   : launch_dtype<DType::kFloat16>(args, columns, ragged, overlaps, stream);
}

}  // namespace fastlora::cuda
