// Dropout whose mask is a function of (seed, element index) alone, so that backward regenerates it.
#pragma once

#include <cstdint>

#include "fastlora/status.h"

namespace fastlora {

// out[i] = keep(i) ? x[i] / (1 - p) : 0, where keep(i) compares the top 32 bits of
// splitmix64(seed + i * 0x9E3779B97F4A7C15) with p * 2^32.
struct LoraDropoutArgs {
  const void* x;  // (count), dtype
  void* out;      // (count), dtype; may be x
  int64_t count;
  uint64_t seed;
  double p;  // in [0, 1)
  DType dtype;
  int32_t threads;
};
Status lora_dropout(const LoraDropoutArgs& args);

}  // namespace fastlora
