// The blocked GEMM that every wide level shares: forward y = x·Wᵀ + u·(s·B)ᵀ + bias and its transpose
// dx = dy·W + v·A. A level L brings the instructions (dequantise a run, multiply a strip); this file brings
// the loops.
//
// One picture for both directions. C += A·B over a contraction cut into 32-bit "items" (one float32, or two
// bfloat16). A is a strip of rows, B a panel of 16 columns:
//
//   A strip   [block of 16 items][kStripRows][16 items]            broadcast, or an AMX A tile
//   B panels  [group of <= kGroup panels][block][panel][16 items][16 columns]   vectors, or an AMX B tile
//
//               A strip (streamed)            B panels                       C (float32 scratch)
//   forward     rows of W, dequantised        x, packed once, in L2          yᵀ  kStripRows x rows of x
//   backward    dy, packed once, in L2        rows of W, dequantised         dx  rows of dy x kRun columns
//
// A look-up yields the columns of a run of kRun weights in an order of its own (L::order, L::column_of). A
// contraction does not care, so in the forward direction x is packed in that order too; in the backward
// direction the columns are put right when C is stored.
//
// Everything sits in an anonymous namespace: each level compiles its own copy with its own flags.
#pragma once

#include "kernels.h"
#include "numeric.h"
#include "parallel.h"

namespace fastlora::cpu {
namespace {

constexpr int64_t kPanel = 16;        // columns of a panel, items of a block
constexpr int64_t kTileBytes = 1024;  // 16 items x 16 columns x 4 bytes
constexpr int64_t kRowsAhead = 16;    // rows of W asked for ahead of their use where a fill walks down them
constexpr int64_t kAbsmaxSlack = 16;  // floats readable past the last absmax of a row

// Packed weights of one row, kRun columns of them, as a level's look-up takes them.
struct Run {
  const uint8_t* bytes;  // the run's first packed byte, `count` of them readable
  int64_t count;
  const float* absmax;  // of the run's first column; kAbsmaxSlack readable beyond the last
  int32_t phase;        // the first column's place in its block
  int shift;            // log2(blocksize)
};

// A dense stand-in for W: (n, k) row-major, multiplied by `scale` on the way in (lora_a, or s * lora_b).
struct DenseRows {
  const void* data;
  DType dtype;
  int64_t n, k;
  float scale;
};

template <class L>
struct Gemm {
  using T = typename L::T;
  static constexpr int64_t kPerItem = L::kPerItem;
  static constexpr int64_t kPerVector = 16 * kPerItem;  // contraction steps of a block: 64 bytes of a row
  static constexpr int64_t kRun = L::kRun;
  static constexpr int64_t kVectors = kRun / kPerVector;
  static constexpr int64_t kRunPanels = kRun / kPanel;
  static constexpr int64_t kStripRows = L::kStripRows;
  static constexpr int64_t kStripBlockBytes = kStripRows * 64;
  static constexpr int64_t kGroup = L::kGroup;

  // Where panel p of `panels` starts at block 0, and how far its next block is: panels lie in groups of kGroup.
  struct PanelPlace {
    int64_t offset, block_stride;
  };
  static PanelPlace panel_place(int64_t p, int64_t panels, int64_t blocks) {
    const int64_t first = p / kGroup * kGroup, width = min64(kGroup, panels - first);
    return {first * blocks * kTileBytes + (p - first) * kTileBytes, width * kTileBytes};
  }

  // Columns [k0, k0 + count) of a row, scaled and converted, zeros past the last column.
  static void load_dense(const DenseRows& s, int64_t row, int64_t k0, int64_t count, T* out) {
    const int64_t have = max64(0, min64(count, s.k - k0));
    if (have > 0) L::load_scaled_row(element_ptr(s.data, row * s.k + k0, s.dtype), s.dtype, have, s.scale, out);
    for (int64_t j = have; j < count; ++j) out[j] = L::from_float(0.0f);
  }

  // ---- rows of W as an A strip: contraction columns [k0, k0 + blocks * kPerVector) of rows [row0, row0 + rows)

