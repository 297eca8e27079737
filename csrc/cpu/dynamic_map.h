// The dynamic 8-bit maps as tables that wide kernels gather from.
#pragma once

#include <cstdint>

#include "fastlora/adamw.h"

namespace fastlora::cpu {

// A cell (see adamw.h) is one word: the entry that it begins with (bits 0 to 7), the one it ends with (8 to 15),
// and the last of its low 16 bits that still has the first (16 to 31).

struct DynamicMap {
  const float* values;            // (256), ascending
  uint32_t cells[2 * kMapCells];  // of positive values, then of negative ones
  uint8_t zero;                   // the index of 0
};

const DynamicMap& signed_map();
const DynamicMap& unsigned_map();  // negative values find 0

}  // namespace fastlora::cpu
