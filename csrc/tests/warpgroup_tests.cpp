// The emulated products of a warpgroup: their values against plain sums, a pipeline as kernels have them, and
// planted bugs.
#include <vector>

#include "cuda/warpgroup.cuh"
#include "tests/planted.h"

namespace fastlora::testing {
namespace {

using namespace cuda;

constexpr int kDepth = 64;  // values of k in a tile

// The place of value k of column `column` in a tile of B, in 16-bit values.
int swizzled(int column, int k) { return column * kDepth + ((k / 8) ^ (column % 8)) * 8 + k % 8; }

// A's fragments for 16 values of k, of this warp's rows of a row-major matrix in shared memory.
void load_rows(uint32_t (&a)[4], const uint16_t* matrix, int k FASTLORA_AT) {
  const int lane = lane_index();
  load_matrix<4, false>(a, matrix + (warp_index() % 4 * 16 + lane % 16) * kDepth + k + lane / 16 * 8, at);
}

// Writes `columns` columns of B, row-major over k, as a product wants them.
void store_tile(uint16_t* tile, const uint16_t* from, int columns FASTLORA_AT) {
  for (int i = thread_index(); i < columns * kDepth; i += thread_count()) {
    store_shared(tile + swizzled(i / kDepth, i % kDepth), load_global(from + i, at), at);
  }
}

template <int kColumns>
void store_sums(float* out, const float (&d)[kColumns / 2] FASTLORA_AT) {
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = warp_index() % 4 * 16 + lane_index() / 4 + i / 2 % 2 * 8;
    const int column = i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
    store_global(out + (thread_index() / 128 * 64 + row) * kColumns + column, d[i], at);
  }
}

// ---- values -------------------------------------------------------------------------------------------------

// out = 3 + A·B: A (64, 64) and B (columns, 64) one after another in `in`. Then how many of the sums could be read
// before they were done: none, for NaN stands there.
template <bool kBFloat16, int kColumns>
void product(Job job) {
  auto* tile = shared_memory<uint16_t>(0);
  auto* rows = shared_memory<uint16_t>(kColumns * 128);
  const auto* in = static_cast<const uint16_t*>(job.in);
  for (int i = thread_index(); i < 64 * kDepth; i += 128) store_shared(rows + i, load_global(in + i));
  store_tile(tile, in + 64 * kDepth, kColumns);
  fence_async_proxy();
  sync_threads();
  uint32_t a[4][4];
  for (int step = 0; step < 4; ++step) load_rows(a[step], rows, step * 16);
  float d[kColumns / 2];
  for (float& sum : d) sum = 3.0f;
  keep_registers(d);
  fence_warpgroup();
  for (int step = 0; step < 4; ++step) {
    multiply_warpgroup<kBFloat16 ? DType::kBFloat16 : DType::kFloat16, kColumns>(d, a[step], tile, step);
    commit_warpgroup();
  }
  wait_warpgroup<1>();  // which leaves the last of those that d needs
  uint32_t early = 0;
  for (const float sum : d) early += sum == sum ? 1 : 0;
  wait_warpgroup<0>();
  keep_registers(d);
  auto* out = static_cast<float*>(job.out);
  store_sums<kColumns>(out, d);
  if (early != 0) store_global(out + thread_index(), 0.0f);
}

template <bool kBFloat16, int kColumns>
void test_product() {
  Rng rng(17 + kColumns);
  std::vector<uint16_t> in(static_cast<size_t>((64 + kColumns) * kDepth));
  std::vector<double> value(in.size());
  for (size_t i = 0; i < in.size(); ++i) {
    // Small integers over four: exact in both formats and in every sum of them.
    const float f = static_cast<float>(rng.below(33) - 16) / 4.0f;
    in[i] = kBFloat16 ? emulator::float_to_bf16(f) : emulator::float_to_fp16(f);
    value[i] = static_cast<double>(f);
  }
  std::vector<float> out(static_cast<size_t>(64 * kColumns));
  const EmulatedBuffer from(in.data(), in.size() * 2, false, "in"), to(out.data(), out.size() * 4, true, "out");
  expect_clean("warpgroup product",
               run(product<kBFloat16, kColumns>, {in.data(), out.data(), 0}, 128, (kColumns + 64) * 128));
  set_case("%s, %d columns", kBFloat16 ? "bfloat16" : "float16", kColumns);
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      double want = 3.0;
      for (int k = 0; k < kDepth; ++k) {
        want +=
            value[static_cast<size_t>(row * kDepth + k)] * value[static_cast<size_t>((64 + column) * kDepth + k)];
      }
      const float got = out[static_cast<size_t>(row * kColumns + column)];
      check(static_cast<double>(got) == want, "(%d, %d): got %g, want %g", row, column, static_cast<double>(got),
            want);
    }
  }
}

