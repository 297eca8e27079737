// The emulator itself: every collective against an independent derivation, counters and conversions. The kernels
// here are written as those of csrc/cuda are, against device.cuh alone.
#include <cmath>
#include <vector>

#include "cuda/tensor_core.cuh"
#include "tests/planted.h"

namespace fastlora::testing {
namespace {

using namespace cuda;

// ---- collectives --------------------------------------------------------------------------------------------

void shuffles(Job job) {
  auto* out = static_cast<uint32_t*>(job.out) + thread_index() * 5;
  const auto mine = static_cast<uint32_t>(100 + thread_index());
  store_global(out, shuffle(mine, 31 - lane_index()));
  store_global(out + 1, shuffle_xor(mine, 5, kAllLanes));
  store_global(out + 2, shuffle_up(mine, 3));
  store_global(out + 3, shuffle_down(mine, 7));
  store_global(out + 4, ballot(lane_index() % 3 == 0));
}

void test_shuffles() {
  std::vector<uint32_t> out(64 * 5);
  const EmulatedBuffer buffer(out.data(), out.size() * 4, true, "out");
  expect_clean("shuffles", run(shuffles, {nullptr, out.data(), 0}, 64, 0));
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; lane += 3) votes |= 1u << lane;
  for (int t = 0; t < 64; ++t) {
    const int lane = t % 32, base = 100 + t - lane;
    const int want[5] = {base + 31 - lane, base + (lane ^ 5), lane < 3 ? base + lane : base + lane - 3,
                         lane + 7 > 31 ? base + lane : base + lane + 7, static_cast<int>(votes)};
    for (int i = 0; i < 5; ++i) {
      check(out[static_cast<size_t>(t * 5 + i)] == static_cast<uint32_t>(want[i]),
            "thread %d value %d: got %u, want %d", t, i, out[static_cast<size_t>(t * 5 + i)], want[i]);
    }
  }
}

// A product of random matrices by ldmatrix and mma, where the check knows nothing of fragments.
template <bool kBFloat16>
void tile_product(Job job) {
  auto* a = shared_memory<uint16_t>(0);    // (16, 16)
  auto* b = shared_memory<uint16_t>(512);  // (16, 8): row k, column n
  const auto* in = static_cast<const uint16_t*>(job.in);
  for (int i = thread_index(); i < 256; i += 32) store_shared(a + i, load_global(in + i));
  for (int i = thread_index(); i < 128; i += 32) store_shared(b + i, load_global(in + 256 + i));
  sync_threads();
  uint32_t x[4], y[2];
  const int lane = lane_index();
  load_matrix<4, false>(x, a + (lane % 16) * 16 + lane / 16 * 8);
  load_matrix<2, true>(y, b + (lane % 16) * 8);
  float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  multiply_tile<kBFloat16 ? DType::kBFloat16 : DType::kFloat16>(d, x, y);
  auto* out = static_cast<float*>(job.out);
  for (int i = 0; i < 4; ++i) store_global(out + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, d[i]);
}

template <bool kBFloat16>
void test_tile_product() {
  Rng rng(7);
  std::vector<uint16_t> in(256 + 128);
  std::vector<double> value(in.size());
  for (size_t i = 0; i < in.size(); ++i) {
    // Small integers over four: exact in both formats and in every sum of them.
    const float f = static_cast<float>(rng.below(33) - 16) / 4.0f;
    in[i] = kBFloat16 ? emulator::float_to_bf16(f) : emulator::float_to_fp16(f);
    value[i] = static_cast<double>(f);
  }
  std::vector<float> out(128);
  const EmulatedBuffer from(in.data(), in.size() * 2, false, "in"), to(out.data(), out.size() * 4, true, "out");
  expect_clean("tile product", run(tile_product<kBFloat16>, {in.data(), out.data(), 0}, 32, 768));
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double want = 1.0;
      for (int k = 0; k < 16; ++k) {
        want += value[static_cast<size_t>(row * 16 + k)] * value[static_cast<size_t>(256 + k * 8 + column)];
      }
      const float got = out[static_cast<size_t>(row * 8 + column)];
      check(static_cast<double>(got) == want, "(%d, %d): got %g, want %g", row, column, static_cast<double>(got),
            want);
    }
  }
}

