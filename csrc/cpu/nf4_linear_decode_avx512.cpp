// A few rows of x against packed weights with AVX-512; nf4_linear_decode_driver.h has the plan. A run is 128
// columns: 64 packed bytes, one register.
//
// vpermw reads only the low five bits of an index and vpermps the low four, so the packed words (dwords) and their
// shifts are indices as they are. Integer route: codes are looked up 32 at a time and vpdpwssd multiplies; per 128
// weights 4 look-ups, 3 shifts, and for every row of x 4 products, one conversion and one FMA with absmax *
// xscale.
#include "nf4_linear_decode_driver.h"
#include "simd_avx512.h"

namespace fastlora::cpu {
namespace {

struct Avx512 {
  static constexpr int64_t kRun = 128;
  static constexpr int64_t kLanes = 16;
  static constexpr int64_t kAbsmaxSlack = 16;

  static void decode_absmax(const Nf4Scales& scales, const float* map, int64_t first, int64_t count, float* out) {
    decode_absmax_row(scales, map, first, count, out);
  }
  static bool split_integers(const Job& job, int i);
  static void split_floats(const Job& job, int i);
  static void rank_column(const Job& job, int64_t q);
  template <bool kInteger>
  static void outputs(const Job& job, const Row* rows, int count, int64_t begin, int64_t end);
};

constexpr int64_t kRun = Avx512::kRun;
constexpr int64_t kChunkRuns = 32;  // scales are decoded for so many runs at a time
constexpr int64_t kRunScales = kRun / kScaleColumns;
constexpr int64_t kBytesAhead = 16 << 10;  // of W asked for before their turn, in whole rows
constexpr int64_t kMostScales = kChunkRuns * kRun / kMinBlocksize + 16 + Avx512::kAbsmaxSlack;

// ---- splitting x ------------------------------------------------------------------------------------------

// Words 4i + s of 128, for i in 0..31: what the look-up with c = s ^ 1 meets.
inline __m512i every_fourth(const __m512i (&z)[4], int s) {
  alignas(64) int16_t index[32];
  for (int i = 0; i < 32; ++i) index[i] = static_cast<int16_t>(s + 4 * (i % 16));
  const __m512i pick = _mm512_load_si512(index);
  const __m512i low = _mm512_permutex2var_epi16(z[0], pick, z[1]);
  const __m512i high = _mm512_permutex2var_epi16(z[2], pick, z[3]);
  return _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
}

bool Avx512::split_integers(const Job& job, int i) {
  const int64_t k = job.a.weight.k;
  int16_t* out = job.integers(i);
  float* scales = job.scales(i);
  const void* x = job.x(i);
  for (int64_t run = 0; run < job.runs; ++run) {
    __m512 f[8];
    for (int v = 0; v < 8; ++v) {
      const int64_t column = run * kRun + v * 16;
      const __mmask16 mask = mask16(k - column);
      f[v] = mask == 0 ? _mm512_setzero_ps() : load16(element_ptr(x, column, job.a.dtype), job.a.dtype, mask);
    }
    __m512i words[4];
    for (int half = 0; half < 2; ++half) {
      const __m512* g = f + half * 4;
      const __m512 top01 = _mm512_max_ps(_mm512_abs_ps(g[0]), _mm512_abs_ps(g[1]));
      const __m512 top23 = _mm512_max_ps(_mm512_abs_ps(g[2]), _mm512_abs_ps(g[3]));
      const float top = _mm512_reduce_max_ps(_mm512_max_ps(top01, top23));
      // max drops a NaN in one operand: x - x is 0 unless x is NaN or Inf.
      const __m512 odd = _mm512_add_ps(_mm512_add_ps(_mm512_sub_ps(g[0], g[0]), _mm512_sub_ps(g[1], g[1])),
                                       _mm512_add_ps(_mm512_sub_ps(g[2], g[2]), _mm512_sub_ps(g[3], g[3])));
      if (_mm512_cmp_ps_mask(odd, _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0) return false;
      if (top != 0.0f && top < kTiniest) return false;
      // One outlier takes the others' bits: where most of the block's nonzero values lie far below top / 128, the
      // step of the integers would be coarser for them than bfloat16 is.
      const __m512 clip = _mm512_set1_ps(top * kOutlier);
      __m512 clipped = _mm512_setzero_ps();
      for (int v = 0; v < 4; ++v) {
        const __mmask16 zero = _mm512_cmp_ps_mask(g[v], _mm512_setzero_ps(), _CMP_EQ_OQ);
        clipped = _mm512_add_ps(clipped, _mm512_mask_mov_ps(_mm512_min_ps(_mm512_abs_ps(g[v]), clip), zero, clip));
      }
      if (_mm512_reduce_add_ps(clipped) < 16.0f * top * kOutlier) return false;
      const __m512 inverse = _mm512_set1_ps(top == 0.0f ? 0.0f : kXMax / top);
      scales[run * kRunScales + half] = top / (kXMax * kCodeUnit);
      for (int v = 0; v < 4; v += 2) {
        const __m256i low = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(g[v], inverse)));
        const __m256i high = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(g[v + 1], inverse)));
        words[half * 2 + v / 2] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      }
    }
    for (int c = 0; c < 4; ++c) _mm512_store_si512(out + (run * 4 + c) * 32, every_fourth(words, c ^ 1));
  }
  return true;
}

