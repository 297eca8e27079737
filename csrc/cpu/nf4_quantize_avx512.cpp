// nf4_quantize with AVX-512: a code is found from a uniform grid of 32 cells, no two midpoints in one.
#include <immintrin.h>

#include "fastlora/nf4.h"
#include "kernels.h"
#include "nf4_quantize_driver.h"

namespace fastlora::cpu {
namespace {

inline __mmask32 first32(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1u; }
inline __mmask16 first16(int64_t n) {
  return n >= 16  ? static_cast<__mmask16>(0xffff)
         : n <= 0 ? static_cast<__mmask16>(0)
                  : static_cast<__mmask16>((1u << n) - 1u);
}

template <DType D>
inline __m512 load16(const void* x, int64_t i) {
  const void* p = element_ptr(x, i, D);
  if constexpr (D == DType::kFloat32) {
    return _mm512_loadu_ps(p);
  } else {
    const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if constexpr (D == DType::kFloat16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

// Elements past `count` read as zero, and their memory is not touched.
template <DType D>
inline __m512 load16(const void* x, int64_t i, int64_t count) {
  const void* p = element_ptr(x, i, D);
  const __mmask16 mask = first16(count - i);
  if constexpr (D == DType::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, p);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
    if constexpr (D == DType::kFloat16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

// The largest of 32 unsigned 16-bit values.
inline uint32_t largest_u16(__m512i v) {
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i ones = _mm_set1_epi32(-1);  // the one horizontal instruction is a minimum
  return 0xffffu ^ static_cast<uint32_t>(_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(quarter, ones)), 0));
}

class Avx512Level {
 public:
  // Where each midpoint lies is asked of cell_of itself, so that no rounding in it can matter.
  Avx512Level() {
    alignas(64) float midpoints[16], bound[32];
    alignas(64) int32_t cells[16], base[32];
    for (int i = 0; i < 15; ++i) midpoints[i] = (kNf4Codes[i] + kNf4Codes[i + 1]) * 0.5f;
    midpoints[15] = 1.0f;
    _mm512_store_si512(cells, cell_of(_mm512_load_ps(midpoints)));
    for (int cell = 0, below = 0; cell < 32; ++cell) {
      base[cell] = below;
      bound[cell] = 2.0f;  // no midpoint here
      if (below < 15 && cells[below] == cell) bound[cell] = midpoints[below++];
    }
    bound_low_ = _mm512_load_ps(bound);
    bound_high_ = _mm512_load_ps(bound + 16);
    base_low_ = _mm512_load_si512(base);
    base_high_ = _mm512_load_si512(base + 16);
  }

  // Magnitudes are compared as their bits, in which Inf and then NaN come after every number.
  template <DType D>
  float absmax(const void* x, int64_t count) {
    if constexpr (D == DType::kFloat32) {
      const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
      __m512i largest = _mm512_setzero_si512();
      int64_t i = 0;
      for (; i + 16 <= count; i += 16) {
        largest = _mm512_max_epu32(largest, _mm512_and_si512(magnitude, _mm512_castps_si512(load16<D>(x, i))));
      }
      if (i < count) {
        largest =
            _mm512_max_epu32(largest, _mm512_and_si512(magnitude, _mm512_castps_si512(load16<D>(x, i, count))));
      }
      const uint32_t bits = _mm512_reduce_max_epu32(largest);
      return load_unaligned<float>(&bits);
    } else {
      const auto* p = static_cast<const uint16_t*>(x);
      const __m512i magnitude = _mm512_set1_epi16(0x7fff);
      __m512i largest = _mm512_setzero_si512();
      int64_t i = 0;
      for (; i + 32 <= count; i += 32) {
        largest = _mm512_max_epu16(largest, _mm512_and_si512(magnitude, _mm512_loadu_si512(p + i)));
      }
      if (i < count) {
        largest = _mm512_max_epu16(
            largest, _mm512_and_si512(magnitude, _mm512_maskz_loadu_epi16(first32(count - i), p + i)));
      }
      const auto half = static_cast<uint16_t>(largest_u16(largest));
      return D == DType::kBFloat16 ? bf16_to_float(half) : _cvtsh_ss(half);
    }
  }

  template <DType D, bool kDivide>
  void encode(const void* x, int64_t count, float factor, uint8_t* packed) {
    const __m512 f = _mm512_set1_ps(factor);
    if constexpr (D == DType::kBFloat16)
      return encode_bf16<kDivide>(static_cast<const uint16_t*>(x), count, f, packed);
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
      const __m512i a = codes_of(scaled<kDivide>(load16<D>(x, i), f));
      const __m512i b = codes_of(scaled<kDivide>(load16<D>(x, i + 16), f));
      const __m512i c = codes_of(scaled<kDivide>(load16<D>(x, i + 32), f));
      const __m512i d = codes_of(scaled<kDivide>(load16<D>(x, i + 48), f));
      // Each 128-bit lane: four codes of a, of b, of c, of d; put the dwords in order.
      const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
      const __m512i ordered =
          _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + i / 2), pair_up(ordered));
    }
    for (; i < count; i += 32) {  // a zero past the end is coded as zero: the padding of an odd count
      const __m128i a = _mm512_cvtepi32_epi8(codes_of(scaled<kDivide>(load16<D>(x, i, count), f)));
      const __m128i b = _mm512_cvtepi32_epi8(codes_of(scaled<kDivide>(load16<D>(x, i + 16, count), f)));
      const __m256i pairs = pair_words(_mm256_set_m128i(b, a));
      _mm_mask_storeu_epi8(packed + i / 2, first16(ceil_div(count - i, 2)), _mm256_cvtepi16_epi8(pairs));
    }
  }

  template <DType D, bool kDivide>
  void encode_bytes(const void* x, int64_t count, float factor, uint8_t* codes) {
    const __m512 f = _mm512_set1_ps(factor);
    for (int64_t i = 0; i < count; i += 16) {
      const __m512i c = codes_of(scaled<kDivide>(load16<D>(x, i, count), f));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(c));
    }
  }

