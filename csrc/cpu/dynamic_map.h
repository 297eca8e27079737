// The dynamic 8-bit maps as tables that wide kernels gather from.
#pragma once

#include <cstdint>

namespace fastlora::cpu {

// The nearest entry is found by a value's leading 16 bits: its sign, exponent and 7 bits of mantissa name a cell,
// and no cell has more than one midpoint. A cell is one word: the entry that it begins with (bits 0 to 7), the one
// it ends with (8 to 15), and the last of its low 16 bits that still has the first (16 to 31). Magnitudes under
// 2^-23, whose low bits say nothing, read the first cell, those above 1 the last one; both are one entry
// throughout.
constexpr int32_t kMapFirstCell = (127 - 23) << 7;
constexpr int32_t kMapCells = (23 << 7) + 1;

struct DynamicMap {
  const float* values;            // (256), ascending
  uint32_t cells[2 * kMapCells];  // of positive values, then of negative ones
  uint8_t zero;                   // the index of 0
};

const DynamicMap& signed_map();
const DynamicMap& unsigned_map();  // negative values find 0

}  // namespace fastlora::cpu