template <bool kBFloat16>
void test_products() {
  test_product<kBFloat16, 8>();
  test_product<kBFloat16, 16>();
  test_product<kBFloat16, 32>();
  test_product<kBFloat16, 64>();
  test_product<kBFloat16, 128>();
  test_product<kBFloat16, 256>();
}

// ---- a pipeline ---------------------------------------------------------------------------------------------

// Two warpgroups multiply; a third brings tile after tile of B, 16 columns each, into two stages. Every value of A
// is one, of B the tile's number: each sum is 64 times the sum of the numbers. value 1: the copies are not fenced.
// 2: stages are given back before their products are done.
void pipeline(Job job) {
  constexpr int kTiles = 5, kStages = 2, kColumns = 16;
  auto* full = shared_memory<uint64_t>(kStages * 2048);
  auto* empty = full + kStages;
  if (thread_index() == 0) {
    for (int s = 0; s < kStages; ++s) {
      memory_barrier_init(full + s, 128);
      memory_barrier_init(empty + s, 256);
    }
  }
  sync_threads();
  const auto stage = [](int tile) { return shared_memory<uint8_t>(tile % kStages * 2048); };
  if (thread_index() >= 256) {
    lower_registers<40>();
    const int chunk = thread_index() - 256;
    for (int tile = 0; tile < kTiles; ++tile) {
      memory_barrier_wait(empty + tile % kStages, 1 - tile / kStages % 2);
      copy_async<16>(stage(tile) + chunk * 16, static_cast<uint8_t*>(job.in) + tile * 2048 + chunk * 16, 16);
      copy_async_commit();
      copy_async_wait<0>();
      if (job.value != 1) fence_async_proxy();
      memory_barrier_arrive(full + tile % kStages);
    }
    return;
  }
  raise_registers<232>();
  const uint32_t ones = 0x3f803f80u, a[4] = {ones, ones, ones, ones};
  float d[8] = {};
  for (int tile = 0; tile < kTiles; ++tile) {
    memory_barrier_wait(full + tile % kStages, tile / kStages % 2);
    fence_warpgroup();
    for (int step = 0; step < 4; ++step) multiply_warpgroup<DType::kBFloat16, kColumns>(d, a, stage(tile), step);
    commit_warpgroup();
    if (job.value == 2) {
      memory_barrier_arrive(empty + tile % kStages);
    } else {
      wait_warpgroup<1>();
      if (tile > 0) memory_barrier_arrive(empty + (tile - 1) % kStages);
    }
  }
  wait_warpgroup<0>();
  keep_registers(d);
  store_sums<kColumns>(static_cast<float*>(job.out), d);
}

void test_pipeline() {
  alignas(16) static uint16_t in[5 * 1024];
  static float out[128 * 16];
  for (int i = 0; i < 5 * 1024; ++i) in[i] = emulator::float_to_bf16(static_cast<float>(i / 1024 + 1));
  const EmulatedBuffer from(in, sizeof in, false, "in"), to(out, sizeof out, true, "out");
  const auto with = [&](int value) { return run(pipeline, {in, out, value}, 384, 2 * 2048 + 32); };
  expect_clean("a pipeline of products", with(0));
  for (const float sum : out) check(sum == 64.0f * 15.0f, "got %g", static_cast<double>(sum));
  expect_fault("copies that are not fenced", with(1), "wrote with no proxy fence");
  expect_fault("a stage given back too early", with(2), "have waited for a product that reads it");
}

// ---- planted bugs -------------------------------------------------------------------------------------------

enum Bug : int {
  kNone,
  kNoWait,
  kWeakWait,
  kWriteWhileRead,
  kCopyWhileRead,
  kWriteWithoutBarrier,
  kNoFenceAtFirst,
  kNoFenceAfterWait,
  kNoProxyFence,
  kProxyFenceTooEarly,
  kProxyFenceTooLate,
  kNoBarrier,
  kCopyNotAwaited,
  kUnwritten,
  kOneWarpAway,
  kOneWarpElsewhere,
  kOtherTile,
  kMisplaced,
  kSumWritten,
  kOtherShape,
  kCommitForgotten,
};

