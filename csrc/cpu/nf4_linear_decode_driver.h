// What the kernels for a few rows of x share: y = x·Wᵀ + s·u·Bᵀ + bias in one pass over the packed bytes of W,
// nothing dequantised to memory, the low-rank term, the offsets' and the bias added to the same accumulators. A
// level L brings the arithmetic; this file splits x, shares out the work and picks one of two routes for every row
// of x.
//
// Integer route (16-bit x, blocks of whole 64 columns): codes are 14-bit integers round(8191 * code); x is split
// once into 16-bit integers with one scale per 64 columns; products and their sums are exact in int32, and are
// converted once and scaled by absmax * xscale. Rounding x and the codes costs 8e-5 of relative error; rounding W
// to bfloat16 costs 1.7e-3.
//
// Float route (float32 x, ragged shapes, rows of x that hold NaN, Inf or magnitudes an integer scale cannot
// carry): float32 and FMA. A level may scale sums of code * x, or code * absmax.
//
// Everything sits in an anonymous namespace: each level compiles its own copy with its own flags.
#pragma once

#include "kernels.h"
#include "numeric.h"
#include "parallel.h"

namespace fastlora::cpu {
namespace {

constexpr int kMaxRows = 12;            // of x in one pass over W
constexpr int64_t kScaleColumns = 64;   // of split x that share a scale
constexpr float kXMax = 32767.0f;       // as fine as int32 allows: a lane sums 8 products, and
constexpr float kCodeUnit = 8191.0f;    // 8 * 8191 * 32767 < 2^31
constexpr float kTiniest = 1e-28f;      // below, scales come near float32's subnormals
constexpr float kOutlier = 1.0f / 128;  // of a block's largest magnitude: still as fine as bfloat16

struct Row {
  const int16_t* integers;  // [run][L::kRun] in the order of the level's look-up, the integer route
  const float* scales;      // one for each kScaleColumns; a run's worth is readable beyond the last
  const float* floats;      // [run][L::kRun] in the order of the level's look-up, the float route
  float unit;               // of `floats`
  const float* low_rank;    // [r_pad]: scaling * u
  const float* sums;        // [s_pad]: those of its groups, for a weight with offsets
  int64_t index;            // row of y
};

struct Job {
  const Nf4LinearArgs& a;
  int64_t row0;  // rows [row0, row0 + rows) of x are this job's
  int rows;
  int64_t runs, padded_k, r_pad, s_pad;
  bool blocks_aligned;  // every kScaleColumns columns of W have one absmax
  uint8_t* scratch;
  int64_t row_bytes;  // of scratch, a row of x
  bool integer_row[kMaxRows];
  float unit[kMaxRows];

