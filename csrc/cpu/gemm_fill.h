// Dequantising W into A strips and B panels: all at once, or a step at a time between the products of a multiply.
//
// Shuffles and conversions run on other ports than products, but a core sees only a few hundred instructions
// ahead: dequantising is hidden behind the products only if both are in the same loop. A multiply therefore calls
// filler.point() at even distances, and the filler dequantises there what the next multiply needs.
#pragma once

#include <type_traits>

#include "gemm_layout.h"

namespace fastlora::cpu {
namespace {

constexpr int64_t kRowsAhead = 16;  // rows of W asked for ahead of their use where a fill walks down them

// A prefetch may name any address: it never faults. The sum is one of integers, as no object may be there.
inline const void* far(const uint8_t* base, int64_t offset) {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset));
}
inline void prefetch(const uint8_t* base, int64_t offset) { __builtin_prefetch(far(base, offset)); }
inline void prefetch_l2(const uint8_t* base, int64_t offset) { __builtin_prefetch(far(base, offset), 0, 2); }

struct NoFiller {
  NoFiller local() const { return {}; }
  void take(const NoFiller&) {}
  void point() {}
  template <int kQuarter>
  void quarter() {}
  void finish() {}
};

// `count` steps. A multiply offers either `points` calls of point(), over which they are spread evenly, or runs of
// four calls quarter<0..3>(), a step each. What is left is done by finish(). A long loop of points takes local(),
// which has in registers what changes from step to step, and gives it back by take().
template <class Step>
struct Filler {
  static constexpr int64_t kStep = 1 << 16;
  Step step;
  int64_t count;
  int64_t rate;  // steps a point, in 1/kStep: rounded down, for points must not take more than there are
  int64_t due = 0, at = 0;
  typename Step::State state;

  Filler(const Step& s, int64_t steps, int64_t points)
      : step(s), count(steps), rate(steps * kStep / max64(points, 1)) {}

  struct Local {
    typename Step::Walk walk;
    int64_t rate, due, taken;
    [[gnu::always_inline]] void point() {
      for (due += rate; due >= kStep; due -= kStep, ++taken) walk.next();
    }
  };
  Local local() const { return {step.walk(at, count), rate, due, 0}; }
  void take(const Local& l) {
    due = l.due;
    at += l.taken;
  }

  template <int kQuarter>
  [[gnu::always_inline]] void quarter() {
    if (at >= count) return;
    step.template quarter<kQuarter>(at, state);
    if constexpr (kQuarter == 3) ++at;
  }
  void finish() {
    while (at < count) step(at++);
  }
};

// The steps of a Step from `at` on, one after the other.
template <class Step>
struct AnyWalk {
  Step step;
  int64_t at;
  [[gnu::always_inline]] void next() { step(at++); }
};

// One run of a strip, row by row; whole runs only.
template <class L, Alignment kAlign>
struct StripStep {
  using G = Gemm<L>;
  struct State {
    typename L::Look look;
    uint8_t* to;
  };
  const uint8_t* packed;  // of the strip's first row and column
  const float* absmax;    // of the first row, from the block of column k0 - lead on
  uint8_t* strip;
  int64_t row_bytes, absmax_stride, k;
  int64_t flat;   // the place of the strip's first weight in W
  int64_t lead;   // columns between the first scale's and the strip's first
  int64_t ahead;  // where to prefetch, in bytes from the run's place
  int log_runs;   // of a row
  int shift;