  static void fill_strip(const DenseRows& s, int64_t row0, int64_t rows, int64_t k0, int64_t blocks, bool permuted,
                         uint8_t* strip) {
    alignas(64) T piece[kRun];
    for (int64_t i = 0; i < rows; ++i) {
      if (!permuted) {
        for (int64_t b = 0; b < blocks; ++b) {
          load_dense(s, row0 + i, k0 + b * kPerVector, kPerVector,
                     reinterpret_cast<T*>(strip + b * kStripBlockBytes + i * 64));
        }
        continue;
      }
      for (int64_t b = 0; b < blocks; b += kVectors) {
        load_dense(s, row0 + i, k0 + b * kPerVector, kRun, piece);
        for (int64_t v = 0; v < kVectors; ++v) {
          T* out = reinterpret_cast<T*>(strip + (b + v) * kStripBlockBytes + i * 64);
          for (int64_t j = 0; j < kPerVector; ++j) out[j] = piece[L::order(v * kPerVector + j)];
        }
      }
    }
  }

  static void prefetch(const Nf4Weight& w, int64_t byte) {
    if (byte < w.n * ceil_div(w.k, 2)) __builtin_prefetch(w.packed + byte);
  }

  // absmax: row i's decoded scales from the block of column `absmax_k0` on, at absmax + i * absmax_stride.
  static void fill_strip(const Nf4Weight& w, const float* absmax, int64_t absmax_stride, int64_t row0,
                         int64_t rows, int64_t k0, int64_t blocks, uint8_t* strip, int64_t absmax_k0) {
    const int64_t row_bytes = ceil_div(w.k, 2);
    const int shift = __builtin_ctzll(static_cast<uint64_t>(w.blocksize));
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = row0 + i;
      const int64_t first_block = (row * w.k + absmax_k0) >> shift;
      for (int64_t b = 0; b < blocks; b += kVectors) {
        const int64_t k = k0 + b * kPerVector, flat = row * w.k + k;
        uint8_t* out[kVectors];
        for (int64_t v = 0; v < kVectors; ++v) out[v] = strip + (b + v) * kStripBlockBytes + i * 64;
        // A strip takes a few bytes of many rows, which no hardware prefetcher follows: ask for the same place in
        // the next strip, along the row or, at its end, kStripRows below.
        const int64_t next = k / 2 + L::kStripBlocks * kPerVector / 2;
        prefetch(w, next < row_bytes ? row * row_bytes + next
                                     : (row + kStripRows) * row_bytes + next % (L::kStripBlocks * kPerVector / 2));
        L::dequantize_run({.bytes = w.packed + row * row_bytes + k / 2,
                           .count = row_bytes - k / 2,
                           .absmax = absmax + i * absmax_stride + ((flat >> shift) - first_block),
                           .phase = static_cast<int32_t>(flat & (w.blocksize - 1)),
                           .shift = shift},
                          out);
      }
    }
  }

  // ---- rows of W as B panels: items [t0, t0 + 16 * blocks) of the contraction over rows, columns
  //      [k0, k0 + kRun) or, when not permuted, the first `panels` * 16 of them

  static void fill_panels(const DenseRows& s, const float*, int64_t row0, int64_t blocks, int64_t k0,
                          bool permuted, int64_t panels, uint8_t* out) {
    alignas(64) T piece[kPerItem][kRun];
    PanelPlace places[kRunPanels];
    for (int64_t p = 0; p < panels; ++p) places[p] = panel_place(p, panels, blocks);
    for (int64_t t = 0; t < blocks * 16; ++t) {
      for (int64_t e = 0; e < kPerItem; ++e) {
        const int64_t row = row0 + t * kPerItem + e;
        if (row < s.n) {
          load_dense(s, row, k0, permuted ? kRun : panels * kPanel, piece[e]);
        } else {
          for (T& value : piece[e]) value = L::from_float(0.0f);
        }
      }
      for (int64_t p = 0; p < panels; ++p) {
        T* item = reinterpret_cast<T*>(out + places[p].offset + t / 16 * places[p].block_stride + t % 16 * 64);
        for (int64_t q = 0; q < kPanel; ++q) {
          const int64_t position = p * kPanel + q, column = permuted ? L::column_of(position) : position;
          for (int64_t e = 0; e < kPerItem; ++e) item[q * kPerItem + e] = piece[e][column];
        }
      }
    }
  }

