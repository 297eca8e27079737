// A few rows of x against packed weights with AVX2; nf4_linear_decode_driver.h has the plan. A run is 64 columns:
// 32 packed bytes, one register.
//
// The 16-entry tables are looked up with vpshufb a byte plane at a time, even columns (high nibbles) and odd ones
// apart, and the planes are interleaved to whole values: two planes of 16-bit codes or four of float32. Integer
// route: per 64 weights 4 look-ups, 4 interleaves, and for every row of x 4 vpmaddwd, 3 sums, one conversion and
// one FMA with absmax * xscale.
#include <immintrin.h>

#include "nf4_linear_decode_driver.h"

namespace fastlora::cpu {
namespace {

struct Avx2 {
  static constexpr int64_t kRun = 64;
  static constexpr int64_t kLanes = 8;
  static constexpr int64_t kAbsmaxSlack = 8;

  static void decode_absmax(const Nf4Scales& scales, const float* map, int64_t first, int64_t count, float* out);
  static bool split_integers(const Job& job, int i);
  static void split_floats(const Job& job, int i);
  static void rank_column(const Job& job, int64_t q);
  template <bool kInteger>
  static void outputs(const Job& job, const Row* rows, int count, int64_t begin, int64_t end);
};

constexpr int64_t kRun = Avx2::kRun;
constexpr int kGroup = 8;                  // rows of W that go over a chunk of columns together
constexpr int64_t kChunkBytes = 16 << 10;  // of split x in such a chunk: half of L1
constexpr int64_t kMostRuns = 64;          // of a chunk
constexpr int64_t kMostScales = kMostRuns * kRun / kMinBlocksize + 8 + Avx2::kAbsmaxSlack;

inline __m256 load8(const void* p, DType dtype) {
  if (dtype == DType::kFloat32) return _mm256_loadu_ps(static_cast<const float*>(p));
  const __m128i h = _mm_loadu_si128(static_cast<const __m128i*>(p));
  if (dtype == DType::kFloat16) return _mm256_cvtph_ps(h);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

// Elements [first, first + 8) of `count`, zeros past the end; never reads past it.
inline __m256 load8_of(const void* p, int64_t first, int64_t count, DType dtype) {
  if (first + 8 <= count) return load8(element_ptr(p, first, dtype), dtype);
  alignas(32) float some[8] = {};
  for (int64_t i = first; i < count; ++i) some[i - first] = load_as_float(p, i, dtype);
  return _mm256_load_ps(some);
}

inline float sum8(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// ---- splitting x ------------------------------------------------------------------------------------------

// The interleaves work within 128-bit lanes, so the low lane of every vector holds columns 0-31 of the run and
// the high lane columns 32-63. Eight floats: vector v (+ 4) holds the even (odd) columns of 8v .. 8v + 7 and of
// 32 + 8v .. 32 + 8v + 7. Sixteen words: vector v (+ 2) those of 16v .. 16v + 15 and of 32 + 16v .. 32 + 16v + 15.

inline void columns_of_floats(const __m256 (&natural)[8], __m256 (&out)[8]) {
  for (int v = 0; v < 4; ++v) {
    const __m256 first = _mm256_permute2f128_ps(natural[v], natural[v + 4], 0x20);
    const __m256 second = _mm256_permute2f128_ps(natural[v], natural[v + 4], 0x31);
    out[v] = _mm256_shuffle_ps(first, second, 0x88);
    out[v + 4] = _mm256_shuffle_ps(first, second, 0xdd);
  }
}

inline void load_run(const Job& job, int i, int64_t run, __m256 (&out)[8]) {
  const int64_t k = job.a.weight.k;
  __m256 natural[8];
  for (int v = 0; v < 8; ++v) natural[v] = load8_of(job.x(i), run * kRun + v * 8, k, job.a.dtype);
  columns_of_floats(natural, out);
}

bool Avx2::split_integers(const Job& job, int i) {
  int16_t* out = job.integers(i);
  float* scales = job.scales(i);
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (int64_t run = 0; run < job.runs; ++run) {
    __m256 f[8];
    load_run(job, i, run, f);
    __m256 top = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    for (int v = 0; v < 8; ++v) {
      top = _mm256_max_ps(top, _mm256_and_ps(f[v], magnitude));
      odd = _mm256_or_ps(odd, _mm256_sub_ps(f[v], f[v]));  // 0 unless NaN or Inf, which max may drop
    }
    if (_mm256_movemask_ps(_mm256_cmp_ps(odd, odd, _CMP_UNORD_Q)) != 0) return false;
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    const float largest = _mm_cvtss_f32(_mm_max_ss(most, _mm_shuffle_ps(most, most, 1)));
    if (largest != 0.0f && largest < kTiniest) return false;
    // One outlier takes the others' bits: where most of the block's nonzero values lie far below largest / 128,
    // the step of the integers would be coarser for them than bfloat16 is.
    const __m256 clip = _mm256_set1_ps(largest * kOutlier);
    __m256 clipped = _mm256_setzero_ps();
    for (int v = 0; v < 8; ++v) {
      const __m256 zero = _mm256_cmp_ps(f[v], _mm256_setzero_ps(), _CMP_EQ_OQ);
      clipped = _mm256_add_ps(clipped,
                              _mm256_blendv_ps(_mm256_min_ps(_mm256_and_ps(f[v], magnitude), clip), clip, zero));
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, clipped);
    float total = 0.0f;
    for (float lane : lanes) total += lane;
    if (total < 16.0f * largest * kOutlier) return false;
    const __m256 inverse = _mm256_set1_ps(largest == 0.0f ? 0.0f : kXMax / largest);
    scales[run] = largest / (kXMax * kCodeUnit);
    for (int v = 0; v < 4; ++v) {
      const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(f[2 * v], inverse));
      const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(f[2 * v + 1], inverse));
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + run * kRun + v * 16), _mm256_packs_epi32(low, high));
    }
  }
  return true;
}