  struct Where {
    const uint8_t* bytes;
    const float* absmax;
    int32_t phase;
    uint8_t* to;
  };
  [[gnu::always_inline]] Where where(int64_t at) const {
    const int64_t i = at >> log_runs, r = at & ((1 << log_runs) - 1);
    const uint8_t* bytes = packed + i * row_bytes + r * (G::kRun / 2);
    prefetch(bytes, ahead);
    Where w = {.bytes = bytes,
               .absmax = absmax + i * absmax_stride,
               .phase = 0,
               .to = strip + i * 64 + r * (G::kVectors * G::kStripBlockBytes)};
    if constexpr (kAlign == Alignment::kHalves) {
      w.absmax += lead / 64 + r * 2;
    } else {
      const int64_t first = flat + i * k, here = first + r * G::kRun;
      w.absmax += (here >> shift) - ((first - lead) >> shift);
      w.phase = static_cast<int32_t>(here & ((int64_t{1} << shift) - 1));
    }
    return w;
  }
  [[gnu::always_inline]] void operator()(int64_t at) const {
    State state;
    quarter<0>(at, state);
    quarter<1>(at, state);
    quarter<2>(at, state);
    quarter<3>(at, state);
  }
  template <int kQuarter>
  [[gnu::always_inline]] void quarter(int64_t at, State& state) const {
    if constexpr (kQuarter == 0) {
      const Where w = where(at);
      state.look = L::template look<kAlign>(w.bytes, w.absmax, w.phase, kAlign == Alignment::kHalves ? 6 : shift);
      state.to = w.to;
    }
    L::template look_up<kAlign, kQuarter>(state.look, state.to + L::look_of(kQuarter) * G::kStripBlockBytes);
  }

  // Where blocks end at halves of runs nothing but places changes. What the next step looks up is loaded by this
  // one: instructions that wait for a load would fill the scheduler, and a core would see less far ahead.
  struct LinearWalk {
    const uint8_t* bytes;
    const float* absmax;
    uint8_t* to;
    int64_t r, runs, row_bytes, absmax_stride, ahead, left;
    typename L::Look ready;
    [[gnu::always_inline]] void load() { ready = L::template look<kAlign>(bytes, absmax, 0, 6); }
    [[gnu::always_inline]] void next() {
      prefetch_l2(bytes, ahead);
      typename L::Look l = ready;
      uint8_t* out = to;
      if (--left > 0) {
        bytes += G::kRun / 2;
        absmax += 2;
        to += G::kVectors * G::kStripBlockBytes;
        if (++r == runs) {
          r = 0;
          bytes += row_bytes - runs * (G::kRun / 2);
          absmax += absmax_stride - runs * 2;
          to += 64 - runs * (G::kVectors * G::kStripBlockBytes);
        }
      }
      load();
      L::template look_up<kAlign, 0>(l, out + L::look_of(0) * G::kStripBlockBytes);
      L::template look_up<kAlign, 1>(l, out + L::look_of(1) * G::kStripBlockBytes);
      L::template look_up<kAlign, 2>(l, out + L::look_of(2) * G::kStripBlockBytes);
      L::template look_up<kAlign, 3>(l, out + L::look_of(3) * G::kStripBlockBytes);
    }
  };
  using Walk = std::conditional_t<kAlign == Alignment::kHalves, LinearWalk, AnyWalk<StripStep>>;
  Walk walk(int64_t at, int64_t count) const {
    if constexpr (kAlign == Alignment::kHalves) {
      const int64_t here = min64(at, count - 1), i = here >> log_runs, r = here & ((1 << log_runs) - 1);
      Walk walk = {.bytes = packed + i * row_bytes + r * (G::kRun / 2),
                   .absmax = absmax + i * absmax_stride + lead / 64 + r * 2,
                   .to = strip + i * 64 + r * (G::kVectors * G::kStripBlockBytes),
                   .r = r,
                   .runs = 1 << log_runs,
                   .row_bytes = row_bytes,
                   .absmax_stride = absmax_stride,
                   .ahead = G::kStripRows * row_bytes,
                   .left = count - at,
                   .ready = {}};
      walk.load();
      return walk;
    } else {
      return {*this, at};
    }
  }
};

// One item of a set of panels: a pair of rows of W, kRun columns.
template <class L, Alignment kAlign>
struct PanelStep {
  using G = Gemm<L>;
  static_assert(G::kPerItem == 2);
  struct State {
    typename L::Look even, odd;
  };
  const uint8_t* packed;  // of the set's first row and column
  Nf4Scales scales;
  const float* map;
  uint8_t* panels;
  int64_t row_bytes, k, blocks;
  int64_t flat;   // the place of the set's first weight in W
  int64_t ahead;  // where a walk prefetches, in bytes from an item's place
  int shift;