// ldmatrix of one, two and four matrices, straight and transposed: element (i, j) of matrix m is 64m + 8i + j.
template <int kMatrices, bool kTransposed>
void matrices(Job job) {
  auto* rows = shared_memory<uint16_t>(0);
  for (int i = thread_index(); i < kMatrices * 64; i += 32) store_shared(rows + i, static_cast<uint16_t>(i));
  sync_threads();
  uint32_t out[kMatrices];
  load_matrix<kMatrices, kTransposed>(out, rows + lane_index() % (kMatrices * 8) * 8);
  for (int m = 0; m < kMatrices; ++m)
    store_global(static_cast<uint32_t*>(job.out) + m * 32 + lane_index(), out[m]);
}

template <int kMatrices, bool kTransposed>
void test_matrices() {
  std::vector<uint32_t> out(static_cast<size_t>(kMatrices) * 32);
  const EmulatedBuffer to(out.data(), out.size() * 4, true, "out");
  expect_clean("ldmatrix", run(matrices<kMatrices, kTransposed>, {nullptr, out.data(), 0}, 32, kMatrices * 128));
  // Read as 64 halves, lane after lane, a matrix is itself, or its transpose.
  for (int m = 0; m < kMatrices; ++m) {
    for (int half = 0; half < 64; ++half) {
      const int i = half / 8, j = half % 8;
      const auto got = static_cast<int>(out[static_cast<size_t>(m * 32 + half / 2)] >> (16 * (half % 2)) & 0xffff);
      check(got == 64 * m + (kTransposed ? 8 * j + i : 8 * i + j), "matrix %d half %d: got %d", m, half, got);
    }
  }
}

// Two stages of copies, and an mbarrier by which one warp hands a value to another.
void pipeline(Job job) {
  auto* stage = shared_memory<uint32_t>(0);
  const auto* in = static_cast<const uint32_t*>(job.in);
  copy_async<4>(stage + thread_index(), in + thread_index(), 4);
  copy_async_commit();
  copy_async<4>(stage + 64 + thread_index(), in + 64 + thread_index(), thread_index() == 5 ? 0 : 4);
  copy_async_commit();
  copy_async_wait<1>();
  sync_threads();
  uint32_t sum = load_shared(stage + 63 - thread_index());
  copy_async_wait<0>();
  sync_threads();
  sum += load_shared(stage + 64 + (63 - thread_index()));
  store_global(static_cast<uint32_t*>(job.out) + thread_index(), sum);
}

void test_pipeline() {
  std::vector<uint32_t> in(128), out(64);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i * i + 1);
  const EmulatedBuffer from(in.data(), 512, false, "in"), to(out.data(), 256, true, "out");
  expect_clean("copies in stages", run(pipeline, {in.data(), out.data(), 0}, 64, 512));
  for (uint32_t t = 0; t < 64; ++t) {
    const uint32_t want = in[63 - t] + (63 - t == 5 ? 0 : in[64 + 63 - t]);
    check(out[t] == want, "thread %u: got %u, want %u", t, out[t], want);
  }
}

void handover(Job job) {
  auto* value = shared_memory<uint32_t>(0);
  auto* full = shared_memory<uint64_t>(8);
  if (thread_index() == 0) memory_barrier_init(full, 32);
  sync_threads();
  for (int turn = 0; turn < 3; ++turn) {
    if (warp_index() == 0) {
      if (lane_index() == 0) store_shared(value, static_cast<uint32_t>(10 + turn));
      if (job.value == 0 || turn == 0) memory_barrier_arrive(full);
    } else {
      memory_barrier_wait(full, turn % 2);
      store_global(static_cast<uint32_t*>(job.out) + turn * 32 + lane_index(), load_shared(value));
    }
    sync_named(1, 64);
  }
}

void test_handover() {
  std::vector<uint32_t> out(96);
  const EmulatedBuffer to(out.data(), out.size() * 4, true, "out");
  expect_clean("mbarrier", run(handover, {nullptr, out.data(), 0}, 64, 16));
  for (size_t i = 0; i < 96; ++i) check(out[i] == 10 + i / 32, "value %zu: got %u", i, out[i]);
  expect_fault("an arrival too few", run(handover, {nullptr, out.data(), 1}, 64, 16), "an mbarrier");
}

void meet_grid(Job job) {
  auto* cells = static_cast<uint32_t*>(job.out);
  store_global(cells + block_index(), static_cast<uint32_t>(block_index() + 1));
  sync_grid();
  uint32_t sum = 0;
  for (int b = 0; b < block_count(); ++b) sum += load_global(cells + b);
  if (thread_index() == 0) atomic_add(cells + 8, sum);
}

