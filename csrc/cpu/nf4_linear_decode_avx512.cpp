// A few rows of x against packed weights with AVX-512: one pass over the bytes of W, nothing dequantised to
// memory, the low-rank term and the bias added to the same accumulators.
//
// Integer route (16-bit x, whole 64-column blocks): codes are 14-bit integers round(8191 * code), looked up 32
// at a time; x is split once into 16-bit integers with one scale per 64 columns; vpdpwssd multiplies them into
// exact int32. Per 128 weights: 4 look-ups, 3 shifts, 4 products a row of x, one conversion and one FMA with
// absmax * xscale. Rounding x and the codes costs 8e-5 of relative error; rounding W to bfloat16 costs 1.7e-3.
//
// Float route (float32 x, ragged shapes, rows of x that hold NaN, Inf or magnitudes an integer scale cannot
// carry): code * absmax in float32, the dequantised weight itself, and FMA.
#include "kernels.h"
#include "parallel.h"
#include "simd_avx512.h"

namespace fastlora::cpu {
namespace {

constexpr int kMaxRows = 8;
constexpr int64_t kRun = 128;       // columns of 64 packed bytes
constexpr int64_t kChunkRuns = 32;  // scales are decoded for so many runs at a time
constexpr int64_t kChunkScales = kChunkRuns * kRun / kMinBlocksize + 32;
constexpr float kXMax = 32767.0f;       // as fine as int32 allows: a lane sums 8 products, and
constexpr float kCodeUnit = 8191.0f;    // 8 * 8191 * 32767 < 2^31
constexpr float kTiniest = 1e-28f;      // below, scales come near float32's subnormals
constexpr float kOutlier = 1.0f / 128;  // of a block's largest magnitude: still as fine as bfloat16

struct Row {
  const int16_t* integers;  // [run][4 look-ups][32], the integer route
  const float* scales;      // [run][16]: 8 lanes for each block of 64
  const float* floats;      // [run][8 look-ups][16], the float route
  const float* low_rank;    // [r_pad]: scaling * u
  int64_t index;            // row of y
};

struct Job {
  const Nf4LinearArgs& a;
  int64_t row0;  // rows [row0, row0 + rows) of x are this job's
  int rows;
  int64_t runs, r_pad;
  bool blocks_aligned;  // every 64 columns of W have one absmax
  uint8_t* scratch;
  int64_t row_bytes;  // of scratch, a row of x
  bool integer_row[kMaxRows];

