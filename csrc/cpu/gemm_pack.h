// Packing of what is dense: activations, and lora_a or lora_b in the place of W.
#pragma once

#include "gemm_rows.h"

namespace fastlora::cpu {
namespace {

template <class L>
struct Pack : Gemm<L> {
  using G = Gemm<L>;
  using G::kPerItem, G::kPerVector, G::kRun, G::kRunPanels, G::kStripBlockBytes, G::kStripRows, G::kVectors;
  using G::panel_place;
  using typename G::PanelPlace;
  using typename G::T;

  // Columns [k0, k0 + count) of a row, scaled and converted, zeros past the last column.
  static void load_dense(const DenseRows& s, int64_t row, int64_t k0, int64_t count, T* out) {
    const int64_t have = max64(0, min64(count, s.k - k0));
    const void* from = element_ptr(s.data, row * s.k + k0, s.dtype);
    if (have > 0 && s.scale == 1.0f) {
      L::load_row(from, s.dtype, have, out);
    } else if (have > 0) {
      L::load_scaled_row(from, s.dtype, have, s.scale, out);
    }
    for (int64_t j = have; j < count; ++j) out[j] = L::from_float(0.0f);
  }

  // ---- rows of W as an A strip: contraction columns [k0, k0 + blocks * kPerVector) of rows [row0, row0 + rows)

  static void strip_of(const DenseRows& s, int64_t row0, int64_t rows, int64_t k0, int64_t blocks, bool permuted,
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
        uint8_t* out = strip + b * kStripBlockBytes + i * 64;
        if constexpr (requires { L::permute_run(piece, out, kStripBlockBytes); }) {
          L::permute_run(piece, out, kStripBlockBytes);
          continue;
        }
        for (int64_t j = 0; j < kRun; ++j) {
          reinterpret_cast<T*>(out + j / kPerVector * kStripBlockBytes)[j % kPerVector] = piece[L::order(j)];
        }
      }
    }
  }

  // ---- rows of W as B panels: items [t0, t0 + 16 * blocks) of the contraction over rows, columns
  //      [k0, k0 + kRun) or, when not permuted, the first `panels` * 16 of them

  static void panels_of(const DenseRows& s, int64_t row0, int64_t blocks, int64_t k0, bool permuted,
                        int64_t panels, uint8_t* out) {
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

  // ---- activations

  // Rows [row0, row0 + rows) of x, columns [k0, k0 + blocks * kPerVector), as B panels; zeros past rows and k.
  template <class Rows = NaturalRows>
  static void pack_panels(const void* x, DType dtype, int64_t ld, int64_t row0, int64_t rows, int64_t k0,
                          int64_t k, int64_t blocks, bool permuted, uint8_t* out, const Rows& row_of = {}) {
    const int64_t panels = ceil_div(rows, kPanel);
    alignas(64) T piece[kPanel][kRun];
    for (int64_t p = 0; p < panels; ++p) {
      const PanelPlace place = panel_place(p, panels, blocks);
      const int64_t step = permuted ? kVectors : 1;
      for (int64_t b = 0; b < blocks; b += step) {
        const int64_t first = k0 + b * kPerVector, want = step * kPerVector;
        const int64_t have = max64(0, min64(want, k - first));
        for (int64_t j = 0; j < kPanel; ++j) {
          const int64_t row = p * kPanel + j < rows ? row_of(row0 + p * kPanel + j) : -1;
          const int64_t count = row >= 0 ? have : 0;
          if (count > 0) L::load_row(element_ptr(x, row * ld + first, dtype), dtype, count, piece[j]);
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
  template <class Rows = NaturalRows>
  static void pack_strips(const void* dy, DType dtype, int64_t ld, int64_t row0, int64_t rows, int64_t n0,
                          int64_t n, int64_t blocks, uint8_t* out, const Rows& row_of = {}) {
    for (int64_t i = 0; i < rows; ++i) {
      uint8_t* strip = out + i / kStripRows * blocks * kStripBlockBytes + i % kStripRows * 64;
      const int64_t row = row_of(row0 + i);
      for (int64_t b = 0; b < blocks; ++b) {
        T* to = reinterpret_cast<T*>(strip + b * kStripBlockBytes);
        const int64_t first = n0 + b * kPerVector;
        const int64_t count = row >= 0 ? max64(0, min64(kPerVector, n - first)) : 0;
        if (count > 0) L::load_row(element_ptr(dy, row * ld + first, dtype), dtype, count, to);
        for (int64_t c = count; c < kPerVector; ++c) to[c] = L::from_float(0.0f);
      }
    }
  }
};

}  // namespace
}  // namespace fastlora::cpu