  // The scales of a run, where look_up_whole wants them.
  [[gnu::always_inline]] void decode(int64_t at, float (&absmax)[3]) const {
    const int64_t first = at >> shift;
    if constexpr (kAlign == Alignment::kHalves) {
      absmax[0] = block_absmax(scales, map, first);
      absmax[1] = block_absmax(scales, map, (at + G::kRun / 2) >> shift);
    } else {
      const int64_t last = (at + G::kRun - 1) >> shift;
      for (int64_t b = 0; b < 3; ++b) absmax[b] = block_absmax(scales, map, min64(first + b, last));
    }
  }

  // With halves the scales lie one a half, as if blocks of 64 began with the run.
  static constexpr bool kHalves = kAlign == Alignment::kHalves;
  [[gnu::always_inline]] typename L::Look look(const uint8_t* bytes, int64_t at) const {
    float absmax[3];
    decode(at, absmax);
    const auto phase = static_cast<int32_t>(at & ((int64_t{1} << shift) - 1));
    return L::template look<kAlign>(bytes, absmax, kHalves ? 0 : phase, kHalves ? 6 : shift);
  }
  // Where panel p has the item.
  [[gnu::always_inline]] uint8_t* place_of(int64_t p, int64_t t) const {
    const auto place = G::panel_place(p, G::kRunPanels, blocks);
    return panels + place.offset + t / 16 * place.block_stride + t % 16 * 64;
  }

  template <int kQuarter>
  [[gnu::always_inline]] void quarter(int64_t t, State& state) const {
    if constexpr (kQuarter == 0) {
      const int64_t at = flat + 2 * t * k;
      const uint8_t* even = packed + 2 * t * row_bytes;
      prefetch(even, kRowsAhead * row_bytes);
      prefetch(even, (kRowsAhead + 1) * row_bytes);
      prefetch(scales.codes, ((at + kRowsAhead * k) >> shift) * (scales.nested == nullptr ? 4 : 1));
      state.even = look(even, at);
      state.odd = look(even + row_bytes, at + k);
    }
    constexpr int kLook = L::look_of(kQuarter);
    L::template look_up_pair<kAlign, kQuarter>(state.even, state.odd, place_of(2 * kLook, t),
                                               place_of(2 * kLook + 1, t));
  }
  [[gnu::always_inline]] void operator()(int64_t t) const {
    State state;
    quarter<0>(t, state);
    quarter<1>(t, state);
    quarter<2>(t, state);
    quarter<3>(t, state);
  }

  // The same where panels lie in pairs.
  struct LinearWalk {
    const uint8_t* even;
    uint8_t* to;
    int64_t at, left_of_block, row_bytes, k, ahead, pair_bytes, left;
    typename L::Look ready[2];
    Nf4Scales scales;
    const float* map;
    int shift;
    [[gnu::always_inline]] typename L::Look look(const uint8_t* bytes, int64_t place) const {
      const float absmax[2] = {block_absmax(scales, map, place >> shift),
                               block_absmax(scales, map, (place + G::kRun / 2) >> shift)};
      return L::template look<kAlign>(bytes, absmax, 0, 6);
    }
    template <int kQuarter>
    [[gnu::always_inline]] void quarter(typename L::Look& a, typename L::Look& b, uint8_t* out) const {
      uint8_t* low = out + L::look_of(kQuarter) * pair_bytes;
      L::template look_up_pair<kAlign, kQuarter>(a, b, low, low + kTileBytes);
    }
    [[gnu::always_inline]] void load() {
      ready[0] = look(even, at);
      ready[1] = look(even + row_bytes, at + k);
    }
    [[gnu::always_inline]] void next() {
      prefetch_l2(even, ahead);
      prefetch_l2(even, ahead + row_bytes);
      typename L::Look a = ready[0], b = ready[1];
      uint8_t* out = to;
      if (--left > 0) {
        even += 2 * row_bytes;
        at += 2 * k;
        to += 64;
        if (--left_of_block == 0) {
          left_of_block = 16;
          to += kTileBytes;
        }
      }
      load();
      quarter<0>(a, b, out);
      quarter<1>(a, b, out);
      quarter<2>(a, b, out);
      quarter<3>(a, b, out);
    }
  };
  static constexpr bool kLinear = kHalves && G::kGroup == 2;
  using Walk = std::conditional_t<kLinear, LinearWalk, AnyWalk<PanelStep>>;
  Walk walk(int64_t t, int64_t count) const {
    if constexpr (kLinear) {
      const int64_t here = min64(t, count - 1);
      Walk walk = {.even = packed + 2 * here * row_bytes,
                   .to = place_of(0, here),
                   .at = flat + 2 * here * k,
                   .left_of_block = 16 - here % 16,
                   .row_bytes = row_bytes,
                   .k = k,
                   .ahead = ahead,
                   .pair_bytes = 2 * blocks * kTileBytes,
                   .left = count - t,
                   .ready = {},
                   .scales = scales,
                   .map = map,
                   .shift = shift};
      walk.load();
      return walk;
    } else {
      return {*this, t};
    }
  }
};

