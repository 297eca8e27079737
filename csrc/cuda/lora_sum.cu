// The end of the thin products: parts added in order, times the scaling, rounded once. Two results in one launch;
// v goes into the widened copy of dy as well, which lora_gradients left without it.
#include "kernels.cuh"
#include "launch.cuh"
#include "nf4_linear.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;

FASTLORA_DEVICE void store_any(void* base, int64_t index, DType dtype, float value) {
  switch (dtype) {
    case DType::kFloat32: return Element<DType::kFloat32>::store(base, index, value);
    case DType::kBFloat16: return Element<DType::kBFloat16>::store(base, index, value);
    case DType::kFloat16: return Element<DType::kFloat16>::store(base, index, value);
  }
}

struct SumArgs {
  PartSum results[2];
};

FASTLORA_KERNEL(kThreads, 4)
lora_sum(FASTLORA_PARAMETER SumArgs args) {
  let_next_launch_begin();
  wait_for_previous_launch();
  int64_t index = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  int which = 0;
  if (index >= args.results[0].count) {
    index -= args.results[0].count;
    which = 1;
  }
  const PartSum& result = args.results[which];
  if (index >= result.count) return;
  float sum = 0.0f;
  for (int part = 0; part < result.splits; ++part) {
    sum = add(sum, load_global(result.parts + part * result.count + index));
  }
  const float value = multiply(sum, result.scaling);
  store_any(result.out, index, result.dtype, value);
  const Wide& wide = result.wide;
  if (wide.rows == nullptr) return;
  const int64_t row = index / wide.r, rank = index - row * wide.r;
  const int64_t at = row * wide.size + wide.rank_at + rank;
  store_any(wide.rows, at, result.dtype, value);
  if (rank + 1 < wide.r) return;
  for (int64_t pad = at + 1; pad < (row + 1) * wide.size; ++pad) store_any(wide.rows, pad, result.dtype, 0.0f);
}

}  // namespace

Status launch_lora_sum(const PartSum& first, const PartSum& second, void* stream) {
  const SumArgs args{{first, second}};
  const LaunchShape shape{.blocks = static_cast<int>(ceil_div(first.count + second.count, kThreads)),
                          .threads = kThreads,
                          .overlaps = true};
  return FASTLORA_LAUNCH(lora_sum, shape, args, stream);
}

}  // namespace fastlora::cuda
