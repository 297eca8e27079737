// nf4_dequantize with AVX2: a block's 16 values are scaled and rounded once, then looked up by byte shuffles.
#include <immintrin.h>

#include "fastlora/nf4.h"
#include "kernels.h"
#include "nf4_dequantize_driver.h"

namespace fastlora::cpu {
namespace {

inline __m128i load128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// Round to nearest, ties to even; every NaN becomes a quiet one. The bfloat16 is left in the upper half.
inline __m256i round_to_bf16(__m256 f) {
  const __m256i bits = _mm256_castps_si256(f);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}

// To an address that is a multiple of 32 where kStream.
template <bool kStream>
inline void store256(void* p, __m256i v) {
  if constexpr (kStream) {
    _mm256_stream_si256(static_cast<__m256i*>(p), v);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  }
}

// 16 values of D. float32: as they are; 16-bit types: their low bytes and their high bytes, in both lanes.
template <DType D>
struct Table {
  __m256i low, high;

  explicit Table(float absmax) {
    const __m256 scale = _mm256_set1_ps(absmax);
    const __m256 a = _mm256_mul_ps(_mm256_loadu_ps(kNf4Codes), scale);
    const __m256 b = _mm256_mul_ps(_mm256_loadu_ps(kNf4Codes + 8), scale);
    if constexpr (D == DType::kFloat32) {
      low = _mm256_castps_si256(a);
      high = _mm256_castps_si256(b);
      return;
    }
    __m128i first, second;  // values 0..7 and 8..15, as 16-bit words
    if constexpr (D == DType::kBFloat16) {
      const __m256i words =
          _mm256_packus_epi32(_mm256_srli_epi32(round_to_bf16(a), 16), _mm256_srli_epi32(round_to_bf16(b), 16));
      const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
      first = _mm256_castsi256_si128(ordered);
      second = _mm256_extracti128_si256(ordered, 1);
    } else {
      first = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      second = _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    const __m128i byte = _mm_set1_epi16(0xff);
    low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte)));
    high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
  }

  // 32 codes, one a byte, to 32 values at `out`.
  template <bool kStream>
  void look_up(__m256i codes, void* out) const {
    if constexpr (D == DType::kFloat32) {
      auto* y = static_cast<float*>(out);
      __m128i sixteen = _mm256_castsi256_si128(codes);
      for (int part = 0; part < 2; ++part) {
        store8<kStream>(y + 16 * part, sixteen);
        store8<kStream>(y + 16 * part + 8, _mm_srli_si128(sixteen, 8));
        sixteen = _mm256_extracti128_si256(codes, 1);
      }
    } else {
      const __m256i lows = _mm256_shuffle_epi8(low, codes), highs = _mm256_shuffle_epi8(high, codes);
      const __m256i a = _mm256_unpacklo_epi8(lows, highs);  // values 0..7 and 16..23
      const __m256i b = _mm256_unpackhi_epi8(lows, highs);  // values 8..15 and 24..31
      auto* y = static_cast<__m256i*>(out);
      store256<kStream>(y, _mm256_permute2x128_si256(a, b, 0x20));
      store256<kStream>(y + 1, _mm256_permute2x128_si256(a, b, 0x31));
    }
  }

 private:
  template <bool kStream>
  void store8(float* y, __m128i codes) const {
    const __m256i index = _mm256_cvtepu8_epi32(codes);
    const __m256 of_low = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(low), index);
    const __m256 of_high = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(high), index);
    const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 to the sign
    store256<kStream>(y, _mm256_castps_si256(_mm256_blendv_ps(of_low, of_high, is_high)));
  }
};

// 16 bytes to 32 codes, one a byte, in order.
inline __m256i unpack32(__m128i bytes) {
  const __m128i nibble = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), odd = _mm_and_si128(bytes, nibble);
  return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

struct Avx2Level {
  static constexpr bool kStreams = true;
  static void drain() { _mm_sfence(); }

  template <DType D, bool kStream>
  void decode(const uint8_t* packed, int64_t count, float absmax, void* out) {
    const Table<D> table(absmax);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
      table.template look_up<kStream>(unpack32(load128(packed + i / 2)), element_ptr(out, i, D));
    }
    if (i < count) {
      alignas(16) uint8_t bytes[16] = {};
      std::memcpy(bytes, packed + i / 2, static_cast<size_t>((count - i + 1) / 2));
      store_tail(table, unpack32(load128(bytes)), count - i, element_ptr(out, i, D));
    }
  }

  template <DType D>
  void decode_bytes(const uint8_t* codes, int64_t count, float absmax, void* out) {
    const Table<D> table(absmax);
    for (int64_t i = 0; i < count; i += 32) {
      const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
      if (i + 32 <= count) {
        table.template look_up<false>(c, element_ptr(out, i, D));
      } else {
        store_tail(table, c, count - i, element_ptr(out, i, D));
      }
    }
  }

  void unpack(const uint8_t* packed, int64_t count, uint8_t* codes) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), unpack32(load128(packed + i / 2)));
    }
    for (; i < count; ++i) codes[i] = i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
  }

 private:
  template <DType D>
  static void store_tail(const Table<D>& table, __m256i codes, int64_t count, void* out) {
    alignas(32) unsigned char values[32 * (D == DType::kFloat32 ? 4 : 2)];
    table.template look_up<false>(codes, values);
    std::memcpy(out, values, static_cast<size_t>(count * dtype_bytes(D)));
  }
};

}  // namespace

Status nf4_dequantize_avx2(const Nf4DequantizeArgs& args) { return dequantize_with<Avx2Level>(args); }

}  // namespace fastlora::cpu
