// nf4_multi_lora_linear for up to 8 rows of x: the kernels of nf4_linear_decode.cuh, with rows gathered and an
// adapter for every row.
#include "launch.cuh"
#include "nf4_linear_decode.cuh"
#include "segmented_kernels.cuh"

namespace fastlora::cuda {
namespace {

template <DType D, int kTiles>
FASTLORA_KERNEL(kThreads, kTiles == 1 ? 2 : 3)
nf4_multi_decode(FASTLORA_PARAMETER RoutedArgs args) {
  Decode<D, kTiles, RoutedArgs> decode(args);
  decode.multiply_base();
  wait_for_previous_launch();
  decode.multiply_adapters();
  decode.store();
}

template <DType D>
Status launch_dtype(const RoutedArgs& args, int rows, void* stream) {
  const LaunchShape shape{.blocks = (args.n + rows - 1) / rows,
                          .threads = kThreads,
                          .shared_bytes = rows == 16 ? kSharedBytes<1> : kSharedBytes<2>,
                          .overlaps = true};
  return rows == 16 ? FASTLORA_LAUNCH((nf4_multi_decode<D, 1>), shape, args, stream)
                    : FASTLORA_LAUNCH((nf4_multi_decode<D, 2>), shape, args, stream);
}

}  // namespace

Status launch_nf4_multi_decode(const RoutedArgs& args, DType dtype, int rows, void* stream) {
  return dtype == DType::kBFloat16 ? launch_dtype<DType::kBFloat16>(args, rows, stream)
                                   : launch_dtype<DType::kFloat16>(args, rows, stream);
}

}  // namespace fastlora::cuda