// Vector c of a run holds columns 8i + (c ^ 1).
void Avx512::split_floats(const Job& job, int i) {
  const int64_t k = job.a.weight.k;
  float* out = job.floats(i);
  const void* x = job.x(i);
  for (int64_t run = 0; run < job.runs; ++run) {
    alignas(64) float natural[kRun] = {};
    const int64_t count = min64(kRun, k - run * kRun);
    load_row_f32(element_ptr(x, run * kRun, job.a.dtype), job.a.dtype, count, 1.0f, natural);
    for (int64_t p = 0; p < kRun; ++p) out[run * kRun + p] = natural[8 * (p % 16) + ((p / 16) ^ 1)];
  }
}

// ---- u = x·Aᵀ, one rank for every row of x ----------------------------------------------------------------

void Avx512::rank_column(const Job& job, int64_t q) {
  const Nf4LinearArgs& a = job.a;
  const int64_t k = a.weight.k;
  __m512 sums[kMaxRows][2];
  for (int i = 0; i < job.rows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  const void* row = element_ptr(a.lora_a, q * k, a.lora_dtype);
  for (int64_t column = 0; column < k; column += 32) {
    for (int h = 0; h < 2; ++h) {
      const int64_t at = column + 16 * h;
      const __mmask16 mask = mask16(k - at);
      if (mask == 0) continue;
      const __m512 w = load16(element_ptr(row, at, a.lora_dtype), a.lora_dtype, mask);
      for (int i = 0; i < job.rows; ++i) {
        const __m512 x = load16(element_ptr(job.x(i), at, a.dtype), a.dtype, mask);
        sums[i][h] = _mm512_fmadd_ps(w, x, sums[i][h]);
      }
    }
  }
  for (int i = 0; i < job.rows; ++i) {
    const float u = _mm512_reduce_add_ps(_mm512_add_ps(sums[i][0], sums[i][1]));
    store_from_float(a.u, (job.row0 + i) * a.r + q, a.dtype, u);
  }
}

// ---- the pass over W ----------------------------------------------------------------------------------------

// One run of kOut rows of W, bytes_per_row apart, against kIn rows of x. scales[o][i]: absmax * xscale of the
// run's two blocks.
template <int kOut, int kIn, bool kWhole>
[[gnu::always_inline]] inline void integer_run(const uint8_t* bytes, int64_t bytes_per_row, __mmask64 mask,
                                               int64_t ahead, __m512i table, const Row* rows, int64_t run,
                                               const float (&scales)[kOut][kIn][kChunkRuns * kRunScales],
                                               int64_t chunk, __m512 (&sums)[kOut][kIn]) {
  __m512i values[kOut][4];
  for (int o = 0; o < kOut; ++o) {
    const uint8_t* here = bytes + o * bytes_per_row + run * 64;
    // To L2, which can wait for more lines at once than L1.
    __builtin_prefetch(here + ahead, 0, 2);
    const __m512i words = kWhole ? _mm512_loadu_si512(here) : _mm512_maskz_loadu_epi8(mask, here);
    for (int c = 0; c < 4; ++c) {
      values[o][c] = _mm512_permutexvar_epi16(c == 0 ? words : _mm512_srli_epi16(words, 4 * c), table);
    }
  }
  for (int i = 0; i < kIn; ++i) {
    const int16_t* x = rows[i].integers + run * kRun;
    __m512i x_words[4];
    for (int c = 0; c < 4; ++c) {
      x_words[c] = _mm512_load_si512(x + c * 32);
      // In a register, while there are enough: the compiler would load it again for every row of W.
      if constexpr (kIn <= 6) asm("" : "+v"(x_words[c]));
    }
    // Row by row of W within each look-up: their sums do not wait for each other.
    __m512i dot[kOut];
    for (int o = 0; o < kOut; ++o) dot[o] = _mm512_setzero_si512();
    for (int c = 0; c < 4; ++c) {
      for (int o = 0; o < kOut; ++o) dot[o] = _mm512_dpwssd_epi32(dot[o], values[o][c], x_words[c]);
    }
    for (int o = 0; o < kOut; ++o) {
      const float* pair = scales[o][i] + (run - chunk) * kRunScales;
      const __m512 scale = _mm512_mask_broadcastss_ps(_mm512_set1_ps(pair[0]), 0xff00, _mm_load_ss(pair + 1));
      sums[o][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[o]), scale, sums[o][i]);
    }
  }
}