void Avx2::split_floats(const Job& job, int i) {
  float* out = job.floats(i);
  for (int64_t run = 0; run < job.runs; ++run) {
    __m256 f[8];
    load_run(job, i, run, f);
    for (int v = 0; v < 8; ++v) _mm256_store_ps(out + run * kRun + v * 8, f[v]);
  }
}

// ---- u = x·Aᵀ, one rank for every row of x ----------------------------------------------------------------

void Avx2::rank_column(const Job& job, int64_t q) {
  const Nf4LinearArgs& a = job.a;
  const int64_t k = a.weight.k;
  const void* row = element_ptr(a.lora_a, q * k, a.lora_dtype);
  __m256 sums[kMaxRows][2];
  for (int i = 0; i < job.rows; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_ps();
  for (int64_t column = 0; column < k; column += 16) {
    for (int h = 0; h < 2; ++h) {
      const int64_t at = column + 8 * h;
      if (at >= k) continue;
      const __m256 w = load8_of(row, at, k, a.lora_dtype);
      for (int i = 0; i < job.rows; ++i) {
        const __m256 x = load8_of(job.x(i), at, k, a.dtype);
        sums[i][h] = _mm256_fmadd_ps(w, x, sums[i][h]);
      }
    }
  }
  for (int i = 0; i < job.rows; ++i) {
    store_from_float(a.u, (job.row0 + i) * a.r + q, a.dtype, sum8(_mm256_add_ps(sums[i][0], sums[i][1])));
  }
}

// ---- the pass over W ----------------------------------------------------------------------------------------

// A table of 16 values as byte planes, each in both 128-bit lanes.
template <int kPlanes>
struct Planes {
  __m256i plane[kPlanes];

  template <class T>
  explicit Planes(const T (&values)[16]) {
    static_assert(sizeof(T) == kPlanes);
    for (int p = 0; p < kPlanes; ++p) {
      alignas(16) uint8_t bytes[16];
      for (int c = 0; c < 16; ++c) bytes[c] = reinterpret_cast<const uint8_t*>(values)[c * kPlanes + p];
      plane[p] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
    }
  }
};

void Avx2::decode_absmax(const Nf4Scales& scales, const float* map, int64_t first, int64_t count, float* out) {
  if (scales.nested == nullptr) {
    std::memcpy(out, scales.codes + first * 4, static_cast<size_t>(count) * 4);
    return;
  }
  const float offset = load_unaligned<float>(scales.nested);
  const uint8_t* codes = scales.codes + first;
  for (int64_t b = 0; b < count;) {  // one second-level scale at a time
    const int64_t group = (first + b) / kNestedBlocksize;
    const int64_t stop = min64(count, (group + 1) * kNestedBlocksize - first);
    const float scale = load_unaligned<float>(scales.nested + (1 + group) * 4);
    for (; b < stop; ++b) out[b] = map[codes[b]] * scale + offset;
  }
}

// 64 codes as 16-bit integers: even columns, then odd ones.
inline void look_up(const Planes<2>& table, __m256i packed, __m256i (&out)[4]) {
  const __m256i low4 = _mm256_set1_epi8(15);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low4);
  const __m256i odd = _mm256_and_si256(packed, low4);
  const __m256i even0 = _mm256_shuffle_epi8(table.plane[0], even),
                even1 = _mm256_shuffle_epi8(table.plane[1], even);
  const __m256i odd0 = _mm256_shuffle_epi8(table.plane[0], odd), odd1 = _mm256_shuffle_epi8(table.plane[1], odd);
  out[0] = _mm256_unpacklo_epi8(even0, even1);
  out[1] = _mm256_unpackhi_epi8(even0, even1);
  out[2] = _mm256_unpacklo_epi8(odd0, odd1);
  out[3] = _mm256_unpackhi_epi8(odd0, odd1);
}