  static void fill_panels(const Nf4Weight& w, const float* map, int64_t row0, int64_t blocks, int64_t k0, bool,
                          int64_t panels, uint8_t* out) {
    const int64_t row_bytes = ceil_div(w.k, 2);
    const int shift = __builtin_ctzll(static_cast<uint64_t>(w.blocksize));
    const int64_t last_column = min64(k0 + kRun, w.k) - 1;
    const int64_t scale_bytes = w.scales.nested == nullptr ? 4 : 1;
    float absmax[2][kRun / kMinBlocksize + 2 + kAbsmaxSlack];
    Run runs[2];
    uint8_t* to[kRunPanels];
    for (int64_t p = 0; p < panels; ++p) to[p] = out + panel_place(p, panels, blocks).offset;
    for (int64_t t = 0; t < blocks * 16; ++t) {
      for (int64_t e = 0; e < kPerItem; ++e) {
        const int64_t row = row0 + t * kPerItem + e;
        if (row >= w.n) {  // past the last row: codes and scales of zero
          for (float& a : absmax[e]) a = 0.0f;
          runs[e] = {.bytes = w.packed, .count = 0, .absmax = absmax[e], .phase = 0, .shift = shift};
          continue;
        }
        const int64_t flat = row * w.k + k0, first = flat >> shift, last = (row * w.k + last_column) >> shift;
        prefetch(w, (row + kRowsAhead) * row_bytes + k0 / 2);
        __builtin_prefetch(w.scales.codes +
                           min64(first + kRowsAhead * (w.k >> shift), (w.n * w.k - 1) >> shift) * scale_bytes);
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
        for (int64_t p = 0; p < panels; ++p) to[p] += 64;
      } else {
        for (int64_t p = 0; p < panels; ++p) to[p] += panel_place(p, panels, blocks).block_stride - 15 * 64;
      }
    }
  }

  // ---- activations

  // Rows [row0, row0 + rows) of x, columns [k0, k0 + blocks * kPerVector), as B panels; zeros past rows and k.
  static void pack_panels(const void* x, DType dtype, int64_t ld, int64_t row0, int64_t rows, int64_t k0,
                          int64_t k, int64_t blocks, bool permuted, uint8_t* out) {
    const int64_t panels = ceil_div(rows, kPanel);
    alignas(64) T piece[kPanel][kRun];
    for (int64_t p = 0; p < panels; ++p) {
      const PanelPlace place = panel_place(p, panels, blocks);
      const int64_t step = permuted ? kVectors : 1;
      for (int64_t b = 0; b < blocks; b += step) {
        const int64_t first = k0 + b * kPerVector, want = step * kPerVector;
        const int64_t have = max64(0, min64(want, k - first));
        for (int64_t j = 0; j < kPanel; ++j) {
          const int64_t row = p * kPanel + j;
          const int64_t count = row < rows ? have : 0;
          if (count > 0) L::load_row(element_ptr(x, (row0 + row) * ld + first, dtype), dtype, count, piece[j]);
          for (int64_t c = count; c < want; ++c) piece[j][c] = L::from_float(0.0f);
        }
        uint8_t* tile = out + place.offset + b * place.block_stride;
        if (permuted) {
          L::pack_run(piece, tile, place.block_stride);
        } else {
          for (int64_t t = 0; t < 16; ++t) {
            T* item = reinterpret_cast<T*>(tile + t * 64);
            for (int64_t j = 0; j < kPanel; ++j) {
              for (int64_t e = 0; e < kPerItem; ++e) item[j * kPerItem + e] = piece[j][t * kPerItem + e];
            }
          }
        }
      }
    }
  }