  const void* x(int i) const { return element_ptr(a.x, (row0 + i) * a.weight.k, a.dtype); }
  // The two routes' forms of a row share one place: 4 bytes a column, 2 of them an integer's.
  float* floats(int i) const { return reinterpret_cast<float*>(scratch + i * row_bytes); }
  int16_t* integers(int i) const { return reinterpret_cast<int16_t*>(scratch + i * row_bytes); }
  float* scales(int i) const { return reinterpret_cast<float*>(integers(i) + padded_k); }
  float* low_rank(int i) const { return floats(i) + padded_k; }
  float* sums(int i) const { return low_rank(i) + r_pad; }
};

// The 16 codes of the integer route.
inline void integer_codes(int16_t (&codes)[16]) {
  for (int c = 0; c < 16; ++c) {
    const float scaled = kNf4Codes[c] * kCodeUnit;
    codes[c] = static_cast<int16_t>(scaled < 0.0f ? scaled - 0.5f : scaled + 0.5f);
  }
}

// Decodes the absmax of the blocks that columns [k0, k1) of `row` meet, then L::kAbsmaxSlack zeros for what a
// level reads beyond; the number of the first block.
template <class L>
int64_t chunk_absmax(const Nf4Weight& w, const float* map, int shift, int64_t row, int64_t k0, int64_t k1,
                     float* out) {
  const int64_t first = (row * w.k + k0) >> shift, last = (row * w.k + k1 - 1) >> shift;
  L::decode_absmax(w.scales, map, first, last - first + 1, out);
  for (int64_t i = 0; i < L::kAbsmaxSlack; ++i) out[last - first + 1 + i] = 0.0f;
  return first;
}

// The same for blocks_aligned weights, one for each kScaleColumns columns.
template <class L>
void chunk_scales(const Nf4Weight& w, const float* map, int shift, int64_t row, int64_t k0, int64_t k1,
                  float* out) {
  const int64_t first = chunk_absmax<L>(w, map, shift, row, k0, k1, out);
  if (w.blocksize == kScaleColumns) return;
  const int64_t flat = row * w.k + k0, count = (k1 - k0) / kScaleColumns;
  for (int64_t i = count - 1; i >= 0; --i) out[i] = out[((flat + i * kScaleColumns) >> shift) - first];
  for (int64_t i = 0; i < L::kAbsmaxSlack; ++i) out[count + i] = 0.0f;
}

// Divides a row by a power of two where its largest finite magnitude is far from 1, so that the float route may
// sum products of x and codes before they are scaled by absmax; that power.
inline float take_unit(float* x, int64_t count) {
  uint32_t top = 0;
  for (int64_t c = 0; c < count; ++c) {
    const uint32_t bits = load_unaligned<uint32_t>(x + c) & 0x7fffffffu, finite = bits < 0x7f800000u ? bits : 0;
    top = top > finite ? top : finite;
  }
  const int exponent = static_cast<int>(top >> 23) - 127;
  if (top == 0 || (exponent >= -64 && exponent <= 64)) return 1.0f;
  const uint32_t power = static_cast<uint32_t>(127 + (exponent < -96 ? -96 : (exponent > 96 ? 96 : exponent)))
                         << 23;
  const float unit = load_unaligned<float>(&power), inverse = 1.0f / unit;
  for (int64_t c = 0; c < count; ++c) x[c] *= inverse;
  return unit;
}

// x by rows, and u = x·lora_aᵀ one rank at a time for every row of x.
template <class L>
void first_phase(void* context, int64_t begin, int64_t end) {
  Job& job = *static_cast<Job*>(context);
  for (int64_t unit = begin; unit < end; ++unit) {
    if (unit >= job.rows) {
      L::rank_column(job, unit - job.rows);
      continue;
    }
    const int i = static_cast<int>(unit);
    job.integer_row[i] = job.a.dtype != DType::kFloat32 && job.blocks_aligned && L::split_integers(job, i);
    if (job.integer_row[i]) continue;
    L::split_floats(job, i);
    job.unit[i] = take_unit(job.floats(i), job.padded_k);
  }
}

// Rows of W [begin, end).
template <class L>
void second_phase(void* context, int64_t begin, int64_t end) {
  const Job& job = *static_cast<const Job*>(context);
  Row integer[kMaxRows], real[kMaxRows];
  int integers = 0, reals = 0;
  for (int i = 0; i < job.rows; ++i) {
    Row& row = job.integer_row[i] ? integer[integers++] : real[reals++];
    row = {job.integers(i), job.scales(i), job.floats(i), job.unit[i], job.low_rank(i), job.sums(i), job.row0 + i};
  }
  if (integers > 0) L::template outputs<true>(job, integer, integers, begin, end);
  if (reals > 0) L::template outputs<false>(job, real, reals, begin, end);
}

template <class L>
Status decode_linear(const Nf4LinearArgs& a) {
  constexpr int64_t kScratchBytes = 4 << 20;
  const int64_t runs = ceil_div(a.weight.k, L::kRun), padded_k = runs * L::kRun, r_pad = round_up(a.r, L::kLanes);
  const int64_t groups = a.weight.groups, s_pad = round_up(groups, L::kLanes);
  const int64_t row_bytes = max64(64, round_up((padded_k + r_pad + s_pad) * 4, 64));
  const int64_t most = max64(1, min64(kMaxRows, kScratchBytes / row_bytes));
  for (int64_t row0 = 0; row0 < a.m; row0 += most) {
    const int rows = static_cast<int>(min64(most, a.m - row0));
    auto* scratch = static_cast<uint8_t*>(thread_scratch(static_cast<size_t>(rows * row_bytes)));
    if (scratch == nullptr) return Status::kOutOfMemory;
    Job job{.a = a,
            .row0 = row0,
            .rows = rows,
            .runs = runs,
            .padded_k = padded_k,
            .r_pad = r_pad,
            .s_pad = s_pad,
            .blocks_aligned = a.weight.k % kScaleColumns == 0 && a.weight.blocksize % kScaleColumns == 0,
            .scratch = scratch,
            .row_bytes = row_bytes,
            .integer_row = {},
            .unit = {}};
    const bool compute_u = a.r > 0 && a.lora_a != nullptr;
    parallel_ranges(rows + (compute_u ? a.r : 0), a.threads, first_phase<L>, &job);
    for (int i = 0; i < rows; ++i) {
      float* low_rank = job.low_rank(i);
      for (int64_t q = 0; q < r_pad; ++q) {
        low_rank[q] = q < a.r ? a.scaling * load_as_float(a.u, (row0 + i) * a.r + q, a.dtype) : 0.0f;
      }
      for (int64_t q = 0; q < s_pad; ++q) job.sums(i)[q] = q < groups ? a.sums[(row0 + i) * groups + q] : 0.0f;
    }
    parallel_ranges(a.weight.n, a.threads, second_phase<L>, &job);
  }
  return Status::kOk;
}

}  // namespace
}  // namespace fastlora::cpu
