// The roofs of any processor: what the compiler makes of plain loops at its baseline.
#include "roofs.h"

#include <cstring>

namespace fastlora::bench {

uint64_t read_scalar(const void* data, size_t bytes) {
  const uint64_t* words = static_cast<const uint64_t*>(data);
  uint64_t sums[8] = {};
  for (size_t i = 0; i < bytes / sizeof(uint64_t); i += 8) {
    for (size_t j = 0; j < 8; ++j) sums[j] ^= words[i + j];
  }
  uint64_t all = 0;
  for (const uint64_t sum : sums) all ^= sum;
  return all;
}

void copy_streaming_scalar(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

float fma_scalar(int64_t steps, const float* data, double* flops) {
  constexpr int kChains = 32;
  float sums[kChains], factor = data[0] * 0.5f, term = data[1];
  for (int j = 0; j < kChains; ++j) sums[j] = data[j];
  for (int64_t i = 0; i < steps; ++i) {
    for (int j = 0; j < kChains; ++j) sums[j] = sums[j] * factor + term;
  }
  float all = 0;
  for (const float sum : sums) all += sum;
  *flops = 2.0 * kChains * static_cast<double>(steps);
  return all;
}

}  // namespace fastlora::bench