  // Rows of dy as A strips: [strip][block][kStripRows][64 bytes], zeros past n.
  static void pack_strips(const void* dy, DType dtype, int64_t ld, int64_t row0, int64_t rows, int64_t n0,
                          int64_t n, int64_t blocks, uint8_t* out) {
    for (int64_t i = 0; i < rows; ++i) {
      uint8_t* strip = out + i / kStripRows * blocks * kStripBlockBytes + i % kStripRows * 64;
      for (int64_t b = 0; b < blocks; ++b) {
        T* to = reinterpret_cast<T*>(strip + b * kStripBlockBytes);
        const int64_t first = n0 + b * kPerVector;
        const int64_t count = max64(0, min64(kPerVector, n - first));
        if (count > 0) L::load_row(element_ptr(dy, (row0 + i) * ld + first, dtype), dtype, count, to);
        for (int64_t c = count; c < kPerVector; ++c) to[c] = L::from_float(0.0f);
      }
    }
  }

  // C[rows][16 * panels] (+)= strip · panels over `blocks` blocks; the panels hold `all_blocks` each.
  static void multiply(const uint8_t* strip, int64_t rows, const uint8_t* panels_base, int64_t panels,
                       int64_t all_blocks, int64_t block0, int64_t blocks, float* c, int64_t ldc,
                       bool accumulate) {
    for (int64_t p = 0; p < panels; p += kGroup) {
      const int64_t width = min64(kGroup, panels - p);
      L::multiply(strip, panels_base + p * all_blocks * kTileBytes + block0 * width * kTileBytes, width, blocks,
                  c + p * kPanel, ldc, rows, accumulate);
    }
  }
};

// Units of work are (row block, strip or run) in row-block order. One costs its rows and, whatever their number,
// the dequantising of its weights, about as much as kFillRows rows: a thread's share is cut by cost, because the
// last row block may be short. The unit at position `at` of total_cost.
constexpr int64_t kFillRows = 12;

inline int64_t total_cost(int64_t m, int64_t row_block, int64_t per_block) {
  return (m + ceil_div(m, row_block) * kFillRows) * per_block;
}

inline int64_t unit_at(int64_t at, int64_t m, int64_t row_block, int64_t per_block) {
  const int64_t full = (row_block + kFillRows) * per_block, block = at / full;
  const int64_t rows = min64(row_block, m - block * row_block);
  return block * per_block + (rows > 0 ? (at - block * full) / (rows + kFillRows) : 0);
}

// How one thread's scratch is laid out; every size is bounded whatever the shape.
struct Plan {
  int64_t row_block;     // rows of x (dy) packed at a time
  int64_t blocks;        // 64-byte blocks of the whole contraction
  int64_t chunk_blocks;  // of them packed at a time
  int64_t chunks;
  int64_t rank_blocks;  // blocks of the low-rank extension
  int64_t rank_chunk;   // of them packed at a time
  int64_t units_per_c;  // strips (runs) whose C is kept while the chunks go by
};

template <class L>
Plan make_plan(int64_t m, int64_t contraction, int64_t step_blocks, int64_t r, int64_t max_rows, int64_t row_step,
               int64_t c_bytes_per_row) {
  constexpr int64_t kPerVector = Gemm<L>::kPerVector;
  Plan plan;
  plan.rank_blocks = ceil_div(r, kPerVector);
  plan.row_block = round_up(ceil_div(m, ceil_div(m, max_rows)), row_step);
  while (plan.row_block > row_step && plan.rank_blocks * 64 * plan.row_block > L::kPackedBytes) {
    plan.row_block = round_up(plan.row_block / 2, row_step);
  }
  plan.rank_chunk = min64(plan.rank_blocks, L::kPackedBytes / (plan.row_block * 64));
  plan.blocks = round_up(ceil_div(contraction, kPerVector), step_blocks);
  const int64_t most = max64(1, L::kPackedBytes / (plan.row_block * 64) / step_blocks);
  const int64_t steps = max64(1, plan.blocks / step_blocks);
  plan.chunks = ceil_div(steps, most);
  plan.chunk_blocks = ceil_div(steps, plan.chunks) * step_blocks;
  plan.chunks = max64(1, ceil_div(plan.blocks, plan.chunk_blocks));
  plan.units_per_c = plan.chunks == 1 ? 1 : max64(1, L::kAccumulatorBytes / (plan.row_block * c_bytes_per_row));
  return plan;
}

// ---- forward: out (m, src.n) = x·srcᵀ + u·extᵀ + bias -------------------------------------------------------

template <class L, class Source>
struct Forward {
  const void* x;  // (m, k), dtype
  int64_t m, k, n;
  DType dtype;
  Source source;  // Nf4Weight or DenseRows, (n, k)
  const void* u;  // (m, r), dtype
  DenseRows ext;  // (n, r)
  const void* bias;
  void* out;  // (m, n), dtype
  Plan plan;
  int64_t strips;
  bool out_of_memory;

