// nf4_quantize with AVX2: a code is found by four rounds of bisection over the 15 midpoints.
#include <immintrin.h>

#include "fastlora/nf4.h"
#include "kernels.h"
#include "nf4_quantize_driver.h"

namespace fastlora::cpu {
namespace {

template <DType D>
inline __m256 load8(const void* x, int64_t i) {
  const void* p = element_ptr(x, i, D);
  if constexpr (D == DType::kFloat32) {
    return _mm256_loadu_ps(static_cast<const float*>(p));
  } else {
    const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(p));
    if constexpr (D == DType::kFloat16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

// The last elements of a range, followed by zeros: AVX2 has no masked load of 16-bit values.
template <DType D>
struct Tail {
  alignas(32) unsigned char bytes[32 * (D == DType::kFloat32 ? 4 : 2)] = {};
  Tail(const void* x, int64_t i, int64_t count) {
    std::memcpy(bytes, element_ptr(x, i, D), static_cast<size_t>((count - i) * dtype_bytes(D)));
  }
};

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

class Avx2Level {
 public:
  Avx2Level() {
    alignas(32) float m[16];
    for (int i = 0; i < 15; ++i) m[i] = (kNf4Codes[i] + kNf4Codes[i + 1]) * 0.5f;
    half_ = _mm256_set1_ps(m[7]);
    quarters_[0] = _mm256_set1_ps(m[3]);
    quarters_[1] = _mm256_set1_ps(m[11]);
    // By the number of halves (quarters) already passed; the upper entries are not reached.
    eighths_ = _mm256_setr_ps(m[1], m[5], m[9], m[13], 0, 0, 0, 0);
    sixteenths_ = _mm256_setr_ps(m[0], m[2], m[4], m[6], m[8], m[10], m[12], m[14]);
  }

  // Magnitudes are compared as their bits, in which Inf and then NaN come after every number.
  template <DType D>
  float absmax(const void* x, int64_t count) {
    const int64_t whole = count / 32 * 32;
    __m256i largest = absmax_of_whole<D>(x, whole, _mm256_setzero_si256());
    if (whole < count) {
      const Tail<D> tail(x, whole, count);
      largest = absmax_of_whole<D>(tail.bytes, 32, largest);
    }
    __m128i four = _mm256_castsi256_si128(largest), upper = _mm256_extracti128_si256(largest, 1);
    if constexpr (D == DType::kFloat32) {
      four = _mm_max_epu32(four, upper);
      four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
      four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
      return _mm_cvtss_f32(_mm_castsi128_ps(four));
    } else {
      four = _mm_xor_si128(_mm_max_epu16(four, upper), _mm_set1_epi32(-1));
      const auto bits = static_cast<uint16_t>(~_mm_extract_epi16(_mm_minpos_epu16(four), 0));
      return D == DType::kBFloat16 ? bf16_to_float(bits) : _cvtsh_ss(bits);
    }
  }

  template <DType D, bool kDivide>
  void encode(const void* x, int64_t count, float factor, uint8_t* packed) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
      const __m128i bytes = pair_up(codes32<D, kDivide>(element_ptr(x, i, D), factor));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), bytes);
    }
    if (i < count) {  // a zero past the end is coded as zero: the padding of an odd count
      const Tail<D> tail(x, i, count);
      alignas(16) uint8_t bytes[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes), pair_up(codes32<D, kDivide>(tail.bytes, factor)));
      std::memcpy(packed + i / 2, bytes, static_cast<size_t>(ceil_div(count - i, 2)));
    }
  }

  template <DType D, bool kDivide>
  void encode_bytes(const void* x, int64_t count, float factor, uint8_t* codes) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
      store256(codes + i, codes32<D, kDivide>(element_ptr(x, i, D), factor));
    }
    if (i < count) {
      const Tail<D> tail(x, i, count);
      store256(codes + i, codes32<D, kDivide>(tail.bytes, factor));
    }
  }

  void pack(const uint8_t* codes, int64_t count, uint8_t* packed) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), pair_up(load256(codes + i)));
    }
    for (; i < count; i += 2) packed[i / 2] = static_cast<uint8_t>((codes[i] << 4) | codes[i + 1]);
  }

 private:
  static void store256(uint8_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

  // `count` is a multiple of 32.
  template <DType D>
  static __m256i absmax_of_whole(const void* x, int64_t count, __m256i largest) {
    const auto* p = static_cast<const char*>(x);
    const char* end = p + count * dtype_bytes(D);
    const __m256i magnitude = D == DType::kFloat32 ? _mm256_set1_epi32(0x7fffffff) : _mm256_set1_epi16(0x7fff);
    for (; p < end; p += 32) {
      const __m256i v = _mm256_and_si256(magnitude, load256(p));
      largest = D == DType::kFloat32 ? _mm256_max_epu32(largest, v) : _mm256_max_epu16(largest, v);
    }
    return largest;
  }

  template <bool kDivide>
  static __m256 scaled(__m256 x, float factor) {
    return kDivide ? _mm256_div_ps(x, _mm256_set1_ps(factor)) : _mm256_mul_ps(x, _mm256_set1_ps(factor));
  }

  // How many midpoints lie strictly below, as the four bits of bisection. A true comparison is -1.
  __m256i codes8(__m256 s) const {
    const __m256 above_half = _mm256_cmp_ps(s, half_, _CMP_GT_OQ);
    const __m256 quarter = _mm256_blendv_ps(quarters_[0], quarters_[1], above_half);
    const __m256i first = _mm256_castps_si256(above_half);
    const __m256i second = _mm256_castps_si256(_mm256_cmp_ps(s, quarter, _CMP_GT_OQ));
    __m256i code = _mm256_add_epi32(_mm256_add_epi32(first, first), second);  // negated so far
    code = _mm256_sub_epi32(_mm256_setzero_si256(), code);
    const __m256 eighth = _mm256_permutevar8x32_ps(eighths_, code);
    code =
        _mm256_sub_epi32(_mm256_add_epi32(code, code), _mm256_castps_si256(_mm256_cmp_ps(s, eighth, _CMP_GT_OQ)));
    const __m256 sixteenth = _mm256_permutevar8x32_ps(sixteenths_, code);
    return _mm256_sub_epi32(_mm256_add_epi32(code, code),
                            _mm256_castps_si256(_mm256_cmp_ps(s, sixteenth, _CMP_GT_OQ)));
  }

  // 32 codes, one a byte, in order.
  template <DType D, bool kDivide>
  __m256i codes32(const void* x, float factor) const {
    const __m256i a = codes8(scaled<kDivide>(load8<D>(x, 0), factor));
    const __m256i b = codes8(scaled<kDivide>(load8<D>(x, 8), factor));
    const __m256i c = codes8(scaled<kDivide>(load8<D>(x, 16), factor));
    const __m256i d = codes8(scaled<kDivide>(load8<D>(x, 24), factor));
    // Each 128-bit lane: four codes of a, of b, of c, of d; put the dwords in order.
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }

  // 32 codes to 16 bytes, the even one high.
  static __m128i pair_up(__m256i codes) {
    const __m256i words = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }

  __m256 half_, quarters_[2], eighths_, sixteenths_;
};

}  // namespace

Status nf4_quantize_avx2(const Nf4QuantizeArgs& args) { return quantize_with<Avx2Level>(args); }

}  // namespace fastlora::cpu
