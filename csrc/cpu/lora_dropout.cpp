// Seeded dropout: the mask is recomputed from (seed, index) wherever it is needed, never stored.
#include "fastlora/lora_dropout.h"

#include "numeric.h"
#include "parallel.h"

namespace fastlora {
namespace {

using namespace cpu;

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// splitmix64's output function (Steele, Lea, Flood, 2014); its top 32 bits decide.
inline uint32_t mixed_top_bits(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
}

void dropout_range(void* context, int64_t begin, int64_t end) {
  const LoraDropoutArgs& a = *static_cast<const LoraDropoutArgs*>(context);
  const auto threshold = static_cast<uint64_t>(a.p * 4294967296.0);
  const auto keep_scale = static_cast<float>(1.0 / (1.0 - a.p));
  for (int64_t i = begin; i < end; ++i) {
    const bool keep = mixed_top_bits(a.seed + static_cast<uint64_t>(i) * kGolden) >= threshold;
    store_from_float(a.out, i, a.dtype, keep ? load_as_float(a.x, i, a.dtype) * keep_scale : 0.0f);
  }
}

}  // namespace

Status lora_dropout(const LoraDropoutArgs& args) {
  if (args.count < 0 || !(args.p >= 0.0 && args.p < 1.0)) return Status::kBadArgument;
  parallel_ranges(args.count, args.count < 16384 ? 1 : args.threads, dropout_range,
                  const_cast<LoraDropoutArgs*>(&args));
  return Status::kOk;
}

}  // namespace fastlora