  using G = Gemm<L>;

  static constexpr bool kQuantized = requires(Source s) { s.packed; };

  int64_t absmax_stride() const {
    if constexpr (kQuantized) {
      return plan.chunk_blocks * G::kPerVector / source.blocksize + 2 + kAbsmaxSlack;
    } else {
      return 0;
    }
  }

  void store(int64_t row0, int64_t rows, int64_t strip, const float* c, int64_t ldc) const {
    const int64_t n0 = strip * G::kStripRows, count = min64(G::kStripRows, n - n0);
    alignas(64) float block[kPanel][G::kStripRows];
    float offset[G::kStripRows] = {};
    if (bias != nullptr) {
      for (int64_t i = 0; i < count; ++i) offset[i] = load_as_float(bias, n0 + i, dtype);
    }
    for (int64_t p = 0; p * kPanel < rows; ++p) {
      L::transpose_strip(c + p * kPanel, ldc, block);
      for (int64_t j = 0; j < min64(kPanel, rows - p * kPanel); ++j) {
        if (bias != nullptr) {
          for (int64_t i = 0; i < G::kStripRows; ++i) block[j][i] += offset[i];
        }
        L::store_row(block[j], count, dtype, element_ptr(out, (row0 + p * kPanel + j) * n + n0, dtype));
      }
    }
  }

  void run_units(int64_t begin, int64_t end) {
    const int64_t ldc = plan.row_block;
    const int64_t packed_bytes = plan.row_block * plan.chunk_blocks * 64;
    const int64_t rank_bytes = plan.row_block * plan.rank_chunk * 64;
    const int64_t strip_bytes = L::kStripBlocks * G::kStripBlockBytes;
    const int64_t c_bytes = G::kStripRows * ldc * 4;
    const int64_t absmax_bytes = round_up(G::kStripRows * absmax_stride() * 4, 64);
    auto* scratch = static_cast<uint8_t*>(thread_scratch(
        static_cast<size_t>(packed_bytes + rank_bytes + strip_bytes + plan.units_per_c * c_bytes + absmax_bytes)));
    if (scratch == nullptr) {
      __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
      return;
    }
    uint8_t* packed = scratch;
    uint8_t* packed_u = packed + packed_bytes;
    uint8_t* strip = packed_u + rank_bytes;
    auto* c_base = reinterpret_cast<float*>(strip + strip_bytes);
    auto* absmax = reinterpret_cast<float*>(strip + strip_bytes + plan.units_per_c * c_bytes);
    const float* map = nf4_dynamic_map();

    L::begin();
    int64_t packed_row = -1, packed_chunk = -1;
    for (int64_t unit = begin; unit < end;) {
      const int64_t row0 = unit / strips * plan.row_block, rows = min64(plan.row_block, m - row0);
      const int64_t panels = ceil_div(rows, kPanel);
      const int64_t strip0 = unit % strips;
      const int64_t count = min64(min64(end - unit, strips - strip0), plan.units_per_c);
      const bool whole_rank = plan.rank_chunk == plan.rank_blocks;
      if (plan.rank_blocks > 0 && whole_rank && row0 != packed_row) {
        G::pack_panels(u, dtype, ext.k, row0, rows, 0, ext.k, plan.rank_blocks, false, packed_u);
      }
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        const int64_t block0 = chunk * plan.chunk_blocks;
        const int64_t blocks = min64(plan.chunk_blocks, plan.blocks - block0);
        if (row0 != packed_row || chunk != packed_chunk) {
          G::pack_panels(x, dtype, k, row0, rows, block0 * G::kPerVector, k, blocks, true, packed);
          packed_row = row0;
          packed_chunk = chunk;
        }
        for (int64_t s = 0; s < count; ++s) {
          const int64_t n0 = (strip0 + s) * G::kStripRows, strip_rows = min64(G::kStripRows, n - n0);
          float* c = c_base + s * (c_bytes / 4);
          if constexpr (kQuantized) {
            if (k > 0) decode_scales(n0, strip_rows, block0, blocks, map, absmax);
          }
          for (int64_t b = 0; b < blocks; b += L::kStripBlocks) {
            const int64_t now = min64(L::kStripBlocks, blocks - b);
            const int64_t k0 = (block0 + b) * G::kPerVector;
            if constexpr (kQuantized) {
              G::fill_strip(source, absmax, absmax_stride(), n0, strip_rows, k0, now, strip,
                            block0 * G::kPerVector);
            } else {
              G::fill_strip(source, n0, strip_rows, k0, now, true, strip);
            }
            G::multiply(strip, strip_rows, packed, panels, blocks, b, now, c, ldc, chunk > 0 || b > 0);
          }
          if (chunk + 1 < plan.chunks) continue;
          for (int64_t q = 0; q < plan.rank_blocks; q += plan.rank_chunk) {
            const int64_t here = min64(plan.rank_chunk, plan.rank_blocks - q);
            if (!whole_rank) {  // a rank in the thousands: u is packed again for every strip
              G::pack_panels(u, dtype, ext.k, row0, rows, q * G::kPerVector, ext.k, here, false, packed_u);
            }
            for (int64_t b = 0; b < here; b += L::kStripBlocks) {
              const int64_t now = min64(L::kStripBlocks, here - b);
              G::fill_strip(ext, n0, strip_rows, (q + b) * G::kPerVector, now, false, strip);
              G::multiply(strip, strip_rows, packed_u, panels, here, b, now, c, ldc, plan.blocks + q + b > 0);
            }
          }
          if (plan.blocks == 0 && plan.rank_blocks == 0) std::memset(c, 0, static_cast<size_t>(c_bytes));
          store(row0, rows, strip0 + s, c, ldc);
        }
      }
      unit += count;
    }
    L::end();
  }