  float* floats(int i) const { return reinterpret_cast<float*>(scratch + i * row_bytes); }
  int16_t* integers(int i) const { return reinterpret_cast<int16_t*>(scratch + i * row_bytes); }
  float* scales(int i) const { return reinterpret_cast<float*>(integers(i) + runs * kRun); }
  float* low_rank(int i) const { return reinterpret_cast<float*>(scratch + i * row_bytes + runs * kRun * 4); }
};

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

bool split_integers(const Job& job, int i) {
  const int64_t k = job.a.weight.k;
  int16_t* out = job.integers(i);
  float* scales = job.scales(i);
  const void* x = element_ptr(job.a.x, (job.row0 + i) * k, job.a.dtype);
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
      const __m512 scale = _mm512_set1_ps(top / (kXMax * kCodeUnit));
      _mm512_mask_storeu_ps(scales + run * 16, half == 0 ? 0x00ff : 0xff00, scale);
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
void split_floats(const Job& job, int i) {
  const int64_t k = job.a.weight.k;
  float* out = job.floats(i);
  const void* x = element_ptr(job.a.x, (job.row0 + i) * k, job.a.dtype);
  for (int64_t run = 0; run < job.runs; ++run) {
    alignas(64) float natural[kRun] = {};
    const int64_t count = min64(kRun, k - run * kRun);
    load_row_f32(element_ptr(x, run * kRun, job.a.dtype), job.a.dtype, count, 1.0f, natural);
    for (int64_t p = 0; p < kRun; ++p) out[run * kRun + p] = natural[8 * (p % 16) + ((p / 16) ^ 1)];
  }
}

void split_row(Job& job, int i) {
  job.integer_row[i] = job.a.dtype != DType::kFloat32 && job.blocks_aligned && split_integers(job, i);
  if (!job.integer_row[i]) split_floats(job, i);
}

// ---- u = x·Aᵀ, one rank for every row of x ----------------------------------------------------------------

void rank_column(const Job& job, int64_t q) {
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
        const __m512 x = load16(element_ptr(a.x, (job.row0 + i) * k + at, a.dtype), a.dtype, mask);
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

// Scales of the blocks that columns [k0, k1) of `row` meet, zeros for a run past the end.
inline int64_t chunk_scales(const Nf4Weight& w, const float* map, int64_t row, int64_t k0, int64_t k1,
                            float* out) {
  const int64_t first = (row * w.k + k0) / w.blocksize, last = (row * w.k + k1 - 1) / w.blocksize;
  decode_absmax_row(w.scales, map, first, last - first + 1, out);
  _mm512_storeu_ps(out + (last - first + 1), _mm512_setzero_ps());
  return first;
}

// kOut rows of W from `n0` on, against kIn rows of x; sums are added to.
template <int kOut, int kIn>
void integer_pass(const Job& job, const Row* rows, int64_t n0, __m512 (&sums)[kOut][kIn]) {
  const Nf4Weight& w = job.a.weight;
  const float* map = nf4_dynamic_map();
  const int64_t bytes_per_row = w.k / 2;
  const int shift = __builtin_ctzll(static_cast<uint64_t>(w.blocksize));
  alignas(64) int16_t codes[32];
  for (int c = 0; c < 32; ++c) {
    const float scaled = kNf4Codes[c % 16] * kCodeUnit;
    codes[c] = static_cast<int16_t>(scaled < 0.0f ? scaled - 0.5f : scaled + 0.5f);
  }
  const __m512i table = _mm512_load_si512(codes);
  const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  alignas(64) float scales[kOut][kChunkScales];
  for (int64_t chunk = 0; chunk < job.runs; chunk += kChunkRuns) {
    const int64_t stop = min64(job.runs, chunk + kChunkRuns), k0 = chunk * kRun;
    int64_t first[kOut];
    for (int o = 0; o < kOut; ++o) {
      first[o] = chunk_scales(w, map, n0 + o, k0, min64(w.k, stop * kRun), scales[o]);
    }
    for (int64_t run = chunk; run < stop; ++run) {
      __m512i values[kOut][4];
      __m512 absmax[kOut];
      for (int o = 0; o < kOut; ++o) {
        const int64_t flat = (n0 + o) * w.k + run * kRun;
        const uint8_t* bytes = w.packed + (n0 + o) * bytes_per_row + run * 64;
        // The rows that come next, while these are worked on: each is a stream too short for the hardware to
        // follow.
        if (n0 + o + 2 * kOut < w.n) __builtin_prefetch(bytes + 2 * kOut * bytes_per_row);
        const __m512i words = (run + 1) * kRun <= w.k
                                  ? _mm512_loadu_si512(bytes)
                                  : _mm512_maskz_loadu_epi8(mask64((w.k - run * kRun) / 2), bytes);
        for (int c = 0; c < 4; ++c) {
          values[o][c] = _mm512_permutexvar_epi16(c == 0 ? words : _mm512_srli_epi16(words, 4 * c), table);
        }
        if (shift == 6) {  // two neighbours: one 8-byte broadcast
          const __m512 pair =
              _mm512_castpd_ps(_mm512_set1_pd(load_unaligned<double>(scales[o] + ((flat >> 6) - first[o]))));
          absmax[o] = _mm512_permutexvar_ps(halves, pair);
        } else {
          absmax[o] = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scales[o][(flat >> shift) - first[o]]),
                                           _mm512_set1_ps(scales[o][((flat + 64) >> shift) - first[o]]));
        }
      }
      for (int i = 0; i < kIn; ++i) {
        const int16_t* x = rows[i].integers + run * kRun;
        const __m512 x_scale = _mm512_load_ps(rows[i].scales + run * 16);
        __m512i x_words[4];
        for (int c = 0; c < 4; ++c) x_words[c] = _mm512_load_si512(x + c * 32);
        for (int o = 0; o < kOut; ++o) {
          __m512i dot = _mm512_setzero_si512();
          for (int c = 0; c < 4; ++c) dot = _mm512_dpwssd_epi32(dot, values[o][c], x_words[c]);
          sums[o][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(absmax[o], x_scale), sums[o][i]);
        }
      }
    }
  }
}

template <int kOut, int kIn>
void float_pass(const Job& job, const Row* rows, int64_t n0, __m512 (&sums)[kOut][kIn]) {
  const Nf4Weight& w = job.a.weight;
  const float* map = nf4_dynamic_map();
  const int64_t bytes_per_row = ceil_div(w.k, 2);
  const int shift = __builtin_ctzll(static_cast<uint64_t>(w.blocksize));
  const __m128i shift_by = _mm_cvtsi32_si128(shift);
  const __m512 codes = _mm512_loadu_ps(kNf4Codes);
  const __m512i lane8 = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
  alignas(64) float scales[kOut][kChunkScales];
  for (int64_t chunk = 0; chunk < job.runs; chunk += kChunkRuns) {
    const int64_t stop = min64(job.runs, chunk + kChunkRuns);
    int64_t first[kOut];
    for (int o = 0; o < kOut; ++o) {
      first[o] = chunk_scales(w, map, n0 + o, chunk * kRun, min64(w.k, stop * kRun), scales[o]);
    }
    for (int64_t run = chunk; run < stop; ++run) {
      for (int o = 0; o < kOut; ++o) {
        const int64_t flat = (n0 + o) * w.k + run * kRun;
        const auto phase = static_cast<int32_t>(flat & (w.blocksize - 1));
        const __m512 absmax = _mm512_loadu_ps(scales[o] + ((flat >> shift) - first[o]));  // at most 5 are used
        const __m512i words = _mm512_maskz_loadu_epi8(mask64(bytes_per_row - run * 64),
                                                      w.packed + (n0 + o) * bytes_per_row + run * 64);
        const bool whole_lanes = phase % 8 == 0;  // no block ends inside a lane's eight columns
        __m512 scale = _mm512_setzero_ps();
        if (whole_lanes) {
          scale = _mm512_permutexvar_ps(
              _mm512_srl_epi32(_mm512_add_epi32(lane8, _mm512_set1_epi32(phase)), shift_by), absmax);
        }
        for (int c = 0; c < 8; ++c) {
          if (!whole_lanes) {
            const __m512i place = _mm512_add_epi32(lane8, _mm512_set1_epi32(phase + (c ^ 1)));
            scale = _mm512_permutexvar_ps(_mm512_srl_epi32(place, shift_by), absmax);
          }
          const __m512 value = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * c), codes), scale);
          for (int i = 0; i < kIn; ++i) {
            sums[o][i] = _mm512_fmadd_ps(value, _mm512_load_ps(rows[i].floats + run * kRun + c * 16), sums[o][i]);
          }
        }
      }
    }
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
    const float bias = a.bias == nullptr ? 0.0f : load_as_float(a.bias, n0 + o, a.dtype);
    for (int i = 0; i < kIn; ++i) {
      store_from_float(a.y, rows[i].index * a.weight.n + n0 + o, a.dtype, _mm512_reduce_add_ps(sums[o][i]) + bias);
    }
  }
}

