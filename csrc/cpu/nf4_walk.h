// How quantise and dequantise cut a weight into pieces of work, the same for every level.
//
// Codes are packed by rows and scales run over the flattened tensor. Where a row has an even number of columns
// the packed bytes are flat too: the weight is then walked as one row, in whole blocks. Otherwise bytes and
// blocks do not line up, and a piece is a few rows (or a part of a long one) whose blocks may be shared with
// its neighbours.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace fastlora::cpu {

// 256 KiB of float32 at most, so that the second look at a block finds it in the second-level cache. A multiple
// of every block size and of 2.
static constexpr int64_t kItemElements = 65536;

struct Nf4Walk {
  int64_t rows, cols;  // as walked
  int64_t row_bytes;
  bool flat;
  int64_t rows_per_item, items_per_row;  // one of them is 1
  int64_t items;
};

// A rectangle of whole rows, or a part of one row that starts at an even column: contiguous either way.
struct Nf4Item {
  int64_t row_begin, row_end, col_begin, col_end;
};

static inline Nf4Walk nf4_walk(int64_t rows, int64_t cols) {
  Nf4Walk w{};
  w.flat = cols % 2 == 0 || rows == 1;
  w.rows = w.flat ? 1 : rows;
  w.cols = w.flat ? rows * cols : cols;
  w.row_bytes = ceil_div(w.cols, 2);
  w.items_per_row = ceil_div(w.cols, kItemElements);
  w.rows_per_item = max64(1, kItemElements / w.cols);
  w.items = w.items_per_row > 1 ? w.rows * w.items_per_row : ceil_div(w.rows, w.rows_per_item);
  return w;
}

static inline Nf4Item nf4_item(const Nf4Walk& w, int64_t index) {
  if (w.items_per_row > 1) {
    const int64_t row = index / w.items_per_row, begin = index % w.items_per_row * kItemElements;
    return {row, row + 1, begin, min64(begin + kItemElements, w.cols)};
  }
  return {index * w.rows_per_item, min64((index + 1) * w.rows_per_item, w.rows), 0, w.cols};
}

}  // namespace fastlora::cpu
