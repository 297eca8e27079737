// The second quantisation, of the absmax values to 8 bits, and its inverse. One level serves all: it handles
// one value for every `blocksize` weights.
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

// Ascending: -kPositive reversed, 0, kPositive, 1. Midpoints for exact nearest, in float64 because the
// midpoint of two float32 need not be one.
struct DynamicMap {
  float values[256];
  double midpoints[255];
  DynamicMap() {
    for (int i = 0; i < 127; ++i) {
      values[126 - i] = -kPositive[i];
      values[128 + i] = kPositive[i];
    }
    values[127] = 0.0f;
    values[255] = 1.0f;
    for (int i = 0; i < 255; ++i) {
      midpoints[i] = (static_cast<double>(values[i]) + static_cast<double>(values[i + 1])) * 0.5;
    }
  }
};

const DynamicMap& dynamic_map() {
  static const DynamicMap map;
  return map;
}

// How many midpoints lie strictly below the value: the nearest index, a tie to the lower one.
uint8_t nearest_index(const double* midpoints, float scaled) {
  int below = 0;
  for (int step = 128; step > 0; step >>= 1) {
    if (below + step <= 255 && static_cast<double>(scaled) > midpoints[below + step - 1]) below += step;
  }
  return static_cast<uint8_t>(below);
}

// The sum of float32 values to about 106 bits (a float64 sum and its running error), so that the mean is the
// correctly rounded one in any order of summation.
double exact_mean(const float* values, int64_t count) {
  double sum = 0.0, error = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double value = static_cast<double>(values[i]);
    const double next = sum + value;
    const double shadow = next - sum;
    error += (sum - (next - shadow)) + (value - shadow);
    sum = next;
  }
  return count == 0 ? 0.0 : (sum + error) / static_cast<double>(count);
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
    const int64_t first = group * kNestedBlocksize, last = min64(first + kNestedBlocksize, a.blocks);
    float scale = 0.0f;
    for (int64_t b = first; b < last; ++b) {
      const float residual = a.absmax[b] - job.offset;
      const float magnitude = residual < 0.0f ? -residual : residual;
      scale = magnitude > scale ? magnitude : scale;
    }
    std::memcpy(a.nested + (1 + group) * 4, &scale, 4);
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (int64_t b = first; b < last; ++b) {
      a.codes[b] = nearest_index(map.midpoints, (a.absmax[b] - job.offset) * inverse);
    }
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

Status nf4_double_quantize(const Nf4DoubleQuantizeArgs& args) {
  if (args.blocks < 0) return Status::kBadArgument;
  DoubleQuantizeJob job{args, static_cast<float>(exact_mean(args.absmax, args.blocks))};
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
