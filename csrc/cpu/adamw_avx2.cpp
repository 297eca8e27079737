// adamw and adamw_8bit on eight lanes.
#include "adamw_driver.h"
#include "kernels.h"
#include "lanes_avx2.h"

namespace fastlora::cpu {
namespace {

struct AdamwLanes : Avx2Lanes {
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }

  static Vec larger_magnitude(Vec a, Vec b) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(a), magnitude),
                                                _mm256_and_si256(_mm256_castps_si256(b), magnitude)));
  }
  static float largest(Vec a) {
    alignas(32) int32_t bits[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(bits), _mm256_castps_si256(a));
    int32_t most = bits[0];
    for (int64_t i = 1; i < kLanes; ++i) most = bits[i] > most ? bits[i] : most;
    return load_unaligned<float>(&most);
  }
  static Vec decode(const DynamicMap& map, const uint8_t* codes) {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    return _mm256_i32gather_ps(map.values, index, 4);
  }
  template <bool kSigned>
  static void encode(const DynamicMap& map, Vec f, uint8_t* codes) {
    const __m256i bits = _mm256_castps_si256(f);
    const __m256i leading = _mm256_srli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)), 16);
    __m256i cell = _mm256_sub_epi32(leading, _mm256_set1_epi32(kMapFirstCell));
    cell = _mm256_max_epi32(cell, _mm256_setzero_si256());
    cell = _mm256_min_epi32(cell, _mm256_set1_epi32(kMapCells - 1));
    cell = _mm256_add_epi32(cell, _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(kMapCells)));
    const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int*>(map.cells), cell, 4);
    const __m256i low = _mm256_and_si256(bits, _mm256_set1_epi32(0xffff));
    const __m256i past = _mm256_cmpgt_epi32(low, _mm256_srli_epi32(entry, 16));
    __m256i code = _mm256_blendv_epi8(entry, _mm256_srli_epi32(entry, 8), past);
    code = _mm256_and_si256(code, _mm256_set1_epi32(0xff));
    if constexpr (!kSigned) {
      const __m256i positive = _mm256_castps_si256(_mm256_cmp_ps(f, _mm256_setzero_ps(), _CMP_GT_OQ));
      code = _mm256_max_epi32(code, _mm256_srli_epi32(positive, 31));
    }
    const __m256i words = _mm256_packus_epi32(code, code);
    const __m256i bytes = _mm256_packus_epi16(words, words);
    const __m128i joined = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), joined);
  }
};

}  // namespace

Status adamw_avx2(const AdamwArgs& args) { return adamw_with<AdamwLanes>(args); }
Status adamw_8bit_avx2(const Adamw8bitArgs& args) { return adamw_8bit_with<AdamwLanes>(args); }

}  // namespace fastlora::cpu
