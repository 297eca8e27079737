// The dynamic maps (Dettmers et al., 8-bit optimizers, 2022), and their cells.
#include "dynamic_map.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "fastlora/adamw.h"
#include "fastlora/nf4.h"
#include "numeric.h"

namespace fastlora {
namespace {

using namespace cpu;

// For each decade 10^-6 .. 1 the cell centres of a grid of 2^(i + 1) cells over [0.1, 1], between 0 and 1. Written
// out, because bitsandbytes computes them by way of float32 and states must decode to the same bits.
constexpr float kUnsigned[256] = {0.0f,           3.2500003e-07f, 7.75e-07f,      2.1249998e-06f,
                                  4.3749997e-06f, 6.625e-06f,     8.874999e-06f,  1.5624999e-05f,
                                  2.6875001e-05f, 3.8125e-05f,    4.9374998e-05f, 6.0625003e-05f,
                                  7.1875e-05f,    8.312499e-05f,  9.4375e-05f,    0.000128125f,
                                  0.000184375f,   0.00024062501f, 0.00029687502f, 0.00035312498f,
                                  0.00040937503f, 0.00046562502f, 0.00052187504f, 0.000578125f,
                                  0.000634375f,   0.00069062505f, 0.000746875f,   0.0008031251f,
                                  0.00085937505f, 0.000915625f,   0.00097187504f, 0.001140625f,
                                  0.001421875f,   0.001703125f,   0.001984375f,   0.002265625f,
                                  0.0025468748f,  0.002828125f,   0.0031093748f,  0.0033906251f,
                                  0.003671875f,   0.003953125f,   0.0042343745f,  0.004515625f,
                                  0.0047968747f,  0.005078125f,   0.005359375f,   0.0056406246f,
                                  0.005921875f,   0.0062031248f,  0.006484375f,   0.0067656254f,
                                  0.0070468746f,  0.007328125f,   0.0076093744f,  0.007890625f,
                                  0.008171875f,   0.008453124f,   0.008734375f,   0.009015624f,
                                  0.0092968745f,  0.009578126f,   0.009859375f,   0.010703126f,
                                  0.012109376f,   0.013515624f,   0.014921876f,   0.016328124f,
                                  0.017734377f,   0.019140625f,   0.020546874f,   0.021953126f,
                                  0.023359375f,   0.024765624f,   0.026171876f,   0.027578129f,
                                  0.028984373f,   0.030390626f,   0.031796873f,   0.033203125f,
                                  0.034609374f,   0.036015626f,   0.03742188f,    0.038828123f,
                                  0.040234376f,   0.041640624f,   0.043046873f,   0.044453125f,
                                  0.045859374f,   0.047265626f,   0.04867187f,    0.050078124f,
                                  0.051484372f,   0.052890625f,   0.054296877f,   0.05570313f,
                                  0.057109382f,   0.058515627f,   0.059921872f,   0.061328124f,
                                  0.06273438f,    0.06414063f,    0.06554688f,    0.06695312f,
                                  0.068359375f,   0.06976563f,    0.07117188f,    0.072578125f,
                                  0.07398438f,    0.07539063f,    0.07679688f,    0.07820313f,
                                  0.07960938f,    0.081015624f,   0.08242188f,    0.08382813f,
                                  0.085234374f,   0.086640626f,   0.08804687f,    0.08945312f,
                                  0.090859376f,   0.09226563f,    0.09367188f,    0.095078126f,
                                  0.09648438f,    0.09789063f,    0.099296875f,   0.103515625f,
                                  0.11054687f,    0.11757813f,    0.12460937f,    0.13164061f,
                                  0.13867188f,    0.14570314f,    0.15273437f,    0.15976563f,
                                  0.16679686f,    0.17382812f,    0.18085939f,    0.18789062f,
                                  0.19492188f,    0.20195311f,    0.20898438f,    0.21601564f,
                                  0.22304687f,    0.23007813f,    0.23710936f,    0.24414062f,
                                  0.25117186f,    0.25820312f,    0.26523438f,    0.2722656f,
                                  0.27929688f,    0.28632814f,    0.29335937f,    0.3003906f,
                                  0.30742186f,    0.31445312f,    0.3214844f,     0.32851562f,
                                  0.33554685f,    0.3425781f,     0.34960938f,    0.35664064f,
                                  0.36367187f,    0.3707031f,     0.37773436f,    0.38476562f,
                                  0.3917969f,     0.39882812f,    0.40585935f,    0.4128906f,
                                  0.41992188f,    0.42695314f,    0.43398437f,    0.4410156f,
                                  0.44804686f,    0.45507812f,    0.4621094f,     0.46914062f,
                                  0.47617185f,    0.4832031f,     0.49023438f,    0.4972656f,
                                  0.5042969f,     0.5113281f,     0.51835936f,    0.5253906f,
                                  0.5324218f,     0.53945315f,    0.54648435f,    0.5535157f,
                                  0.5605469f,     0.56757814f,    0.5746094f,     0.5816406f,
                                  0.5886719f,     0.5957031f,     0.6027344f,     0.60976565f,
                                  0.61679685f,    0.6238282f,     0.6308594f,     0.63789064f,
                                  0.6449219f,     0.6519531f,     0.6589844f,     0.6660156f,
                                  0.6730469f,     0.68007815f,    0.68710935f,    0.6941407f,
                                  0.7011719f,     0.70820314f,    0.7152344f,     0.7222656f,
                                  0.7292969f,     0.7363281f,     0.7433594f,     0.75039065f,
                                  0.75742185f,    0.7644532f,     0.7714844f,     0.7785156f,
                                  0.7855469f,     0.7925781f,     0.7996094f,     0.8066406f,
                                  0.8136718f,     0.82070315f,    0.82773435f,    0.8347657f,
                                  0.8417969f,     0.8488281f,     0.8558594f,     0.8628906f,
                                  0.8699219f,     0.8769531f,     0.8839843f,     0.89101565f,
                                  0.89804685f,    0.9050782f,     0.9121094f,     0.9191406f,
                                  0.9261719f,     0.9332031f,     0.9402344f,     0.9472656f,
                                  0.9542968f,     0.96132815f,    0.96835935f,    0.9753907f,
                                  0.9824219f,     0.9894531f,     0.9964844f,     1.0f};

// How many midpoints lie strictly below: the nearest index, a tie to the lower one.
int nearest_of(const float* values, double value) {
  int low = 0, high = 255;
  while (low < high) {
    const int middle = (low + high) / 2;
    const double midpoint = (static_cast<double>(values[middle]) + static_cast<double>(values[middle + 1])) * 0.5;
    if (midpoint < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

DynamicMap map_of(const float* values) {
  DynamicMap map;
  map.values = values;
  map.zero = static_cast<uint8_t>(nearest_of(values, 0.0));
  for (int32_t index = 0; index < 2 * kMapCells; ++index) {
    const int32_t cell = index % kMapCells;
    const double sign = index < kMapCells ? 1.0 : -1.0;
    const auto at = [&](uint32_t low) {
      const uint32_t bits = (static_cast<uint32_t>(kMapFirstCell + cell) << 16) | low;
      return static_cast<uint32_t>(nearest_of(values, sign * static_cast<double>(load_unaligned<float>(&bits))));
    };
    const uint32_t begin = at(0), end = cell == 0 || cell == kMapCells - 1 ? begin : at(0xffff);
    uint32_t last = 0xffff;
    if (end != begin) {  // the last that has `begin`
      uint32_t known = 0;
      while (last - known > 1) (at((known + last) / 2) == begin ? known : last) = (known + last) / 2;
      last = known;
    }
    map.cells[index] = begin | (end << 8) | (last << 16);
  }
  return map;
}

// The largest float32 that does not exceed the midpoint of each entry and the next; none is above the last.
void fill_bounds(const float* values, float* bounds) {
  for (int i = 0; i < 255; ++i) {
    const double midpoint = (static_cast<double>(values[i]) + static_cast<double>(values[i + 1])) * 0.5;
    bounds[i] = static_cast<float>(midpoint);
    if (static_cast<double>(bounds[i]) > midpoint) bounds[i] = std::nextafter(bounds[i], -1.0f);
  }
  bounds[255] = std::numeric_limits<float>::infinity();
}

void fill_cells(const DynamicMap& map, int32_t count, uint8_t* cells) {
  for (int32_t i = 0; i < count; ++i) {
    const auto begin = static_cast<uint8_t>(map.cells[i]), end = static_cast<uint8_t>(map.cells[i] >> 8);
    cells[i] = begin < end ? begin : end;
  }
}

AdamwTables tables_of(const DynamicMap& with_sign, const DynamicMap& without) {
  AdamwTables tables{};
  std::memcpy(tables.signed_values, with_sign.values, sizeof tables.signed_values);
  std::memcpy(tables.unsigned_values, without.values, sizeof tables.unsigned_values);
  fill_bounds(with_sign.values, tables.signed_bounds);
  fill_bounds(without.values, tables.unsigned_bounds);
  fill_cells(with_sign, 2 * kMapCells, tables.signed_cells);
  fill_cells(without, kMapCells, tables.unsigned_cells);
  return tables;
}

}  // namespace

const float* unsigned_dynamic_map() { return kUnsigned; }

const DynamicMap& cpu::signed_map() {
  static const DynamicMap map = map_of(nf4_dynamic_map());
  return map;
}

const DynamicMap& cpu::unsigned_map() {
  static const DynamicMap map = map_of(kUnsigned);
  return map;
}

const AdamwTables& adamw_tables() {
  static const AdamwTables tables = tables_of(signed_map(), unsigned_map());
  return tables;
}

}  // namespace fastlora