  void decode_scales(int64_t n0, int64_t rows, int64_t block0, int64_t blocks, const float* map, float* absmax)
    requires kQuantized
  {
    const int64_t k0 = block0 * G::kPerVector, k1 = min64(k, k0 + blocks * G::kPerVector);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t first = ((n0 + i) * k + k0) / source.blocksize;
      const int64_t last = ((n0 + i) * k + k1 - 1) / source.blocksize;
      float* to = absmax + i * absmax_stride();
      L::decode_absmax(source.scales, map, first, last - first + 1, to);
      for (int64_t b = last - first + 1; b < absmax_stride(); ++b) to[b] = 0.0f;  // for columns past k
    }
  }

  Status run(int32_t threads) {
    strips = ceil_div(n, G::kStripRows);
    plan = make_plan<L>(m, k, G::kVectors, ext.k, L::kForwardRows, kPanel, G::kStripRows * 4);
    out_of_memory = false;
    parallel_ranges(
        total_cost(m, plan.row_block, strips), threads,
        [](void* context, int64_t begin, int64_t end) {
          auto& self = *static_cast<Forward*>(context);
          self.run_units(unit_at(begin, self.m, self.plan.row_block, self.strips),
                         unit_at(end, self.m, self.plan.row_block, self.strips));
        },
        this);
    return out_of_memory ? Status::kOutOfMemory : Status::kOk;
  }
};

// ---- backward: out (m, src.k) = dy·src + v·ext --------------------------------------------------------------

template <class L, class Source>
struct Backward {
  const void* dy;  // (m, n), dtype
  int64_t m, n, k;
  DType dtype;
  Source source;  // Nf4Weight or DenseRows, (n, k)
  const void* v;  // (m, r), dtype
  DenseRows ext;  // (r, k)
  void* out;      // (m, k), dtype
  Plan plan;
  int64_t runs;
  bool out_of_memory;

  using G = Gemm<L>;
  static constexpr bool kQuantized = requires(Source s) { s.packed; };