template <class L>
struct Fill : Gemm<L> {
  using G = Gemm<L>;
  using G::kPerItem, G::kPerVector, G::kRun, G::kRunPanels, G::kStripBlockBytes, G::kStripRows, G::kVectors;
  using G::panel_place;

  // Where the same columns of the next strip are, in bytes from a row's place at column k: along the row or, at
  // its end, kStripRows below. A strip takes a few bytes of many rows, which no hardware prefetcher follows.
  static int64_t next_strip(const Nf4Weight& w, int64_t k) {
    constexpr int64_t kBytes = L::kStripBlocks * kPerVector / 2;
    const int64_t row_bytes = ceil_div(w.k, 2), next = k / 2 + kBytes;
    return next < row_bytes ? kBytes : kStripRows * row_bytes + next % kBytes - k / 2;
  }

  // log2 of the columns that share a decoded scale of a strip: with blocks that end at halves of runs, every half
  // has its own, so that addresses are linear.
  static int scale_shift(const Nf4Weight& w) {
    if (L::kOverlap && alignment_of(w) == Alignment::kHalves) return 6;
    return __builtin_ctzll(static_cast<uint64_t>(w.blocksize));
  }

  // The scales of a row's columns [k0, k1) by scale_shift, zeros up to `room`.
  static void decode_scales(const Nf4Weight& w, int64_t row, int64_t k0, int64_t k1, int64_t room, float* out) {
    const int64_t begin = row * w.k + k0, end = row * w.k + k1 - 1, shift = scale_shift(w);
    const int64_t first = begin / w.blocksize, last = end / w.blocksize;
    L::decode_absmax(w.scales, nf4_dynamic_map(), first, last - first + 1, out);
    const int64_t count = (end >> shift) - (begin >> shift) + 1;
    if (int64_t{1} << shift < w.blocksize) {  // from the last on: the source of each lies at or before it
      for (int64_t i = count - 1; i >= 0; --i)
        out[i] = out[(((begin >> shift) + i) << shift) / w.blocksize - first];
    }
    for (int64_t i = count; i < room; ++i) out[i] = 0.0f;
  }

