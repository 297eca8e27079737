// nf4_linear for up to 8 rows of x: the kernels of nf4_linear_decode.cuh.
#include "kernels.cuh"
#include "launch.cuh"
#include "nf4_linear_decode.cuh"

namespace fastlora::cuda {
namespace {

template <DType D, int kTiles>
FASTLORA_KERNEL(kThreads, kTiles == 1 ? 2 : 3)
nf4_linear_decode(FASTLORA_PARAMETER ProductArgs args) {
  Decode<D, kTiles> decode(args);
  decode.multiply_base();
  wait_for_previous_launch();
  decode.multiply_factor();
  decode.store();
}

}  // namespace

Status launch_nf4_linear_decode(const ProductArgs& args, DType dtype, int rows, bool overlaps, void* stream) {
  const LaunchShape shape{.blocks = (args.n + rows - 1) / rows,
                          .threads = kThreads,
                          .shared_bytes = rows == 16 ? kSharedBytes<1> : kSharedBytes<2>,
                          .overlaps = overlaps};
  if (dtype == DType::kBFloat16) {
    return rows == 16 ? FASTLORA_LAUNCH((nf4_linear_decode<DType::kBFloat16, 1>), shape, args, stream)
                      : FASTLORA_LAUNCH((nf4_linear_decode<DType::kBFloat16, 2>), shape, args, stream);
  }
  return rows == 16 ? FASTLORA_LAUNCH((nf4_linear_decode<DType::kFloat16, 1>), shape, args, stream)
                    : FASTLORA_LAUNCH((nf4_linear_decode<DType::kFloat16, 2>), shape, args, stream);
}

}  // namespace fastlora::cuda
