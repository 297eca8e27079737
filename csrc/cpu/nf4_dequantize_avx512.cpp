// nf4_dequantize with AVX-512: a block's 16 values are scaled and rounded once, then looked up.
#include <immintrin.h>

#include "fastlora/nf4.h"
#include "kernels.h"
#include "nf4_dequantize_driver.h"

namespace fastlora::cpu {
namespace {

inline __mmask32 first32(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1u; }
inline __mmask16 first16(int64_t n) {
  return n >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << n) - 1u);
}

// Round to nearest, ties to even; every NaN becomes a quiet one. The bfloat16 is left in the upper half.
inline __m512i round_to_bf16(__m512 f, bool finite) {
  const __m512i bits = _mm512_castps_si512(f);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  if (finite) return rounded;
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), quiet);
}

// A whole line, to an address that is a multiple of 64 where kStream.
template <bool kStream>
inline void store_line(void* p, __m512i v) {
  if constexpr (kStream) {
    _mm512_stream_si512(static_cast<__m512i*>(p), v);
  } else {
    _mm512_storeu_si512(p, v);
  }
}

class Avx512Level {
 public:
  static constexpr bool kStreams = true;
  static void drain() { _mm_sfence(); }

  template <DType D, bool kStream>
  void decode(const uint8_t* packed, int64_t count, float absmax, void* out) {
    const __m512i table = table_of<D>(absmax);
    int64_t i = 0;
    if constexpr (D == DType::kFloat32) {
      auto* y = static_cast<float*>(out);
      for (; i + 16 <= count; i += 16) {
        const __m512 values = look_up_f32(table, load_pairs8(packed + i / 2));
        store_line<kStream>(y + i, _mm512_castps_si512(values));
      }
      if (i < count) {
        alignas(16) uint8_t bytes[16] = {};
        std::memcpy(bytes, packed + i / 2, static_cast<size_t>((count - i + 1) / 2));
        _mm512_mask_storeu_ps(y + i, first16(count - i), look_up_f32(table, load_pairs8(bytes)));
      }
    } else {
      auto* y = static_cast<uint16_t*>(out);
      for (; i + 32 <= count; i += 32) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
        store_line<kStream>(y + i, look_up_16(table, bytes));
      }
      if (i < count) {
        const __m128i bytes = _mm_maskz_loadu_epi8(first16((count - i + 1) / 2), packed + i / 2);
        _mm512_mask_storeu_epi16(y + i, first32(count - i), look_up_16(table, bytes));
      }
    }
  }

  template <DType D>
  void decode_bytes(const uint8_t* codes, int64_t count, float absmax, void* out) {
    const __m512i table = table_of<D>(absmax);
    if constexpr (D == DType::kFloat32) {
      auto* y = static_cast<float*>(out);
      for (int64_t i = 0; i < count; i += 16) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
        const __m512 values = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(bytes), _mm512_castsi512_ps(table));
        _mm512_mask_storeu_ps(y + i, first16(count - i), values);
      }
    } else {
      auto* y = static_cast<uint16_t*>(out);
      for (int64_t i = 0; i < count; i += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        const __m512i values = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(bytes), table);
        _mm512_mask_storeu_epi16(y + i, first32(count - i), values);
      }
    }
  }

  void unpack(const uint8_t* packed, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; i += 64) {
      const __m256i bytes = _mm256_maskz_loadu_epi8(first32((count - i + 1) / 2), packed + i / 2);
      const __m512i words = _mm512_cvtepu8_epi16(bytes);
      const __m512i pairs = _mm512_or_si512(_mm512_srli_epi16(words, 4), _mm512_slli_epi16(words, 8));
      _mm512_storeu_si512(codes + i, _mm512_and_si512(pairs, _mm512_set1_epi8(15)));
    }
  }

 private:
  // float32: 16 values; 16-bit types: the same 16 in both halves, so that bit 4 of an index does not matter.
  template <DType D>
  static __m512i table_of(float absmax) {
    const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(kNf4Codes), _mm512_set1_ps(absmax));
    if constexpr (D == DType::kFloat32) return _mm512_castps_si512(values);
    if constexpr (D == DType::kBFloat16) {
      const bool finite = absmax - absmax == 0.0f;
      const __m512i upper_words =
          _mm512_setr_epi64(0x0007000500030001, 0x000f000d000b0009, 0x0017001500130011, 0x001f001d001b0019,
                            0x0007000500030001, 0x000f000d000b0009, 0x0017001500130011, 0x001f001d001b0019);
      return _mm512_permutexvar_epi16(upper_words, round_to_bf16(values, finite));
    }
    const __m256i half = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
  }

  // 8 bytes to 8 pairs of 32-bit indices whose low four bits are the codes.
  static __m512i load_pairs8(const uint8_t* packed) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
    const __m512i wide = _mm512_cvtepu8_epi64(bytes);
    return _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));
  }
  static __m512 look_up_f32(__m512i table, __m512i index) {
    return _mm512_permutexvar_ps(index, _mm512_castsi512_ps(table));
  }

  // 16 bytes to 32 values. Each byte is repeated four times, as two words: the first is indexed by the high
  // nibble, the second by the low one, for vpermw reads five bits and the fifth does not matter.
  static __m512i look_up_16(__m512i table, __m128i bytes) {
    const __m512i four_times = _mm512_setr_epi32(
        0x00000000, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606, 0x07070707, 0x08080808,
        0x09090909, 0x0a0a0a0a, 0x0b0b0b0b, 0x0c0c0c0c, 0x0d0d0d0d, 0x0e0e0e0e, 0x0f0f0f0f);
    const __m512i words = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), four_times);
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, _mm512_set1_epi32(4)), table);
  }
};

}  // namespace

Status nf4_dequantize_avx512(const Nf4DequantizeArgs& args) { return dequantize_with<Avx512Level>(args); }

}  // namespace fastlora::cpu
