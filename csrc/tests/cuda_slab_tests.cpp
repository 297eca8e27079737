// Slabs of W for the dense route, under the emulator: every element, bit for bit, and what belongs to nobody as it
// was.
#include "fastlora/cuda.h"
#include "tests/emulated_tensor.h"

namespace fastlora::testing {
namespace {

struct Case {
  int64_t n, k, blocksize = 64;
  int64_t first_row = 0, rows, first_column = 0, columns, r;
  DType dtype = DType::kBFloat16, lora_dtype = DType::kBFloat16;
  bool nested = true, bias = false, below = false;
  int64_t gap = 0;  // elements between the columns and the row's end that belong to nobody
  Place place = Place::kHeap;
};

void slab_case(const Case& c, Rng& rng) {
  set_case("slab %s lora %s [%lld, %lld] + [%lld, %lld] of %lld x %lld, r %lld, blocksize %lld%s%s%s %s",
           dtype_name(c.dtype), dtype_name(c.lora_dtype), static_cast<long long>(c.first_row),
           static_cast<long long>(c.first_column), static_cast<long long>(c.rows),
           static_cast<long long>(c.columns), static_cast<long long>(c.n), static_cast<long long>(c.k),
           static_cast<long long>(c.r), static_cast<long long>(c.blocksize), c.nested ? " nested" : "",
           c.bias ? " bias" : "", c.below ? " below" : "", place_name(c.place));
  EmulatedWeight weight(c.place, rng, c.n, c.k, c.blocksize, c.nested);
  EmulatedTensor factor(c.place, c.below ? c.r * c.k : c.n * c.r, c.lora_dtype, false, "factor");
  EmulatedTensor bias(c.place, c.n, c.dtype, false, "bias");
  factor.tensor.fill_normal(rng, 0.2f);
  bias.tensor.fill_normal(rng, 1.0f);
  EmulatedTensor plain(c.place, c.rows * c.columns, c.dtype, true, "plain");
  const int64_t inner = c.below ? c.rows : c.columns, contraction = wide_size(inner, c.r, c.bias);
  const int64_t stride = c.below || c.r == 0 ? c.columns + c.gap : contraction;
  const int64_t height = c.below && c.r > 0 ? contraction : c.rows;
  EmulatedTensor out(c.below ? c.place : Place::kAfterGuard, height * stride, c.dtype, true, "slab");
  emulator::set_seed(rng.next());
  if (!succeeded("plain", nf4_dequantize_cuda({.weight = weight.weight.view(),
                                               .first_row = c.first_row,
                                               .rows = c.rows,
                                               .first_column = c.first_column,
                                               .columns = c.columns,
                                               .map = nf4_dynamic_map(),
                                               .out = plain.data(),
                                               .dtype = c.dtype,
                                               .stream = nullptr}))) {
    return;
  }
  const float scaling = c.below ? 1.0f : 0.375f;
  if (!succeeded("slab", nf4_slab_cuda({.weight = weight.weight.view(),
                                        .first_row = c.first_row,
                                        .rows = c.rows,
                                        .first_column = c.first_column,
                                        .columns = c.columns,
                                        .map = nf4_dynamic_map(),
                                        .out = out.data(),
                                        .out_stride = stride,
                                        .factor = c.r > 0 ? factor.data() : nullptr,
                                        .bias = c.bias ? bias.data() : nullptr,
                                        .r = c.r,
                                        .scaling = scaling,
                                        .below = c.below,
                                        .dtype = c.dtype,
                                        .lora_dtype = c.lora_dtype,
                                        .stream = nullptr}))) {
    return;
  }
  const int64_t rank_at = (inner + 7) / 8 * 8;
  compare_bits("slab", out, stride, [&](int64_t row, int64_t column) -> uint16_t {
    if (row < c.rows && column < c.columns) return plain.bits(row * c.columns + column);
    if (column >= c.columns && (c.below || c.r == 0)) return 0xffff;  // as the buffer was
    const int64_t rank = (c.below ? row : column) - rank_at;
    const int64_t outer = c.below ? c.first_column + column : c.first_row + row;
    if (rank == c.r && c.bias) return bias.bits(outer);
    if (rank < 0 || rank >= c.r) return half_of(c.dtype, 0.0f);
    const int64_t at = c.below ? rank * c.k + outer : outer * c.r + rank;
    return half_of(c.dtype, factor.tensor[at] * scaling);
  });
}

void test_slabs(DType dtype, Rng& rng) {
  for (const DType lora_dtype : kDTypes) {
    for (const int64_t r : {1, 5, 16, 33}) {
      for (const bool bias : {false, true}) {
        // Forward: rows of W. Ragged, in vectors, and in several pieces a row.
        for (const int64_t k : {123, 128, 1100, 2184}) {
          slab_case({.n = 40,
                     .k = k,
                     .first_row = 7,
                     .rows = k > 1000 ? 4 : 33,
                     .columns = k,
                     .r = r,
                     .dtype = dtype,
                     .lora_dtype = lora_dtype,
                     .nested = r != 5,
                     .bias = bias,
                     .place = k == 123 ? Place::kOddHeap : Place::kHeap},
                    rng);
        }
      }
      // Backward: columns of W.
      slab_case({.n = 70,
                 .k = 123,
                 .blocksize = 32,
                 .rows = 70,
                 .first_column = 64,
                 .columns = 59,
                 .r = r,
                 .dtype = dtype,
                 .lora_dtype = lora_dtype,
                 .nested = false,
                 .below = true,
                 .gap = 5},
                rng);
      slab_case({.n = 33,
                 .k = 1536,
                 .blocksize = 128,
                 .rows = 33,
                 .first_column = 128,
                 .columns = 1296,
                 .r = r,
                 .dtype = dtype,
                 .lora_dtype = lora_dtype,
                 .below = true},
                rng);
    }
  }
  // Nothing beside it.
  slab_case({.n = 9,
             .k = 96,
             .blocksize = 32,
             .first_row = 2,
             .rows = 5,
             .columns = 96,
             .r = 0,
             .dtype = dtype,
             .lora_dtype = dtype},
            rng);
  slab_case({.n = 9,
             .k = 77,
             .rows = 9,
             .first_column = 2,
             .columns = 75,
             .r = 0,
             .dtype = dtype,
             .lora_dtype = dtype,
             .below = true,
             .gap = 5,
             .place = Place::kOddHeap},
            rng);
}

// What the entry point does not take; none of these addresses is looked at.
void test_refusals() {
  set_case("refusals");
  alignas(16) uint8_t place[32];
  const Nf4SlabCudaArgs slab{
      .weight = {.packed = place, .scales = {place, nullptr}, .n = 4, .k = 64, .blocksize = 64},
      .first_row = 0,
      .rows = 4,
      .first_column = 0,
      .columns = 64,
      .map = nullptr,
      .out = place,
      .out_stride = 80,
      .factor = place,
      .bias = nullptr,
      .r = 5,
      .scaling = 1.0f,
      .below = false,
      .dtype = DType::kBFloat16,
      .lora_dtype = DType::kBFloat16,
      .stream = nullptr};
  const auto slab_with = [&](auto change) {
    Nf4SlabCudaArgs args = slab;
    change(args);
    return nf4_slab_cuda(args);
  };
  refuses("float32", slab_with([](auto& a) { a.dtype = DType::kFloat32; }));
  refuses("a row too short", slab_with([](auto& a) { a.out_stride = 72; }));
  refuses("no factor", slab_with([](auto& a) { a.factor = nullptr; }));
  refuses("rows beyond W", slab_with([](auto& a) { a.first_row = 1; }));
  refuses("an odd first column", slab_with([](auto& a) { a.first_column = 1, a.columns = 63; }));
  refuses("a bias below", slab_with([&](auto& a) { a.below = true, a.bias = place; }));
  refuses("a bias alone", slab_with([&](auto& a) { a.r = 0, a.bias = place; }));
}

}  // namespace

void test_cuda_slab() {
  Rng rng(37);
  test_refusals();
  emulator::take_counts();
  for (const bool below : {false, true}) {
    slab_case(
        {.n = 64, .k = 1024, .rows = 64, .columns = 1024, .r = 16, .below = below, .place = Place::kAfterGuard},
        rng);
  }
  set_case("whole sectors");
  check_whole_sectors(2);  // by nf4_dequantize and by nf4_slab
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) test_slabs(dtype, rng);
}

}  // namespace fastlora::testing