// 64 codes as float32: even columns, then odd ones.
inline void look_up(const Planes<4>& table, __m256i packed, __m256 (&out)[8]) {
  const __m256i low4 = _mm256_set1_epi8(15);
  const __m256i index[2] = {_mm256_and_si256(_mm256_srli_epi16(packed, 4), low4), _mm256_and_si256(packed, low4)};
  for (int h = 0; h < 2; ++h) {
    __m256i byte[4];
    for (int p = 0; p < 4; ++p) byte[p] = _mm256_shuffle_epi8(table.plane[p], index[h]);
    const __m256i low[2] = {_mm256_unpacklo_epi8(byte[0], byte[1]), _mm256_unpackhi_epi8(byte[0], byte[1])};
    const __m256i high[2] = {_mm256_unpacklo_epi8(byte[2], byte[3]), _mm256_unpackhi_epi8(byte[2], byte[3])};
    for (int w = 0; w < 2; ++w) {
      out[4 * h + 2 * w] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[w], high[w]));
      out[4 * h + 2 * w + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[w], high[w]));
    }
  }
}

// Both passes add kGroup rows of W (or `count`, at the end) from `n0` on, against kIn rows of x, to `sums`. They
// go over the columns in chunks whose x stays in L1 while the rows of the group go by, each asking for the bytes
// of the second row after it.
template <int kIn>
void integer_pass(const Job& job, const Row* rows, int64_t n0, int count, __m256 (&sums)[kGroup][kIn]) {
  constexpr int64_t kChunkRuns = min64(kMostRuns, kChunkBytes / (kIn * kRun * 2));
  const Nf4Weight& w = job.a.weight;
  const float* map = nf4_dynamic_map();
  const int64_t bytes_per_row = w.k / 2;
  const int shift = __builtin_ctzll(static_cast<uint64_t>(w.blocksize));
  int16_t codes[16];
  integer_codes(codes);
  const Planes<2> table(codes);
  alignas(32) float scales[kMostScales], products[kIn][kMostRuns];
  for (int64_t chunk = 0; chunk < job.runs; chunk += kChunkRuns) {
    const int64_t stop = min64(job.runs, chunk + kChunkRuns);
    for (int o = 0; o < count; ++o) {
      chunk_scales<Avx2>(w, map, shift, n0 + o, chunk * kRun, stop * kRun, scales);
      for (int64_t run = chunk; run < stop; run += 8) {
        const __m256 absmax = _mm256_load_ps(scales + (run - chunk));
        for (int i = 0; i < kIn; ++i) {
          _mm256_store_ps(products[i] + (run - chunk),
                          _mm256_mul_ps(absmax, _mm256_loadu_ps(rows[i].scales + run)));
        }
      }
      const uint8_t* bytes = w.packed + (n0 + o) * bytes_per_row;
      __m256 acc[kIn];
      for (int i = 0; i < kIn; ++i) acc[i] = sums[o][i];
      for (int64_t run = chunk; run < stop; ++run) {
        if (run % 2 == 0) __builtin_prefetch(bytes + 2 * bytes_per_row + run * 32, 0, 2);  // to L2
        __m256i values[4];
        look_up(table, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + run * 32)), values);
        for (int i = 0; i < kIn; ++i) {
          const auto* x = reinterpret_cast<const __m256i*>(rows[i].integers + run * kRun);
          __m256i dot[4];
          for (int v = 0; v < 4; ++v) dot[v] = _mm256_madd_epi16(values[v], _mm256_load_si256(x + v));
          const __m256i total =
              _mm256_add_epi32(_mm256_add_epi32(dot[0], dot[1]), _mm256_add_epi32(dot[2], dot[3]));
          const __m256 scale = _mm256_broadcast_ss(products[i] + (run - chunk));
          acc[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, acc[i]);
        }
      }
      for (int i = 0; i < kIn; ++i) sums[o][i] = acc[i];
    }
  }
}