// kOut rows of W from `n0` on, against kIn rows of x.
template <int kOut, int kIn>
void integer_pass(const Job& job, const Row* rows, int64_t n0, __m512 (&sums)[kOut][kIn]) {
  const Nf4Weight& w = job.a.weight;
  const float* map = nf4_dynamic_map();
  const int64_t bytes_per_row = w.k / 2;
  const int shift = __builtin_ctzll(static_cast<uint64_t>(w.blocksize));
  const uint8_t* bytes = w.packed + n0 * bytes_per_row;
  const int64_t ahead = max64(8, kBytesAhead / bytes_per_row) * bytes_per_row;
  alignas(32) int16_t codes[16];
  integer_codes(codes);
  const __m512i table = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(codes)));
  alignas(64) float absmax[kMostScales], scales[kOut][kIn][kChunkRuns * kRunScales];
  __m512 local[kOut][kIn];
  for (int o = 0; o < kOut; ++o) {
    for (int i = 0; i < kIn; ++i) local[o][i] = sums[o][i];
  }
  for (int64_t chunk = 0; chunk < job.runs; chunk += kChunkRuns) {
    const int64_t stop = min64(job.runs, chunk + kChunkRuns), whole = min64(stop, w.k / kRun);
    for (int o = 0; o < kOut; ++o) {
      chunk_scales<Avx512>(w, map, shift, n0 + o, chunk * kRun, min64(w.k, stop * kRun), absmax);
      for (int64_t b = 0; b < (stop - chunk) * kRunScales; b += 16) {
        for (int i = 0; i < kIn; ++i) {
          const __m512 x_scales = _mm512_loadu_ps(rows[i].scales + chunk * kRunScales + b);
          _mm512_store_ps(scales[o][i] + b, _mm512_mul_ps(_mm512_load_ps(absmax + b), x_scales));
        }
      }
    }
    for (int64_t run = chunk; run < whole; ++run) {
      integer_run<kOut, kIn, true>(bytes, bytes_per_row, 0, ahead, table, rows, run, scales, chunk, local);
    }
    if (whole < stop) {
      integer_run<kOut, kIn, false>(bytes, bytes_per_row, mask64((w.k - whole * kRun) / 2), 0, table, rows, whole,
                                    scales, chunk, local);
    }
  }
  for (int o = 0; o < kOut; ++o) {
    for (int i = 0; i < kIn; ++i) sums[o][i] = local[o][i];
  }
}

