// The second quantisation, of the absmax values to 8 bits, and its inverse. One level serves all: it handles
// one value for every `blocksize` weights.
#include <cmath>

#include "fastlora/nf4.h"
#include "numeric.h"
#include "parallel.h"

namespace fastlora {
namespace {

using namespace cpu;

// The positive half of the signed dynamic map (Dettmers et al., 8-bit optimizers, 2022) without its last
// value 1: for each decade 10^-6 .. 1 the cell centres of a grid of 2^i cells over [0.1, 1]. Written out,
// because bitsandbytes computes them by way of float32 and files must decode to the same bits.
// tests/test_nf4_reference.py derives them again.
constexpr float kPositive[127] = {
    5.50000038e-07f, 3.25000019e-06f, 7.7499999e-06f,  2.12499981e-05f, 4.37499984e-05f, 6.62500024e-05f,
    8.87499991e-05f, 0.000156250011f, 0.000268750038f, 0.000381250022f, 0.000493750034f, 0.000606250076f,
    0.00071875006f,  0.000831249985f, 0.000943750085f, 0.00128124992f,  0.00184375001f,  0.00240624999f,
    0.00296874996f,  0.00353124971f,  0.00409374991f,  0.00465624966f,  0.00521875033f,  0.00578125007f,
    0.00634374982f,  0.00690625003f,  0.00746874977f,  0.00803124998f,  0.00859375019f,  0.00915624946f,
    0.00971874967f,  0.0114062503f,   0.0142187504f,   0.0170312505f,   0.0198437516f,   0.0226562507f,
    0.0254687499f,   0.028281251f,    0.0310937501f,   0.0339062512f,   0.0367187522f,   0.0395312496f,
    0.0423437469f,   0.0451562516f,   0.047968749f,    0.05078125f,     0.053593751f,    0.0564062484f,
    0.0592187531f,   0.0620312504f,   0.0648437515f,   0.0676562563f,   0.0704687461f,   0.0732812509f,
    0.0760937482f,   0.078906253f,    0.0817187577f,   0.0845312476f,   0.0873437524f,   0.0901562497f,
    0.0929687545f,   0.0957812592f,   0.0985937491f,   0.107031256f,    0.12109375f,     0.135156244f,
    0.149218753f,    0.163281247f,    0.177343756f,    0.19140625f,     0.205468744f,    0.219531253f,
    0.233593747f,    0.247656241f,    0.26171875f,     0.275781274f,    0.289843738f,    0.303906262f,
    0.317968726f,    0.33203125f,     0.346093744f,    0.360156238f,    0.374218762f,    0.388281226f,
    0.40234375f,     0.416406244f,    0.430468738f,    0.444531262f,    0.458593726f,    0.47265625f,
    0.486718714f,    0.500781238f,    0.514843702f,    0.528906226f,    0.54296875f,     0.557031274f,
    0.571093798f,    0.585156262f,    0.599218726f,    0.61328125f,     0.627343774f,    0.641406298f,
    0.655468762f,    0.669531226f,    0.68359375f,     0.697656274f,    0.711718798f,    0.725781262f,
    0.739843726f,    0.75390625f,     0.767968774f,    0.782031238f,    0.796093762f,    0.810156226f,
    0.82421875f,     0.838281274f,    0.852343738f,    0.866406262f,    0.880468726f,    0.89453125f,
    0.908593774f,    0.922656238f,    0.936718762f,    0.950781226f,    0.96484375f,     0.978906274f,
    0.992968738f};

// The nearest entry is found by a table over the leading bits of a value (its exponent and 7 bits of mantissa):
// how many midpoints lie below such a cell, after which one comparison settles it, for no two midpoints are
// within 2^-7 of each other. Cells begin at 2^-22, under the smallest midpoint (2.75e-7).
constexpr uint32_t kFirstCell = (127 - 22) << 7;
constexpr uint32_t kCells = (22 << 7) + 1;  // the last one begins at 1

// Values ascending: -kPositive reversed, 0, kPositive, 1.
struct DynamicMap {
  float values[256];
  float bounds[256];  // the largest float32 that does not exceed each midpoint: above it is above the midpoint
  uint8_t below[2 * kCells];            // positive cells, then negative ones
  alignas(64) uint16_t planes[2][128];  // low and high halves of entries 127 .. 254

  DynamicMap() {
    for (int i = 0; i < 127; ++i) {
      values[126 - i] = -kPositive[i];
      values[128 + i] = kPositive[i];
    }
    values[127] = 0.0f;
    values[255] = 1.0f;
    for (int i = 0; i < 128; ++i) {
      const auto bits = load_unaligned<uint32_t>(&values[127 + i]);
      planes[0][i] = static_cast<uint16_t>(bits);
      planes[1][i] = static_cast<uint16_t>(bits >> 16);
    }
    double midpoints[256];
    for (int i = 0; i < 255; ++i) {
      midpoints[i] = (static_cast<double>(values[i]) + static_cast<double>(values[i + 1])) * 0.5;
      bounds[i] = static_cast<float>(midpoints[i]);
      if (static_cast<double>(bounds[i]) > midpoints[i]) bounds[i] = std::nextafter(bounds[i], -2.0f);
    }
    midpoints[255] = bounds[255] = 2.0f;  // never passed
    // The least value of a cell: its own bound when positive, short of the next cell's when negative.
    for (uint32_t cell = 0; cell < kCells; ++cell) {
      const double low = cell == 0 ? 0.0 : begin_of(cell), high = begin_of(cell + 1);
      int positive = 0, negative = 0;
      while (midpoints[positive] < low) ++positive;
      while (midpoints[negative] <= -high) ++negative;
      below[cell] = static_cast<uint8_t>(positive);
      below[kCells + cell] = static_cast<uint8_t>(negative);
    }
  }

