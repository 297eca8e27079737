// lora_dropout on the device, the CPU's bits: the mask is a function of (seed, index). The seed stays on the
// device, so that nothing waits for it and a captured graph draws anew.
#include "kernels.cuh"
#include "launch.cuh"
#include "nf4.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;

struct DropoutArgs {
  const void* x;
  void* out;
  const int64_t* seed;
  int64_t count;
  uint64_t threshold;  // p * 2^32
  float keep_scale;    // 1 / (1 - p)
};

// splitmix64's output function (Steele, Lea, Flood, 2014); its top 32 bits decide.
FASTLORA_DEVICE bool keeps(uint64_t seed, int64_t index, uint64_t threshold) {
  uint64_t z = seed + static_cast<uint64_t>(index) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return (z ^ (z >> 31)) >> 32 >= threshold;
}

// kPer: adjacent elements of a thread, one vector or one element.
template <DType D, int kPer>
FASTLORA_KERNEL(kThreads, 4)
lora_dropout(FASTLORA_PARAMETER DropoutArgs args) {
  using E = Element<D>;
  const int64_t first = (static_cast<int64_t>(block_index()) * kThreads + thread_index()) * kPer;
  if (first >= args.count) return;
  const auto seed = static_cast<uint64_t>(load_readonly(args.seed));
  const auto dropped = [&](float value, int i) {
    return keeps(seed, first + i, args.threshold) ? multiply(value, args.keep_scale) : 0.0f;
  };
  if constexpr (kPer == 1) {
    E::store(args.out, first, dropped(E::load(args.x, first), 0));
  } else {
    float values[kPer];
    E::unpack(load_readonly(static_cast<const Words4*>(args.x) + first / kPer), values);
    FASTLORA_UNROLL
    for (int i = 0; i < kPer; ++i) values[i] = dropped(values[i], i);
    store_global(static_cast<Words4*>(args.out) + first / kPer, E::pack(values));
  }
}

template <DType D>
Status launch_as(const DropoutArgs& args, void* stream) {
  constexpr int kPer = Element<D>::kPerVector;
  const bool vectors = aligned(args.x, 16) && aligned(args.out, 16) && args.count % kPer == 0;
  const int64_t items = vectors ? args.count / kPer : args.count;
  const LaunchShape shape{.blocks = static_cast<int>(ceil_div(items, kThreads)), .threads = kThreads};
  return vectors ? FASTLORA_LAUNCH((lora_dropout<D, kPer>), shape, args, stream)
                 : FASTLORA_LAUNCH((lora_dropout<D, 1>), shape, args, stream);
}

}  // namespace
}  // namespace fastlora::cuda

namespace fastlora {

Status lora_dropout_cuda(const LoraDropoutCudaArgs& a) {
  if (a.count < 0 || a.count >= int64_t{1} << 39 || !(a.p >= 0.0 && a.p < 1.0)) return Status::kBadArgument;
  if (a.count == 0) return Status::kOk;
  const cuda::DropoutArgs args{.x = a.x,
                               .out = a.out,
                               .seed = a.seed,
                               .count = a.count,
                               .threshold = static_cast<uint64_t>(a.p * 4294967296.0),
                               .keep_scale = static_cast<float>(1.0 / (1.0 - a.p))};
  switch (a.dtype) {
    case DType::kFloat32: return cuda::launch_as<DType::kFloat32>(args, a.stream);
    case DType::kBFloat16: return cuda::launch_as<DType::kBFloat16>(args, a.stream);
    case DType::kFloat16: return cuda::launch_as<DType::kFloat16>(args, a.stream);
  }
  return Status::kBadArgument;
}

}  // namespace fastlora