// The same in float32. Where no block ends inside the eight columns of a lane, their sum is scaled at once; else
// every weight is.
template <int kOut, int kIn>
void float_pass(const Job& job, const Row* rows, int64_t n0, __m512 (&sums)[kOut][kIn]) {
  const Nf4Weight& w = job.a.weight;
  const float* map = nf4_dynamic_map();
  const int64_t bytes_per_row = ceil_div(w.k, 2);
  const int64_t ahead = max64(8, kBytesAhead / bytes_per_row) * bytes_per_row;
  const int shift = __builtin_ctzll(static_cast<uint64_t>(w.blocksize));
  const __m128i shift_by = _mm_cvtsi32_si128(shift);
  const bool whole_lanes = w.k % 8 == 0;
  const __m512 codes = _mm512_loadu_ps(kNf4Codes);
  const __m512i lane8 = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
  const auto place_of = [&](int32_t column) {
    return _mm512_srl_epi32(_mm512_add_epi32(lane8, _mm512_set1_epi32(column)), shift_by);
  };
  const __m512i first_places = place_of(0);
  alignas(64) float scales[kOut][kMostScales];
  __m512 local[kOut][kIn];
  for (int o = 0; o < kOut; ++o) {
    for (int i = 0; i < kIn; ++i) local[o][i] = sums[o][i];
  }
  for (int64_t chunk = 0; chunk < job.runs; chunk += kChunkRuns) {
    const int64_t stop = min64(job.runs, chunk + kChunkRuns);
    int64_t first[kOut];
    for (int o = 0; o < kOut; ++o) {
      first[o] = chunk_absmax<Avx512>(w, map, shift, n0 + o, chunk * kRun, min64(w.k, stop * kRun), scales[o]);
    }
    for (int64_t run = chunk; run < stop; ++run) {
      __m512i words[kOut];
      __m512 absmax[kOut];  // of the run's blocks, 5 at most
      int32_t phase[kOut];
      for (int o = 0; o < kOut; ++o) {
        const int64_t flat = (n0 + o) * w.k + run * kRun, left = bytes_per_row - run * 64;
        const uint8_t* here = w.packed + (n0 + o) * bytes_per_row + run * 64;
        __builtin_prefetch(here + ahead, 0, 2);
        words[o] = left >= 64 ? _mm512_loadu_si512(here) : _mm512_maskz_loadu_epi8(mask64(left), here);
        absmax[o] = _mm512_loadu_ps(scales[o] + ((flat >> shift) - first[o]));
        phase[o] = static_cast<int32_t>(flat & (w.blocksize - 1));
      }
      const auto x_of = [&](int i, int c) { return _mm512_load_ps(rows[i].floats + run * kRun + c * 16); };
      const auto code_of = [&](int o, int c) {
        return _mm512_permutexvar_ps(c == 0 ? words[o] : _mm512_srli_epi32(words[o], 4 * c), codes);
      };
      if (whole_lanes) {
        __m512 parts[kOut][kIn];
        for (int c = 0; c < 8; ++c) {
          for (int o = 0; o < kOut; ++o) {
            const __m512 code = code_of(o, c);
            for (int i = 0; i < kIn; ++i) {
              parts[o][i] =
                  c == 0 ? _mm512_mul_ps(code, x_of(i, c)) : _mm512_fmadd_ps(code, x_of(i, c), parts[o][i]);
            }
          }
        }
        for (int o = 0; o < kOut; ++o) {
          const __m512 scale = _mm512_permutexvar_ps(phase[o] == 0 ? first_places : place_of(phase[o]), absmax[o]);
          for (int i = 0; i < kIn; ++i) local[o][i] = _mm512_fmadd_ps(parts[o][i], scale, local[o][i]);
        }
      } else {
        for (int o = 0; o < kOut; ++o) {
          for (int c = 0; c < 8; ++c) {
            const __m512 scale = _mm512_permutexvar_ps(place_of(phase[o] + (c ^ 1)), absmax[o]);
            const __m512 value = _mm512_mul_ps(code_of(o, c), scale);
            for (int i = 0; i < kIn; ++i) local[o][i] = _mm512_fmadd_ps(value, x_of(i, c), local[o][i]);
          }
        }
      }
    }
  }
  for (int o = 0; o < kOut; ++o) {
    for (int i = 0; i < kIn; ++i) sums[o][i] = _mm512_mul_ps(local[o][i], _mm512_set1_ps(rows[i].unit));
  }
}