  static double begin_of(uint32_t cell) {
    const uint32_t bits = (kFirstCell + cell) << 16;
    return static_cast<double>(load_unaligned<float>(&bits));
  }

  // How many midpoints lie strictly below, of |scaled| <= 1: the nearest index, a tie to the lower one. Anything
  // else (of an Inf that the caller let through) reads the last cell. No branches: signs are random.
  uint8_t nearest(float scaled) const {
    const uint32_t bits = load_unaligned<uint32_t>(&scaled);
    const auto leading = static_cast<int32_t>((bits & 0x7fffffffu) >> 16) - static_cast<int32_t>(kFirstCell);
    const int32_t from_zero = leading < 0 ? 0 : leading;
    const uint32_t cell = from_zero < static_cast<int32_t>(kCells) ? static_cast<uint32_t>(from_zero) : kCells - 1;
    const uint8_t lower = below[(bits >> 31) * kCells + cell];
    return static_cast<uint8_t>(lower + (scaled > bounds[lower]));
  }
};

const DynamicMap& dynamic_map() {
  static const DynamicMap map;
  return map;
}

// A sum of float32 values to about 106 bits: float64 and its running error.
struct ExactSum {
  double sum = 0.0, error = 0.0;
  void add(double value) {
    const double next = sum + value;
    const double shadow = next - sum;
    error += (sum - (next - shadow)) + (value - shadow);
    sum = next;
  }
  void add(const ExactSum& other) {
    add(other.sum);
    error += other.error;
  }
};

// In eight independent chains.
ExactSum exact_sum(const float* values, int64_t count) {
  constexpr int kChains = 8;
  ExactSum chains[kChains];
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    for (int chain = 0; chain < kChains; ++chain) chains[chain].add(static_cast<double>(values[i + chain]));
  }
  for (; i < count; ++i) chains[0].add(static_cast<double>(values[i]));
  for (int chain = 1; chain < kChains; ++chain) chains[0].add(chains[chain]);
  return chains[0];
}

// The mean in parallel over chunks that depend on the count alone, added up in their order: the same bits for any
// number of threads, and the correctly rounded mean.
constexpr int64_t kMeanChunks = 64;

struct MeanJob {
  const float* values;
  int64_t count, chunk;
  ExactSum sums[kMeanChunks];
};

void mean_range(void* context, int64_t begin, int64_t end) {
  auto& job = *static_cast<MeanJob*>(context);
  for (int64_t c = begin; c < end; ++c) {
    job.sums[c] = exact_sum(job.values + c * job.chunk, min64(job.chunk, job.count - c * job.chunk));
  }
}

double exact_mean(const float* values, int64_t count, int32_t threads) {
  if (count == 0) return 0.0;
  MeanJob job{values, count, max64(4096, ceil_div(count, kMeanChunks)), {}};
  const int64_t chunks = ceil_div(count, job.chunk);
  parallel_ranges(chunks, threads, mean_range, &job);
  for (int64_t c = 1; c < chunks; ++c) job.sums[0].add(job.sums[c]);
  return (job.sums[0].sum + job.sums[0].error) / static_cast<double>(count);
}

struct DoubleQuantizeJob {
  const Nf4DoubleQuantizeArgs& args;
  float offset;
};

void double_quantize_range(void* context, int64_t begin, int64_t end) {
  const auto& job = *static_cast<DoubleQuantizeJob*>(context);
  const Nf4DoubleQuantizeArgs& a = job.args;
  const DynamicMap& map = dynamic_map();
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kNestedBlocksize, count = min64(kNestedBlocksize, a.blocks - first);
    float residual[kNestedBlocksize];
    int32_t largest = 0;  // magnitudes of numbers are ordered as their bits are
    for (int64_t b = 0; b < count; ++b) {
      residual[b] = a.absmax[first + b] - job.offset;
      const int32_t magnitude = load_unaligned<int32_t>(&residual[b]) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    std::memcpy(a.nested + (1 + group) * 4, &largest, 4);
    const auto scale = load_unaligned<float>(&largest);
    const float divisor = scale > 0.0f ? scale : 1.0f;  // divided, for the inverse of a subnormal is infinite
    for (int64_t b = 0; b < count; ++b) residual[b] /= divisor;
    for (int64_t b = 0; b < count; ++b) a.codes[first + b] = map.nearest(residual[b]);
  }
}

struct DecodeJob {
  const Nf4Scales& scales;
  float* absmax;
};

void decode_range(void* context, int64_t begin, int64_t end) {
  const auto& job = *static_cast<DecodeJob*>(context);
  const float* map = nf4_dynamic_map();
  for (int64_t b = begin; b < end; ++b) job.absmax[b] = block_absmax(job.scales, map, b);
}

}  // namespace

const float* nf4_dynamic_map() { return dynamic_map().values; }
const uint16_t* nf4_dynamic_map_planes() { return &dynamic_map().planes[0][0]; }

Status nf4_double_quantize(const Nf4DoubleQuantizeArgs& args) {
  if (args.blocks < 0) return Status::kBadArgument;
  DoubleQuantizeJob job{args, static_cast<float>(exact_mean(args.absmax, args.blocks, args.threads))};
  std::memcpy(args.nested, &job.offset, 4);
  parallel_ranges(ceil_div(args.blocks, kNestedBlocksize), args.threads, double_quantize_range, &job);
  return Status::kOk;
}

Status nf4_decode_absmax(const Nf4Scales& scales, int64_t blocks, float* absmax, int32_t threads) {
  if (blocks < 0) return Status::kBadArgument;
  DecodeJob job{scales, absmax};
  parallel_ranges(blocks, blocks < 4096 ? 1 : threads, decode_range, &job);
  return Status::kOk;
}

}  // namespace fastlora