// Rows of W [begin, end) against `count` rows of x, kOut of W at a time.
template <int kIn, bool kInteger>
void outputs(const Job& job, const Row* rows, int64_t begin, int64_t end) {
  constexpr int kOut = kInteger ? (kIn == 1 ? 4 : 2) : (kIn == 1 ? 2 : 1);
  int64_t n = begin;
  for (; n + kOut <= end; n += kOut) output_rows<kOut, kIn, kInteger>(job, rows, n);
  for (; n < end; ++n) output_rows<1, kIn, kInteger>(job, rows, n);
}

template <bool kInteger>
void outputs_of(const Job& job, const Row* rows, int count, int64_t begin, int64_t end) {
  switch (count) {
    case 0: break;
    case 1: outputs<1, kInteger>(job, rows, begin, end); break;
    case 2: outputs<2, kInteger>(job, rows, begin, end); break;
    case 3: outputs<3, kInteger>(job, rows, begin, end); break;
    case 4: outputs<4, kInteger>(job, rows, begin, end); break;
    case 5: outputs<5, kInteger>(job, rows, begin, end); break;
    case 6: outputs<6, kInteger>(job, rows, begin, end); break;
    case 7: outputs<7, kInteger>(job, rows, begin, end); break;
    default: outputs<8, kInteger>(job, rows, begin, end); break;
  }
}