template <int kOut, int kIn, bool kInteger>
void output_rows(const Job& job, const Row* rows, int64_t n0) {
  const Nf4LinearArgs& a = job.a;
  __m512 sums[kOut][kIn];
  for (int o = 0; o < kOut; ++o) {
    for (int i = 0; i < kIn; ++i) sums[o][i] = _mm512_setzero_ps();
  }
  if constexpr (kInteger) {
    integer_pass<kOut, kIn>(job, rows, n0, sums);
  } else {
    float_pass<kOut, kIn>(job, rows, n0, sums);
  }
  for (int o = 0; o < kOut; ++o) {
    for (int64_t q = 0; q < a.r; q += 16) {
      const __mmask16 mask = mask16(a.r - q);
      const __m512 b = load16(element_ptr(a.lora_b, (n0 + o) * a.r + q, a.lora_dtype), a.lora_dtype, mask);
      for (int i = 0; i < kIn; ++i) {
        sums[o][i] = _mm512_fmadd_ps(b, _mm512_load_ps(rows[i].low_rank + q), sums[o][i]);
      }
    }
    for (int64_t q = 0; q < a.weight.groups; q += 16) {
      const float* offsets = a.weight.offsets + (n0 + o) * a.weight.groups + q;
      const __m512 b = _mm512_maskz_loadu_ps(mask16(a.weight.groups - q), offsets);
      for (int i = 0; i < kIn; ++i) {
        sums[o][i] = _mm512_fmadd_ps(b, _mm512_load_ps(rows[i].sums + q), sums[o][i]);
      }
    }
    const float gain = a.gain == nullptr ? 1.0f : a.gain[n0 + o];
    const float bias = a.bias == nullptr ? 0.0f : load_as_float(a.bias, n0 + o, a.dtype);
    for (int i = 0; i < kIn; ++i) {
      const int64_t at = rows[i].index * a.weight.n + n0 + o;
      const float beside = a.addend == nullptr ? bias : bias + a.addend[at];
      store_from_float(a.y, at, a.dtype, _mm512_reduce_add_ps(sums[o][i]) * gain + beside);
    }
  }
}

template <int kOut, bool kInteger>
void output_group(const Job& job, const Row* rows, int count, int64_t n0) {
  switch (count) {
    case 1: output_rows<kOut, 1, kInteger>(job, rows, n0); return;
    case 2: output_rows<kOut, 2, kInteger>(job, rows, n0); return;
    case 3: output_rows<kOut, 3, kInteger>(job, rows, n0); return;
    case 4: output_rows<kOut, 4, kInteger>(job, rows, n0); return;
    default: break;
  }
  if constexpr (kInteger) {
    switch (count) {
      case 5: output_rows<kOut, 5, true>(job, rows, n0); return;
      case 6: output_rows<kOut, 6, true>(job, rows, n0); return;
      case 7: output_rows<kOut, 7, true>(job, rows, n0); return;
      default: output_rows<kOut, 8, true>(job, rows, n0); return;
    }
  }
}

// Two rows of W (four for one row of x) against as many rows of x as the registers hold: 8 in integers, 4 in
// floats. Looking up again what has just been brought to L1 is cheaper than spilling.
template <bool kInteger>
void Avx512::outputs(const Job& job, const Row* rows, int count, int64_t begin, int64_t end) {
  constexpr int kMost = kInteger ? 8 : 4;
  const int64_t step = count == 1 ? 4 : 2;
  const int passes = (count + kMost - 1) / kMost, some = (count + passes - 1) / passes;
  for (int64_t n = begin; n < end;) {
    const int64_t now = n + step <= end ? step : 1;
    for (int i = 0; i < count; i += some) {
      const int these = count - i < some ? count - i : some;
      if (now == 4) {
        output_rows<4, 1, kInteger>(job, rows, n);
      } else if (now == 2) {
        output_group<2, kInteger>(job, rows + i, these, n);
      } else {
        output_group<1, kInteger>(job, rows + i, these, n);
      }
    }
    n += now;
  }
}

}  // namespace

Status nf4_linear_decode_avx512(const Nf4LinearArgs& a) { return decode_linear<Avx512>(a); }

}  // namespace fastlora::cpu
