// The widened copies of x and dy for the dense route, under the emulator: every element, zeros and pads included,
// bit for bit; and what else the launches write is as it is without the copy.
#include "fastlora/cuda.h"
#include "tests/emulated_tensor.h"

namespace fastlora::testing {
namespace {

struct Case {
  int64_t m, inner, r;
  DType dtype, lora_dtype;
  Place place = Place::kHeap;
};

void label(const char* what, const Case& c) {
  set_case("%s %s lora %s m %lld inner %lld r %lld %s", what, dtype_name(c.dtype), dtype_name(c.lora_dtype),
           static_cast<long long>(c.m), static_cast<long long>(c.inner), static_cast<long long>(c.r),
           place_name(c.place));
}

void compare_bytes(const char* name, const EmulatedTensor& got, const EmulatedTensor& want) {
  check(got.tensor.buffer.equals(want.tensor.buffer), "%s differs from the one made without a copy", name);
}

// [operand | 0 | small | 1 | 0]
void compare_wide(const Case& c, const EmulatedTensor& wide, const EmulatedTensor& operand,
                  const EmulatedTensor& small, bool ones) {
  const int64_t at = (c.inner + 7) / 8 * 8, size = wide_size(c.inner, c.r, ones);
  check(size % 16 == 0 && size >= at + c.r + (ones ? 1 : 0), "a row of %lld elements",
        static_cast<long long>(size));
  compare_bits("wide", wide, size, [&](int64_t row, int64_t column) {
    if (column < c.inner) return operand.bits(row * c.inner + column);
    if (column < at) return half_of(c.dtype, 0.0f);
    if (column < at + c.r) return small.bits(row * c.r + column - at);
    return half_of(c.dtype, ones && column == at + c.r ? 1.0f : 0.0f);
  });
}

void project_case(const Case& c, bool ones, bool keeps_u, Rng& rng) {
  label(ones ? "widened x, ones" : "widened x", c);
  EmulatedTensor x(c.place, c.m * c.inner, c.dtype, false, "x");
  EmulatedTensor a(c.place, c.r * c.inner, c.lora_dtype, false, "a");
  EmulatedTensor u(c.place, c.m * c.r, c.dtype, true, "u"), alone(c.place, c.m * c.r, c.dtype, true, "u");
  EmulatedTensor wide(Place::kAfterGuard, c.m * wide_size(c.inner, c.r, ones), c.dtype, true, "wide");
  x.tensor.fill_normal(rng, 1.0f);
  a.tensor.fill_normal(rng, 0.2f);
  LoraProjectCudaArgs args{.x = x.data(),
                           .a = a.data(),
                           .u = alone.data(),
                           .wide = nullptr,
                           .ones = false,
                           .m = c.m,
                           .k = c.inner,
                           .r = c.r,
                           .dtype = c.dtype,
                           .a_dtype = c.lora_dtype,
                           .stream = nullptr};
  emulator::set_seed(rng.next());
  if (!succeeded("u alone", lora_project_cuda(args))) return;
  args.u = keeps_u ? u.data() : nullptr;
  args.wide = wide.data();
  args.ones = ones;
  if (!succeeded("u and the copy", lora_project_cuda(args))) return;
  if (keeps_u) compare_bytes("u", u, alone);
  compare_wide(c, wide, x, alone, ones);
}

// v, and dB with it, of dy (m, inner).
void gradients_case(const Case& c, bool with_gram, Rng& rng) {
  label(with_gram ? "widened dy, dB" : "widened dy", c);
  EmulatedTensor dy(c.place, c.m * c.inner, c.dtype, false, "dy");
  EmulatedTensor u(c.place, c.m * c.r, c.dtype, false, "u");
  EmulatedTensor b(c.place, c.inner * c.r, c.lora_dtype, false, "b");
  EmulatedTensor v(c.place, c.m * c.r, c.dtype, true, "v"), v_alone(c.place, c.m * c.r, c.dtype, true, "v");
  EmulatedTensor db(c.place, c.inner * c.r, c.lora_dtype, true, "db");
  EmulatedTensor db_alone(c.place, c.inner * c.r, c.lora_dtype, true, "db");
  EmulatedTensor wide(Place::kAfterGuard, c.m * wide_size(c.inner, c.r, false), c.dtype, true, "wide");
  dy.tensor.fill_normal(rng, 1.0f);
  u.tensor.fill_normal(rng, 1.0f);
  b.tensor.fill_normal(rng, 0.2f);
  LoraGradientsCudaArgs args{.tall = dy.data(),
                             .small = with_gram ? u.data() : nullptr,
                             .factor = b.data(),
                             .product = v_alone.data(),
                             .gram = with_gram ? db_alone.data() : nullptr,
                             .wide = nullptr,
                             .m = c.m,
                             .width = c.inner,
                             .r = c.r,
                             .scaling = 0.375f,
                             .rank_major = false,
                             .dtype = c.dtype,
                             .lora_dtype = c.lora_dtype,
                             .scratch = nullptr,
                             .stream = nullptr};
  const EmulatedScratch scratch(lora_gradients_cuda_scratch(args));
  args.scratch = scratch.data();
  emulator::set_seed(rng.next());
  if (!succeeded("v alone", lora_gradients_cuda(args))) return;
  args.product = v.data();
  args.gram = with_gram ? db.data() : nullptr;
  args.wide = wide.data();
  if (!succeeded("v and the copy", lora_gradients_cuda(args))) return;
  compare_bytes("v", v, v_alone);
  if (with_gram) compare_bytes("dB", db, db_alone);
  compare_wide(c, wide, dy, v_alone, false);
}

// Where rows are whole vectors, those use whole sectors: nothing is copied by halves of them.
void test_sectors(Rng& rng) {
  emulator::take_counts();
  const Case c{.m = 64,
               .inner = 1024,
               .r = 16,
               .dtype = DType::kBFloat16,
               .lora_dtype = DType::kBFloat16,
               .place = Place::kAfterGuard};
  project_case(c, true, true, rng);
  gradients_case(c, true, rng);
  set_case("whole sectors");
  check_whole_sectors(4);  // x in and out, dy in and out
}

// What the entry points do not take; none of these addresses is looked at.
void test_refusals() {
  set_case("refusals");
  alignas(16) uint8_t place[32];
  LoraProjectCudaArgs project{.x = place,
                              .a = place,
                              .u = nullptr,
                              .wide = nullptr,
                              .ones = false,
                              .m = 1,
                              .k = 8,
                              .r = 1,
                              .dtype = DType::kBFloat16,
                              .a_dtype = DType::kBFloat16,
                              .stream = nullptr};
  refuses("neither u nor a copy", lora_project_cuda(project));
  project.wide = place + 2;
  refuses("a copy at an odd place", lora_project_cuda(project));
  refuses("a copy without its product", lora_gradients_cuda({.tall = place,
                                                             .small = place,
                                                             .factor = nullptr,
                                                             .product = nullptr,
                                                             .gram = place,
                                                             .wide = place,
                                                             .m = 1,
                                                             .width = 8,
                                                             .r = 1,
                                                             .scaling = 1.0f,
                                                             .rank_major = false,
                                                             .dtype = DType::kBFloat16,
                                                             .lora_dtype = DType::kBFloat16,
                                                             .scratch = place,
                                                             .stream = nullptr}));
}

}  // namespace

void test_cuda_wide() {
  Rng rng(31);
  test_refusals();
  test_sectors(rng);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t m : {1, 9, 70}) {
      for (const int64_t r : {1, 5, 16, 23, 70}) {
        for (const int64_t inner : {1, 123, 128, 600}) {
          const Case c{.m = m,
                       .inner = inner,
                       .r = r,
                       .dtype = dtype,
                       .lora_dtype = kDTypes[(m + r + inner) % 3],
                       .place = inner == 123 ? Place::kOddHeap : Place::kHeap};
          for (const bool ones : {false, true}) project_case(c, ones, (r + inner) % 2 == 0, rng);
          for (const bool with_gram : {false, true}) gradients_case(c, with_gram, rng);
        }
      }
    }
  }
}

}  // namespace fastlora::testing