  // Rows [row0, row0 + rows), contraction columns [k0, k0 + blocks * kPerVector). absmax: row i's decoded scales
  // from the block of column `absmax_k0` on, at absmax + i * absmax_stride.
  static void strip_of(const Nf4Weight& w, const float* absmax, int64_t absmax_stride, int64_t row0, int64_t rows,
                       int64_t k0, int64_t blocks, uint8_t* strip, int64_t absmax_k0) {
    const int64_t row_bytes = ceil_div(w.k, 2);
    const int shift = scale_shift(w);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = row0 + i;
      const int64_t first_block = (row * w.k + absmax_k0) >> shift;
      for (int64_t b = 0; b < blocks; b += kVectors) {
        const int64_t k = k0 + b * kPerVector, flat = row * w.k + k;
        uint8_t* out[kVectors];
        for (int64_t v = 0; v < kVectors; ++v) out[v] = strip + (b + v) * kStripBlockBytes + i * 64;
        prefetch(w.packed, row * row_bytes + k / 2 + next_strip(w, k));
        L::dequantize_run({.bytes = w.packed + row * row_bytes + k / 2,
                           .count = row_bytes - k / 2,
                           .absmax = absmax + i * absmax_stride + ((flat >> shift) - first_block),
                           .phase = static_cast<int32_t>(flat & ((int64_t{1} << shift) - 1)),
                           .shift = shift},
                          out);
      }
    }
  }

  // The same by steps, one a run; every run must lie inside the row.
  template <Alignment kAlign>
  static StripStep<L, kAlign> strip_step(const Nf4Weight& w, const float* absmax, int64_t absmax_stride,
                                         int64_t row0, int64_t k0, int64_t blocks, uint8_t* strip,
                                         int64_t absmax_k0) {
    const int64_t row_bytes = ceil_div(w.k, 2);
    return {.packed = w.packed + row0 * row_bytes + k0 / 2,
            .absmax = absmax,
            .strip = strip,
            .row_bytes = row_bytes,
            .absmax_stride = absmax_stride,
            .k = w.k,
            .flat = row0 * w.k + k0,
            .lead = k0 - absmax_k0,
            .ahead = next_strip(w, k0),
            .log_runs = blocks == 2 * kVectors ? 1 : 0,
            .shift = scale_shift(w)};
  }

  // Items [t0, t0 + 16 * blocks) of the contraction over rows, columns [k0, k0 + kRun).
  static void panels_of(const Nf4Weight& w, const float* map, int64_t row0, int64_t blocks, int64_t k0,
                        uint8_t* out) {
    const int64_t row_bytes = ceil_div(w.k, 2);
    const int shift = __builtin_ctzll(static_cast<uint64_t>(w.blocksize));
    const int64_t last_column = min64(k0 + kRun, w.k) - 1;
    const int64_t scale_bytes = w.scales.nested == nullptr ? 4 : 1;
    float absmax[2][kRun / kMinBlocksize + 2 + kAbsmaxSlack];
    Run runs[2];
    uint8_t* to[kRunPanels];
    for (int64_t p = 0; p < kRunPanels; ++p) to[p] = out + panel_place(p, kRunPanels, blocks).offset;
    for (int64_t t = 0; t < blocks * 16; ++t) {
      for (int64_t e = 0; e < kPerItem; ++e) {
        const int64_t row = row0 + t * kPerItem + e;
        if (row >= w.n) {  // past the last row: codes and scales of zero
          for (float& a : absmax[e]) a = 0.0f;
          runs[e] = {.bytes = w.packed, .count = 0, .absmax = absmax[e], .phase = 0, .shift = shift};
          continue;
        }
        const int64_t flat = row * w.k + k0, first = flat >> shift, last = (row * w.k + last_column) >> shift;
        prefetch(w.packed, (row + kRowsAhead) * row_bytes + k0 / 2);
        prefetch(w.scales.codes, (first + kRowsAhead * (w.k >> shift)) * scale_bytes);
        for (int64_t b = first; b <= last; ++b) absmax[e][b - first] = block_absmax(w.scales, map, b);
        absmax[e][last - first + 1] = 0.0f;  // columns past the last one look here or further: any finite value
        runs[e] = {.bytes = w.packed + row * row_bytes + k0 / 2,
                   .count = row_bytes - k0 / 2,
                   .absmax = absmax[e],
                   .phase = static_cast<int32_t>(flat & (w.blocksize - 1)),
                   .shift = shift};
      }
      if constexpr (kPerItem == 1) {
        L::dequantize_run(runs[0], to);
      } else {
        L::dequantize_pair(runs[0], runs[1], to);
      }
      if (t % 16 != 15) {
        for (int64_t p = 0; p < kRunPanels; ++p) to[p] += 64;
      } else {
        for (int64_t p = 0; p < kRunPanels; ++p) {
          to[p] += panel_place(p, kRunPanels, blocks).block_stride - 15 * 64;
        }
      }
    }
  }

  // The same by steps, one an item; every run must lie inside W.
  template <Alignment kAlign>
  static PanelStep<L, kAlign> panel_step(const Nf4Weight& w, const float* map, int64_t row0, int64_t blocks,
                                         int64_t k0, uint8_t* panels, int64_t ahead) {
    const int64_t row_bytes = ceil_div(w.k, 2);
    return {.packed = w.packed + row0 * row_bytes + k0 / 2,
            .scales = w.scales,
            .map = map,
            .panels = panels,
            .row_bytes = row_bytes,
            .k = w.k,
            .blocks = blocks,
            .flat = row0 * w.k + k0,
            .ahead = ahead,
            .shift = __builtin_ctzll(static_cast<uint64_t>(w.blocksize))};
  }
};

}  // namespace
}  // namespace fastlora::cpu