  void pack(const uint8_t* codes, int64_t count, uint8_t* packed) {
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + i / 2), pair_up(_mm512_loadu_si512(codes + i)));
    }
    for (; i < count; i += 32) {
      const __m256i c = _mm256_maskz_loadu_epi8(first32(count - i), codes + i);
      _mm_mask_storeu_epi8(packed + i / 2, first16((count - i) / 2), _mm256_cvtepi16_epi8(pair_words(c)));
    }
  }

 private:
  template <bool kDivide>
  void encode_bf16(const uint16_t* x, int64_t count, __m512 factor, uint8_t* packed) const {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
      const __m128i bytes = pairs_of<kDivide>(_mm512_loadu_si512(x + i), factor);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), bytes);
    }
    if (i < count) {  // a zero past the end is coded as zero: the padding of an odd count
      const __m128i bytes = pairs_of<kDivide>(_mm512_maskz_loadu_epi16(first32(count - i), x + i), factor);
      _mm_mask_storeu_epi8(packed + i / 2, first16(ceil_div(count - i, 2)), bytes);
    }
  }

  template <bool kDivide>
  static __m512 scaled(__m512 x, __m512 factor) {
    return kDivide ? _mm512_div_ps(x, factor) : _mm512_mul_ps(x, factor);
  }

  // Cells are a little narrower than the closest midpoints. |s| exceeds 1 by two roundings at most, which stays
  // inside 0..31; a NaN (of a weight that will be refused) reads some entry, and no memory.
  static __m512i cell_of(__m512 s) {
    const __m512 k = _mm512_set1_ps(15.99f);
    return _mm512_cvttps_epi32(_mm512_fmadd_ps(s, k, k));
  }

  // How many midpoints lie strictly below: those of the lower cells, and perhaps the one in its own.
  __m512i codes_of(__m512 s) const {
    const __m512i cell = cell_of(s);
    const __m512 bound = _mm512_permutex2var_ps(bound_low_, cell, bound_high_);
    const __m512i base = _mm512_permutex2var_epi32(base_low_, cell, base_high_);
    const __mmask16 above = _mm512_cmp_ps_mask(s, bound, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(base, above, base, _mm512_set1_epi32(1));
  }

  // 32 bfloat16 values to 16 bytes. A dword is two neighbours, the even one low; each is widened where it is.
  template <bool kDivide>
  __m128i pairs_of(__m512i x, __m512 factor) const {
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-65536)));
    const __m512i high = _mm512_slli_epi32(codes_of(scaled<kDivide>(even, factor)), 4);
    return _mm512_cvtepi32_epi8(_mm512_or_si512(high, codes_of(scaled<kDivide>(odd, factor))));
  }

  // 64 codes to 32 bytes, the even one high.
  static __m256i pair_up(__m512i codes) {
    return _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110)));
  }
  static __m256i pair_words(__m256i codes) { return _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110)); }

  __m512 bound_low_, bound_high_;
  __m512i base_low_, base_high_;
};

}  // namespace

Status nf4_quantize_avx512(const Nf4QuantizeArgs& args) { return quantize_with<Avx512Level>(args); }

}  // namespace fastlora::cpu