  void store(int64_t row0, int64_t rows, int64_t run, const float* c, int64_t ldc) const {
    const int64_t k0 = run * G::kRun, count = min64(G::kRun, k - k0);
    alignas(64) float line[G::kRun];
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = c + i * ldc;
      if constexpr (kQuantized) {
        L::restore_columns(from, line);
        from = line;
      }
      L::store_row(from, count, dtype, element_ptr(out, (row0 + i) * k + k0, dtype));
    }
  }

  void run_units(int64_t begin, int64_t end) {
    constexpr int64_t kLdc = G::kRun;
    const int64_t packed_bytes = plan.row_block * plan.chunk_blocks * 64;
    const int64_t rank_bytes = plan.row_block * plan.rank_chunk * 64;
    const int64_t panel_bytes = L::kPanelBlocks * G::kRunPanels * kTileBytes;
    const int64_t c_bytes = plan.row_block * kLdc * 4;
    auto* scratch = static_cast<uint8_t*>(
        thread_scratch(static_cast<size_t>(packed_bytes + rank_bytes + panel_bytes + plan.units_per_c * c_bytes)));
    if (scratch == nullptr) {
      __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
      return;
    }
    uint8_t* packed = scratch;
    uint8_t* packed_v = packed + packed_bytes;
    uint8_t* panel = packed_v + rank_bytes;
    auto* c_base = reinterpret_cast<float*>(panel + panel_bytes);
    const float* map = nf4_dynamic_map();

    L::begin();
    int64_t packed_row = -1, packed_chunk = -1;
    for (int64_t unit = begin; unit < end;) {
      const int64_t row0 = unit / runs * plan.row_block, rows = min64(plan.row_block, m - row0);
      const int64_t run0 = unit % runs;
      const int64_t count = min64(min64(end - unit, runs - run0), plan.units_per_c);
      const bool whole_rank = plan.rank_chunk == plan.rank_blocks;
      if (plan.rank_blocks > 0 && whole_rank && row0 != packed_row) {
        G::pack_strips(v, dtype, ext.n, row0, rows, 0, ext.n, plan.rank_blocks, packed_v);
      }
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        const int64_t block0 = chunk * plan.chunk_blocks;
        const int64_t blocks = min64(plan.chunk_blocks, plan.blocks - block0);
        if (row0 != packed_row || chunk != packed_chunk) {
          G::pack_strips(dy, dtype, n, row0, rows, block0 * G::kPerVector, n, blocks, packed);
          packed_row = row0;
          packed_chunk = chunk;
        }
        for (int64_t q = 0; q < count; ++q) {
          const int64_t k0 = (run0 + q) * G::kRun;
          const int64_t panels = kQuantized ? G::kRunPanels : ceil_div(min64(G::kRun, k - k0), kPanel);
          float* c = c_base + q * (c_bytes / 4);
          for (int64_t b = 0; b < blocks; b += L::kPanelBlocks) {
            const int64_t now = min64(L::kPanelBlocks, blocks - b);
            G::fill_panels(source, map, (block0 + b) * G::kPerVector, now, k0, kQuantized, panels, panel);
            multiply_rows(packed, blocks, b, now, rows, panel, panels, c, chunk > 0 || b > 0);
          }
          if (chunk + 1 < plan.chunks) continue;
          for (int64_t r = 0; r < plan.rank_blocks; r += plan.rank_chunk) {
            const int64_t here = min64(plan.rank_chunk, plan.rank_blocks - r);
            if (!whole_rank) {  // a rank in the thousands: v is packed again for every run
              G::pack_strips(v, dtype, ext.n, row0, rows, r * G::kPerVector, ext.n, here, packed_v);
            }
            for (int64_t b = 0; b < here; b += L::kPanelBlocks) {
              const int64_t now = min64(L::kPanelBlocks, here - b);
              G::fill_panels(ext, map, (r + b) * G::kPerVector, now, k0, kQuantized, panels, panel);
              multiply_rows(packed_v, here, b, now, rows, panel, panels, c, plan.blocks + r + b > 0);
            }
          }
          if (plan.blocks == 0 && plan.rank_blocks == 0) std::memset(c, 0, static_cast<size_t>(c_bytes));
          store(row0, rows, run0 + q, c, kLdc);
        }
      }
      unit += count;
    }
    L::end();
  }

  // Panels outside, strips inside: a group of panels stays in L1 while the strips of dy stream from L2.
  static void multiply_rows(const uint8_t* packed, int64_t all_blocks, int64_t block0, int64_t blocks,
                            int64_t rows, const uint8_t* panel, int64_t panels, float* c, bool accumulate) {
    for (int64_t p = 0; p < panels; p += G::kGroup) {
      const int64_t width = min64(G::kGroup, panels - p);
      for (int64_t i = 0; i < rows; i += G::kStripRows) {
        L::multiply(packed + (i / G::kStripRows * all_blocks + block0) * G::kStripBlockBytes,
                    panel + p * blocks * kTileBytes, width, blocks, c + i * G::kRun + p * kPanel, G::kRun,
                    min64(G::kStripRows, rows - i), accumulate);
      }
    }
  }

  Status run(int32_t threads) {
    runs = ceil_div(k, G::kRun);
    plan = make_plan<L>(m, n, 1, ext.n, L::kBackwardRows, G::kStripRows, G::kRun * 4);
    out_of_memory = false;
    parallel_ranges(
        total_cost(m, plan.row_block, runs), threads,
        [](void* context, int64_t begin, int64_t end) {
          auto& self = *static_cast<Backward*>(context);
          self.run_units(unit_at(begin, self.m, self.plan.row_block, self.runs),
                         unit_at(end, self.m, self.plan.row_block, self.runs));
        },
        this);
    return out_of_memory ? Status::kOutOfMemory : Status::kOk;
  }
};