// The absmax of each of the eight columns of vector v of a run. `absmax` points at that of the run's first column,
// which is the phase-th of its block; a run meets three blocks at most, and eight floats can be read.
inline __m256 column_scales(const float* absmax, int64_t phase, int shift, int v) {
  const __m256i column = _mm256_setr_epi32(0, 2, 4, 6, 32, 34, 36, 38);
  const __m256i place =
      _mm256_add_epi32(column, _mm256_set1_epi32(static_cast<int32_t>(phase) + v % 4 * 8 + v / 4));
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(absmax), _mm256_srl_epi32(place, _mm_cvtsi32_si128(shift)));
}

template <int kIn>
void float_pass(const Job& job, const Row* rows, int64_t n0, int count, __m256 (&sums)[kGroup][kIn]) {
  constexpr int64_t kChunkRuns = min64(kMostRuns, kChunkBytes / (kIn * kRun * 4));
  const Nf4Weight& w = job.a.weight;
  const float* map = nf4_dynamic_map();
  const int64_t bytes_per_row = ceil_div(w.k, 2);
  const int shift = __builtin_ctzll(static_cast<uint64_t>(w.blocksize));
  const Planes<4> table(kNf4Codes);
  alignas(32) float scales[kMostScales];
  for (int64_t chunk = 0; chunk < job.runs; chunk += kChunkRuns) {
    const int64_t stop = min64(job.runs, chunk + kChunkRuns);
    for (int o = 0; o < count; ++o) {
      const int64_t first =
          chunk_absmax<Avx2>(w, map, shift, n0 + o, chunk * kRun, min64(w.k, stop * kRun), scales);
      const uint8_t* bytes = w.packed + (n0 + o) * bytes_per_row;
      __m256 acc[kIn];
      for (int i = 0; i < kIn; ++i) acc[i] = sums[o][i];
      for (int64_t run = chunk; run < stop; ++run) {
        if (run % 2 == 0) __builtin_prefetch(bytes + 2 * bytes_per_row + run * 32, 0, 2);  // to L2
        const int64_t flat = (n0 + o) * w.k + run * kRun, phase = flat & (w.blocksize - 1);
        const float* absmax = scales + ((flat >> shift) - first);
        const uint8_t* here = bytes + run * 32;
        alignas(32) uint8_t tail[32] = {};
        if (bytes_per_row - run * 32 < 32) {
          std::memcpy(tail, here, static_cast<size_t>(bytes_per_row - run * 32));
          here = tail;
        }
        __m256 values[8];
        look_up(table, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(here)), values);
        const bool one_block = phase + kRun <= w.blocksize;
        for (int v = 0; v < 8; ++v) {
          const __m256 scale = one_block ? _mm256_broadcast_ss(absmax) : column_scales(absmax, phase, shift, v);
          values[v] = _mm256_mul_ps(values[v], scale);
        }
        for (int i = 0; i < kIn; ++i) {
          const float* x = rows[i].floats + run * kRun;
          __m256 part[2];  // short chains: eight FMAs in a row on one register would wait for each other
          for (int h = 0; h < 2; ++h) {
            part[h] = _mm256_mul_ps(values[4 * h], _mm256_load_ps(x + h * 32));
            for (int v = 1; v < 4; ++v) {
              part[h] = _mm256_fmadd_ps(values[4 * h + v], _mm256_load_ps(x + h * 32 + v * 8), part[h]);
            }
          }
          acc[i] = _mm256_add_ps(acc[i], _mm256_add_ps(part[0], part[1]));
        }
      }
      for (int i = 0; i < kIn; ++i) sums[o][i] = acc[i];
    }
  }
}

