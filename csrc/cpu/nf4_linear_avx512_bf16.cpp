// The GEMM route for bfloat16 x with AVX-512 BF16: two products a lane and step, float32 accumulation.
#include "lanes_avx512.h"
#include "level_avx512_bf16.h"
#include "multiply_avx512.h"
#include "segmented_gemm.h"

namespace fastlora::cpu {
namespace {

struct Bf16Pairs {
  using Vector = __m512bh;
  static Vector load(const uint8_t* p) { return reinterpret_cast<Vector>(_mm512_load_si512(p)); }
  static Vector broadcast(const uint8_t* p) {
    return reinterpret_cast<Vector>(_mm512_set1_epi32(load_unaligned<int32_t>(p)));
  }
  static __m512 multiply_add(__m512 acc, Vector a, Vector b) { return _mm512_dpbf16_ps(acc, a, b); }
};

struct Avx512Bf16 : Bf16Level, BroadcastMultiply<Bf16Pairs, Bf16Level::kStripRows> {
  static constexpr int64_t kGroup = 3;          // 8 rows x 3 panels: 24 accumulators
  static constexpr int64_t kStripBlocks = 8;    // 256 columns: a strip of 16 KiB
  static constexpr int64_t kPanelBlocks = 8;    // 256 rows of W: 64 KiB of panels, 24 KiB a group
  static constexpr int64_t kForwardRows = 144;  // with k up to 4608 in one packed block, streamed from L2 and L3
  static constexpr int64_t kBackwardRows = 96;
  static constexpr int64_t kPackedBytes = 1296 << 10;
};

}  // namespace

Status nf4_linear_avx512_bf16(const Nf4LinearArgs& args) { return gemm_linear<Avx512Bf16>(args); }

Status nf4_linear_grad_input_avx512_bf16(const Nf4LinearGradInputArgs& args) {
  return gemm_grad_input<Avx512Bf16>(args);
}

Status nf4_multi_lora_linear_avx512_bf16(const Nf4MultiLoraLinearArgs& args, const SegmentedJob& job) {
  return gemm_multi_linear<Avx512Bf16, Avx512Lanes>(args, job);
}

Status nf4_multi_lora_grad_input_avx512_bf16(const Nf4MultiLoraGradInputArgs& args, const SegmentedJob& job) {
  return gemm_multi_grad_input<Avx512Bf16, Avx512Lanes>(args, job);
}

Status segmented_shrink_gemm_avx512_bf16(const ShrinkArgs& args) { return gemm_shrink<Avx512Bf16>(args); }

}  // namespace fastlora::cpu