// ---- the two ops --------------------------------------------------------------------------------------------

template <class L>
Status gemm_linear(const Nf4LinearArgs& a) {
  if (a.r > 0 && a.lora_a != nullptr) {
    Forward<L, DenseRows> low_rank{.x = a.x,
                                   .m = a.m,
                                   .k = a.weight.k,
                                   .n = a.r,
                                   .dtype = a.dtype,
                                   .source = {a.lora_a, a.lora_dtype, a.r, a.weight.k, 1.0f},
                                   .u = nullptr,
                                   .ext = {},
                                   .bias = nullptr,
                                   .out = a.u,
                                   .plan = {},
                                   .strips = 0,
                                   .out_of_memory = false};
    if (const Status status = low_rank.run(a.threads); status != Status::kOk) return status;
  }
  Forward<L, Nf4Weight> base{.x = a.x,
                             .m = a.m,
                             .k = a.weight.k,
                             .n = a.weight.n,
                             .dtype = a.dtype,
                             .source = a.weight,
                             .u = a.u,
                             .ext = {a.lora_b, a.lora_dtype, a.weight.n, a.r, a.scaling},
                             .bias = a.bias,
                             .out = a.y,
                             .plan = {},
                             .strips = 0,
                             .out_of_memory = false};
  return base.run(a.threads);
}

template <class L>
Status gemm_grad_input(const Nf4LinearGradInputArgs& a) {
  if (a.r > 0) {
    Backward<L, DenseRows> low_rank{.dy = a.dy,
                                    .m = a.m,
                                    .n = a.weight.n,
                                    .k = a.r,
                                    .dtype = a.dtype,
                                    .source = {a.lora_b, a.lora_dtype, a.weight.n, a.r, a.scaling},
                                    .v = nullptr,
                                    .ext = {},
                                    .out = a.v,
                                    .plan = {},
                                    .runs = 0,
                                    .out_of_memory = false};
    if (const Status status = low_rank.run(a.threads); status != Status::kOk) return status;
  }
  Backward<L, Nf4Weight> base{.dy = a.dy,
                              .m = a.m,
                              .n = a.weight.n,
                              .k = a.weight.k,
                              .dtype = a.dtype,
                              .source = a.weight,
                              .v = a.v,
                              .ext = {a.lora_a, a.lora_dtype, a.r, a.weight.k, 1.0f},
                              .out = a.dx,
                              .plan = {},
                              .runs = 0,
                              .out_of_memory = false};
  return base.run(a.threads);
}

}  // namespace
}  // namespace fastlora::cpu
