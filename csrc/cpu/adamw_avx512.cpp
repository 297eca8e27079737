// adamw and adamw_8bit on sixteen lanes.
#include "adamw_driver.h"
#include "kernels.h"
#include "lanes_avx512.h"

namespace fastlora::cpu {
namespace {

struct AdamwLanes : Avx512Lanes {
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }

  static Vec larger_magnitude(Vec a, Vec b) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), magnitude),
                                                _mm512_and_si512(_mm512_castps_si512(b), magnitude)));
  }
  static float largest(Vec a) {
    const int32_t bits = _mm512_reduce_max_epi32(_mm512_castps_si512(a));
    return load_unaligned<float>(&bits);
  }
  static Vec decode(const DynamicMap& map, const uint8_t* codes) {
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_i32gather_ps(index, map.values, 4);
  }
  template <bool kSigned>
  static void encode(const DynamicMap& map, Vec f, uint8_t* codes) {
    const __m512i bits = _mm512_castps_si512(f);
    const __m512i leading = _mm512_srli_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)), 16);
    __m512i cell = _mm512_sub_epi32(leading, _mm512_set1_epi32(kMapFirstCell));
    cell = _mm512_max_epi32(cell, _mm512_setzero_si512());
    cell = _mm512_min_epi32(cell, _mm512_set1_epi32(kMapCells - 1));
    cell = _mm512_mask_add_epi32(cell, _mm512_movepi32_mask(bits), cell, _mm512_set1_epi32(kMapCells));
    const __m512i entry = _mm512_i32gather_epi32(cell, map.cells, 4);
    const __m512i low = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff));
    const __mmask16 past = _mm512_cmpgt_epi32_mask(low, _mm512_srli_epi32(entry, 16));
    __m512i code = _mm512_mask_srli_epi32(entry, past, entry, 8);
    code = _mm512_and_si512(code, _mm512_set1_epi32(0xff));
    if constexpr (!kSigned) {
      const __mmask16 positive = _mm512_cmp_ps_mask(f, _mm512_setzero_ps(), _CMP_GT_OQ);
      code = _mm512_mask_max_epi32(code, positive, code, _mm512_set1_epi32(1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code));
  }
};

}  // namespace

Status adamw_avx512(const AdamwArgs& args) { return adamw_with<AdamwLanes>(args); }
Status adamw_8bit_avx512(const Adamw8bitArgs& args) { return adamw_8bit_with<AdamwLanes>(args); }

}  // namespace fastlora::cpu