void test_grid() {
  std::vector<uint32_t> out(9);
  const EmulatedBuffer to(out.data(), 36, true, "out");
  emulator::set_seed(3);
  launch("planted", meet_grid, {.blocks = 4, .threads = 1, .shared_bytes = 0, .cooperative = true},
         Job{nullptr, out.data(), 0}, nullptr);
  expect_clean("grid barrier", emulator::take_fault());
  check(out[8] == 40, "got %u", out[8]);
}

// ---- counters -----------------------------------------------------------------------------------------------

// A column of a 32-wide matrix of words: every lane in one bank. Padded by a word: every lane in its own.
void columns(Job job) {
  auto* cells = shared_memory<uint32_t>(0);
  const int pitch = 32 + job.value;
  for (int row = 0; row < 32; ++row) store_shared(cells + row * pitch + lane_index(), 1u);
  sync_threads();
  uint32_t sum = load_shared(cells + lane_index() * pitch);
  sum += load_global(static_cast<const uint32_t*>(job.in) + lane_index() * (job.value == 0 ? 2 : 1));
  store_global(static_cast<uint32_t*>(job.out) + lane_index(), sum);
}

void test_counters() {
  alignas(32) static uint32_t in[64], out[32];
  const EmulatedBuffer from(in, sizeof in, false, "in"), to(out, sizeof out, true, "out");
  for (const int padding : {0, 1}) {
    emulator::take_counts();
    emulator::set_seed(1);
    launch("planted", columns, {.blocks = 1, .threads = 32, .shared_bytes = 32 * 33 * 4}, Job{in, out, padding},
           nullptr);
    expect_clean("counters", emulator::take_fault());
    for (const emulator::LineCount& line : emulator::take_counts()) {
      int64_t instructions = 1, cost = 1, least = 1;
      switch (line.access) {
        case emulator::Access::kSharedStore: instructions = cost = least = 32; break;
        case emulator::Access::kSharedLoad: cost = padding == 0 ? 32 : 1; break;
        case emulator::Access::kGlobalLoad:
          cost = padding == 0 ? 8 : 4;
          least = 4;
          break;
        case emulator::Access::kGlobalStore: cost = least = 4; break;
      }
      check(line.instructions == instructions && line.cost == cost && line.least == least,
            "padding %d, line %d: %lld instructions, cost %lld, least %lld", padding, line.line,
            static_cast<long long>(line.instructions), static_cast<long long>(line.cost),
            static_cast<long long>(line.least));
    }
  }
}

void test_conversions() {
  set_case("float16 and bfloat16 conversions");
  for (uint32_t h = 0; h < 65536; ++h) {
    const auto half = static_cast<uint16_t>(h);
    const float f = emulator::fp16_to_float(half), g = emulator::bf16_to_float(half);
    if (!std::isnan(f))
      check(emulator::float_to_fp16(f) == half, "float16 %04x comes back as %04x", h, emulator::float_to_fp16(f));
    if (!std::isnan(g))
      check(emulator::float_to_bf16(g) == half, "bfloat16 %04x comes back as %04x", h, emulator::float_to_bf16(g));
    // Halfway to the next: the even one of the two.
    if (!std::isinf(f) && !std::isnan(f) && (h & 0x7fff) < 0x7bff) {
      const float middle = (f + emulator::fp16_to_float(static_cast<uint16_t>(h + 1))) / 2;
      check(emulator::float_to_fp16(middle) == (h % 2 == 0 ? h : h + 1), "halfway from %04x", h);
    }
  }
  set_case("byte permute");
  check(emulator::byte_permute(0x03020100, 0x07060504, 0x7531) == 0x07050301, "picks");
  check(emulator::byte_permute(0x80, 0, 0x1818) == 0x00ff00ff, "signs");
}

}  // namespace

void test_emulator() {
  test_conversions();
  test_shuffles();
  test_tile_product<true>();
  test_tile_product<false>();
  test_matrices<1, false>();
  test_matrices<1, true>();
  test_matrices<2, false>();
  test_matrices<2, true>();
  test_matrices<4, false>();
  test_matrices<4, true>();
  test_pipeline();
  test_handover();
  test_grid();
  test_counters();
  test_emulator_bugs();
  test_overlaps();
  test_warpgroup();
}

}  // namespace fastlora::testing