void bugs(Job job) {
  const auto bug = static_cast<Bug>(job.value);
  auto* tile = shared_memory<uint16_t>(0);
  const int t = thread_index();
  const auto* in = static_cast<const uint16_t*>(job.in);
  if (bug == kProxyFenceTooEarly) fence_async_proxy();
  if (bug != kUnwritten) store_tile(tile, in, 16);
  store_tile(tile + 1024, in, 8);
  if (bug == kCopyNotAwaited) {
    sync_threads();
    if (t < 64) copy_async<16>(tile + t * 8, in + t * 8, 16);
    copy_async_commit();
  }
  if (bug != kNoProxyFence && bug != kProxyFenceTooEarly && bug != kProxyFenceTooLate) fence_async_proxy();
  if (bug != kNoBarrier) sync_threads();
  if (bug == kProxyFenceTooLate) fence_async_proxy();
  const uint32_t a[4] = {};
  float d[4] = {};
  const auto multiply = [&](const uint16_t* b, int step FASTLORA_AT) {
    multiply_warpgroup<DType::kBFloat16, 8>(d, a, b, step, at);
  };
  if (bug == kOneWarpAway && t >= 96) return;
  if (bug == kOneWarpElsewhere && t >= 96) sync_warp();
  if (bug == kCommitForgotten && t >= 96) commit_warpgroup();
  if (bug != kNoFenceAtFirst) fence_warpgroup();
  if (bug == kOneWarpElsewhere && t >= 96) {
    multiply(tile, 0);
  } else {
    multiply(bug == kMisplaced ? tile + 64 : bug == kOtherTile && t >= 96 ? tile + 1024 : tile, 0);
  }
  commit_warpgroup();
  if (bug == kSumWritten) d[1] = 0.0f;
  if (bug == kOtherShape) {
    float (&wide)[8] = *reinterpret_cast<float (*)[8]>(&d);
    multiply_warpgroup<DType::kBFloat16, 16>(wide, a, tile, 0);
  }
  if (bug == kWriteWhileRead && t == 3) store_shared(tile, uint16_t{0});
  if (bug == kCopyWhileRead && t == 3) copy_async<16>(tile, in, 16);
  if (bug == kNoWait) return;
  if (bug == kWeakWait) return wait_warpgroup<1>();
  wait_warpgroup<0>();
  if (bug == kWriteWithoutBarrier) sync_warp();
  if (bug == kWriteWithoutBarrier && t < 32) store_shared(tile + t, uint16_t{0});
  if (bug != kNoFenceAfterWait) fence_warpgroup();
  multiply(tile, 1);
  commit_warpgroup();
  wait_warpgroup<0>();
  sync_threads();
  store_shared(tile + t, uint16_t{0});  // all have waited, and met
  store_global(static_cast<float*>(job.out) + t, d[0]);
}

void test_bugs() {
  alignas(16) static uint16_t in[1024];
  static float out[128];
  const EmulatedBuffer from(in, sizeof in, false, "in"), to(out, sizeof out, true, "out");
  const auto with = [&](Bug bug, int threads = 128) { return run(bugs, {in, out, bug}, threads, 4096); };
  expect_clean("products", with(kNone));
  expect_fault("no wait", with(kNoWait), "returns with a product under way");
  expect_fault("a wait too weak", with(kWeakWait), "returns with a product under way");
  expect_fault("B written while read", with(kWriteWhileRead), "before all of a warpgroup have waited");
  expect_fault("B copied to while read", with(kCopyWhileRead), "before all of a warpgroup have waited");
  expect_fault("B written with no barrier", with(kWriteWithoutBarrier), "shared byte");
  expect_fault("no fence at first", with(kNoFenceAtFirst), "no fence_warpgroup");
  expect_fault("no fence after a wait", with(kNoFenceAfterWait), "no fence_warpgroup");
  expect_fault("no proxy fence", with(kNoProxyFence), "no proxy fence");
  expect_fault("a proxy fence before the writes", with(kProxyFenceTooEarly), "no proxy fence");
  expect_fault("a proxy fence after the barrier", with(kProxyFenceTooLate), "no proxy fence");
  expect_fault("no barrier before a product", with(kNoBarrier), "no barrier between: a race");
  expect_fault("a copy not waited for", with(kCopyNotAwaited), "a wait is missing");
  expect_fault("B never written", with(kUnwritten), "which nothing has written");
  expect_fault("a warp has left", with(kOneWarpAway), "has returned: divergence");
  expect_fault("a warp at another product", with(kOneWarpElsewhere), "divergence");
  expect_fault("another tile in one warp", with(kOtherTile), "another tile");
  expect_fault("a tile off its alignment", with(kMisplaced), "no multiple of 1024");
  expect_fault("a sum written under way", with(kSumWritten), "finds an accumulator written");
  expect_fault("a sum of another shape", with(kOtherShape), "another shape");
  expect_fault("a warp commits alone", with(kCommitForgotten), "another number of groups");
  expect_fault("half a warpgroup", with(kNone, 64), "whole warpgroup");
}

}  // namespace

void test_warpgroup() {
  test_products<true>();
  test_products<false>();
  test_pipeline();
  test_bugs();
}

}  // namespace fastlora::testing