void first_phase(void* context, int64_t begin, int64_t end) {
  Job& job = *static_cast<Job*>(context);
  for (int64_t unit = begin; unit < end; ++unit) {
    if (unit < job.rows) {
      split_row(job, static_cast<int>(unit));
    } else {
      rank_column(job, unit - job.rows);
    }
  }
}

void second_phase(void* context, int64_t begin, int64_t end) {
  const Job& job = *static_cast<const Job*>(context);
  Row integer[kMaxRows], real[kMaxRows];
  int integers = 0, reals = 0;
  for (int i = 0; i < job.rows; ++i) {
    Row& row = job.integer_row[i] ? integer[integers++] : real[reals++];
    row = {job.integers(i), job.scales(i), job.floats(i), job.low_rank(i), job.row0 + i};
  }
  outputs_of<true>(job, integer, integers, begin, end);
  outputs_of<false>(job, real, reals, begin, end);
}

}  // namespace

Status nf4_linear_decode_avx512(const Nf4LinearArgs& a) {
  constexpr int64_t kScratchBytes = 4 << 20;
  const int64_t runs = ceil_div(a.weight.k, kRun), r_pad = round_up(a.r, 16);
  const int64_t row_bytes = max64(64, round_up(runs * kRun * 4 + r_pad * 4, 64));
  const int64_t most = max64(1, min64(kMaxRows, kScratchBytes / row_bytes));
  for (int64_t row0 = 0; row0 < a.m; row0 += most) {
    const int rows = static_cast<int>(min64(most, a.m - row0));
    auto* scratch = static_cast<uint8_t*>(thread_scratch(static_cast<size_t>(rows * row_bytes)));
    if (scratch == nullptr) return Status::kOutOfMemory;
    Job job{a,       row0,      rows, runs, r_pad, a.weight.k % 64 == 0 && a.weight.blocksize % 64 == 0,
            scratch, row_bytes, {}};
    const bool compute_u = a.r > 0 && a.lora_a != nullptr;
    parallel_ranges(rows + (compute_u ? a.r : 0), a.threads, first_phase, &job);
    for (int i = 0; i < rows; ++i) {
      float* low_rank = job.low_rank(i);
      for (int64_t q = 0; q < r_pad; ++q) {
        low_rank[q] = q < a.r ? a.scaling * load_as_float(a.u, (row0 + i) * a.r + q, a.dtype) : 0.0f;
      }
    }
    parallel_ranges(a.weight.n, a.threads, second_phase, &job);
  }
  return Status::kOk;
}

}  // namespace fastlora::cpu