// Rows of W [n0, n0 + count) against kIn rows of x.
template <int kIn, bool kInteger>
void group_outputs(const Job& job, const Row* rows, int64_t n0, int count) {
  const Nf4LinearArgs& a = job.a;
  __m256 sums[kGroup][kIn];
  for (int o = 0; o < count; ++o) {
    for (int i = 0; i < kIn; ++i) sums[o][i] = _mm256_setzero_ps();
  }
  if constexpr (kInteger) {
    integer_pass<kIn>(job, rows, n0, count, sums);
  } else {
    float_pass<kIn>(job, rows, n0, count, sums);
  }
  if constexpr (!kInteger) {
    for (int o = 0; o < count; ++o) {
      for (int i = 0; i < kIn; ++i) sums[o][i] = _mm256_mul_ps(sums[o][i], _mm256_set1_ps(rows[i].unit));
    }
  }
  for (int o = 0; o < count; ++o) {
    const void* lora_b = a.r == 0 ? nullptr : element_ptr(a.lora_b, (n0 + o) * a.r, a.lora_dtype);
    for (int64_t q = 0; q < a.r; q += 8) {
      const __m256 b = load8_of(lora_b, q, a.r, a.lora_dtype);
      for (int i = 0; i < kIn; ++i) {
        sums[o][i] = _mm256_fmadd_ps(b, _mm256_load_ps(rows[i].low_rank + q), sums[o][i]);
      }
    }
    const int64_t groups = a.weight.groups;
    const float* offsets = groups == 0 ? nullptr : a.weight.offsets + (n0 + o) * groups;
    for (int64_t q = 0; q < groups; q += 8) {
      const __m256 b = load8_of(offsets, q, groups, DType::kFloat32);
      for (int i = 0; i < kIn; ++i) {
        sums[o][i] = _mm256_fmadd_ps(b, _mm256_load_ps(rows[i].sums + q), sums[o][i]);
      }
    }
    const float gain = a.gain == nullptr ? 1.0f : a.gain[n0 + o];
    const float bias = a.bias == nullptr ? 0.0f : load_as_float(a.bias, n0 + o, a.dtype);
    for (int i = 0; i < kIn; ++i) {
      const int64_t at = rows[i].index * a.weight.n + n0 + o;
      const float beside = a.addend == nullptr ? bias : bias + a.addend[at];
      store_from_float(a.y, at, a.dtype, sum8(sums[o][i]) * gain + beside);
    }
  }
}

// Up to four rows of x at once: the accumulators and look-ups of more do not fit the 16 registers, and looking up
// again the few kilobytes of W that a group has just brought to L1 is cheaper than spilling.
template <bool kInteger>
void Avx2::outputs(const Job& job, const Row* rows, int count, int64_t begin, int64_t end) {
  for (int64_t n0 = begin; n0 < end; n0 += kGroup) {
    const int group = static_cast<int>(min64(kGroup, end - n0));
    for (int i = 0; i < count;) {
      const int left = count - i, now = left > 4 && left < 8 ? (left + 1) / 2 : (left < 4 ? left : 4);
      switch (now) {
        case 1: group_outputs<1, kInteger>(job, rows + i, n0, group); break;
        case 2: group_outputs<2, kInteger>(job, rows + i, n0, group); break;
        case 3: group_outputs<3, kInteger>(job, rows + i, n0, group); break;
        default: group_outputs<4, kInteger>(job, rows + i, n0, group); break;
      }
      i += now;
    }
  }
}

}  // namespace

Status nf4_linear_decode_avx2(const Nf4LinearArgs& a) { return decode_linear<Avx2>(a); }

}  // namespace fastlora::cpu
