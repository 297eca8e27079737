// Codes turned into float32 one by one, as the format has it: code * absmax, rounded. The 16 values lie in shared
// memory, one copy a bank, so that no two lanes of a warp ever meet in one.
#pragma once

#include "nf4.cuh"

namespace fastlora::cuda {

constexpr int kValueBytes = 16 * 32 * 4;  // of shared memory, from 0 on

// The values, as a kernel is given them.
struct Nf4Values {
  float of_code[16];
};
inline Nf4Values nf4_values() {
  Nf4Values values;
  for (int i = 0; i < 16; ++i) values.of_code[i] = kNf4Codes[i];
  return values;
}

// By a block of kThreads; a barrier must follow.
template <int kThreads>
FASTLORA_DEVICE void fill_values(const Nf4Values& values FASTLORA_AT) {
  auto* table = shared_memory<float>(0);
  for (int i = thread_index(); i < 16 * 32; i += kThreads) {
    store_shared(table + i, values.of_code[i / 32] FASTLORA_HERE);
  }
}

// Eight codes of a word, the even ones in high nibbles; code i of four or eight.
FASTLORA_DEVICE uint32_t code_of(uint32_t word, int i) {
  return word >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0)) & 15;
}

FASTLORA_DEVICE float value_of(uint32_t code FASTLORA_AT) {
  return load_shared(shared_memory<float>(0) + code * 32 + static_cast<uint32_t>(lane_index()) FASTLORA_HERE);
}

}  // namespace fastlora::cuda
