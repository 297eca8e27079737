// The end of a product whose contraction was split over blocks: the parts added in order, gain and bias, one
// rounding.
#include "kernels.cuh"
#include "launch.cuh"
#include "nf4_linear.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;

struct SumArgs {
  const float* parts;  // (splits, rows, width)
  const void* bias;    // (width) or null
  const float* gain;   // (width) or null
  void* out;           // (rows, width)
  int64_t count;       // rows * width
  int width, splits;
};

// kCount: adjacent elements of a thread, none of which is in another row.
template <DType D, int kCount>
FASTLORA_KERNEL(kThreads, 4)
split_sum(FASTLORA_PARAMETER SumArgs args) {
  wait_for_previous_launch();
  const int64_t index = (static_cast<int64_t>(block_index()) * kThreads + thread_index()) * kCount;
  if (index >= args.count) return;
  float sums[kCount] = {};
  for (int split = 0; split < args.splits; ++split) {
    const float* part = args.parts + split * args.count + index;
    if constexpr (kCount == 4) {
      const Words4 four = load_global(reinterpret_cast<const Words4*>(part));
      FASTLORA_UNROLL
      for (int i = 0; i < 4; ++i) sums[i] = add(sums[i], float_of(four.w[i]));
    } else {
      sums[0] = add(sums[0], load_global(part));
    }
  }
  if (args.gain != nullptr) {
    FASTLORA_UNROLL
    for (int i = 0; i < kCount; ++i) sums[i] = multiply(sums[i], load_global(args.gain + index % args.width + i));
  }
  if (args.bias != nullptr) {
    FASTLORA_UNROLL
    for (int i = 0; i < kCount; ++i) sums[i] = add(sums[i], Element<D>::load(args.bias, index % args.width + i));
  }
  if constexpr (kCount == 4) {
    const Words2 pairs{{pack_pair<D>(sums[0], sums[1]), pack_pair<D>(sums[2], sums[3])}};
    store_global(reinterpret_cast<Words2*>(static_cast<uint16_t*>(args.out) + index), pairs);
  } else {
    Element<D>::store(args.out, index, sums[0]);
  }
}

template <DType D>
Status launch_as(const SumArgs& args, bool vectors, void* stream) {
  const int64_t items = vectors ? args.count / 4 : args.count;
  const LaunchShape shape{
      .blocks = static_cast<int>(ceil_div(items, kThreads)), .threads = kThreads, .overlaps = true};
  return vectors ? FASTLORA_LAUNCH((split_sum<D, 4>), shape, args, stream)
                 : FASTLORA_LAUNCH((split_sum<D, 1>), shape, args, stream);
}

}  // namespace

Status launch_split_sum(const ProductArgs& product, void* out, int width, DType dtype, void* stream) {
  const SumArgs args{.parts = product.parts,
                     .bias = product.bias,
                     .gain = product.gain,
                     .out = out,
                     .count = static_cast<int64_t>(product.m) * width,
                     .width = width,
                     .splits = product.splits};
  const bool vectors = width % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 8 == 0;
  return dtype == DType::kBFloat16 ? launch_as<DType::kBFloat16>(args, vectors, stream)
                                   : launch_as<DType::kFloat16>(args, vectors, stream);
}

}  // namespace fastlora::cuda
