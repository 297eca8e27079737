// Planted bugs that the emulator must name, each beside the kernel without it.
#include <cstring>
#include <vector>

#include "cuda/tensor_core.cuh"
#include "tests/planted.h"

namespace fastlora::testing {
namespace {

using namespace cuda;

// value 0: correct. 1: the barrier between is missing. 2: one element too far. 3: never written. 4: in one branch
// only.
void neighbours(Job job) {
  auto* cells = shared_memory<uint32_t>(0);
  const int t = thread_index();
  if (job.value != 3 || t != 9) store_shared(cells + t, 0u);
  sync_threads();
  if (job.value != 3) store_shared(cells + t, static_cast<uint32_t>(t));
  if (job.value != 1) sync_threads();
  const int other = job.value == 2 ? t + 1 : (t + 1) % thread_count();
  store_global(static_cast<uint32_t*>(job.out) + t, load_shared(cells + other));
  if (job.value == 4 && t < 32) sync_threads();
}

// value 0: correct. 1: no wait. 2: misaligned. 3: the wait leaves the group it needs under way.
void copies(Job job) {
  auto* to = shared_memory<uint8_t>(0);
  const auto* from = static_cast<const uint8_t*>(job.in);
  copy_async<16>(to + thread_index() * 16, from + thread_index() * 16 + (job.value == 2 ? 4 : 0), 16);
  copy_async_commit();
  if (job.value == 3) {
    copy_async_wait<1>();
  } else if (job.value != 1) {
    copy_async_wait<0>();
  }
  sync_threads();
  const auto v = load_shared(reinterpret_cast<const Words4*>(to) + (thread_index() ^ 1));
  store_global(static_cast<Words4*>(job.out) + thread_index(), v);
}

// value 0: correct. 1: half of the warp. 2: some lanes leave first. 3: a mask that lacks the lane.
void sums(Job job) {
  auto mine = static_cast<uint32_t>(lane_index());
  if (job.value == 1 && lane_index() >= 16)
    return store_global(static_cast<uint32_t*>(job.out) + lane_index(), mine);
  if (job.value == 2 && lane_index() == 3) return;
  mine += shuffle_xor(mine, 1, job.value == 3 && lane_index() == 8 ? ~(1u << 8) : kAllLanes);
  store_global(static_cast<uint32_t*>(job.out) + lane_index(), mine);
}

// value 0: correct. 1: past the buffer. 2: an input written. 3: two threads write one element. 4: before the
// buffer.
void globals(Job job) {
  auto* out = static_cast<uint32_t*>(job.out);
  const int t = thread_index();
  const uint32_t v =
      load_global(static_cast<const uint32_t*>(job.in) + t + (job.value == 1 ? 1 : 0) - (job.value == 4 ? 1 : 0));
  if (job.value == 2) store_global(static_cast<uint32_t*>(job.in) + t, v);
  store_global(out + (job.value == 3 ? t / 2 : t), v);
}

// value 0: correct. 1: the buffer is filled again before all have read it.
void reuse(Job job) {
  auto* cells = shared_memory<uint32_t>(0);
  uint32_t sum = 0;
  for (uint32_t turn = 0; turn < 3; ++turn) {
    store_shared(cells + thread_index(), turn);
    sync_threads();
    sum += load_shared(cells + (thread_index() + 40) % 64);
    if (job.value == 0) sync_threads();
  }
  store_global(static_cast<uint32_t*>(job.out) + thread_index(), sum);
}

// Two threads a word. value 0: correct. 1: both write one half of it. 2: one writes its half while the other may
// still read the word.
void halves(Job job) {
  auto* half = shared_memory<uint16_t>(0);
  const int t = thread_index();
  store_shared(half + (job.value == 1 ? t / 2 * 2 : t), static_cast<uint16_t>(t));
  sync_threads();
  const uint32_t word = load_shared(reinterpret_cast<uint32_t*>(half) + t / 2);
  if (job.value != 2) sync_threads();
  store_shared(half + t, static_cast<uint16_t>(t + 100));
  sync_threads();
  if (t % 2 == 0) store_shared(reinterpret_cast<uint32_t*>(half) + t / 2, word);
  sync_threads();
  store_global(static_cast<uint32_t*>(job.out) + t, load_shared(reinterpret_cast<uint32_t*>(half) + t / 2));
}

void wide(Job job) {
  const auto v = load_global(reinterpret_cast<const Words4*>(static_cast<const uint32_t*>(job.in) + job.value));
  store_global(static_cast<uint32_t*>(job.out), v.w[0]);
}

}  // namespace

void test_emulator_bugs() {
  alignas(16) static uint8_t in[1024], out[1024];
  for (size_t i = 0; i < sizeof in; ++i) in[i] = static_cast<uint8_t>(i);
  const EmulatedBuffer to(out, sizeof out, true, "out");
  auto with = [&](int value) { return Job{in, out, value}; };
  {
    const EmulatedBuffer from(in, sizeof in, false, "in");
    expect_clean("neighbours", run(neighbours, with(0), 64, 256));
    expect_fault("a missing barrier", run(neighbours, with(1), 64, 256), "no barrier between: a race");
    expect_fault("shared memory overrun", run(neighbours, with(2), 64, 256),
                 "4 bytes at offset 256 of shared memory");
    expect_fault("a read of what nothing wrote", run(neighbours, with(3), 64, 256), "which nothing has written");
    expect_fault("a barrier in one branch", run(neighbours, with(4), 64, 256), "divergence");
    expect_clean("copies", run(copies, with(0), 32, 512));
    expect_fault("a missing wait", run(copies, with(1), 32, 512), "a wait is missing");
    expect_fault("a misaligned copy", run(copies, with(2), 32, 512), "no multiple of 16");
    expect_fault("a wait too weak", run(copies, with(3), 32, 512), "a wait is missing");
    expect_clean("reuse", run(reuse, with(0), 64, 256));
    expect_fault("filled before it was read", run(reuse, with(1), 64, 256),
                 "read with no barrier between: a race");
    expect_clean("halves", run(halves, with(0), 64, 128));
    for (int t = 0; t < 64; ++t) {
      uint32_t got;
      std::memcpy(&got, out + 4 * t, 4);
      check(static_cast<int>(got) == t / 2 * 2 + ((t / 2 * 2 + 1) << 16), "thread %d: got %x", t, got);
    }
    expect_fault("two writers of half a word", run(halves, with(1), 64, 128), "wrote with no barrier between");
    expect_fault("half a word written too early", run(halves, with(2), 64, 128), "no barrier between: a race");
    expect_clean("wide", run(wide, with(0), 1, 0));
    expect_fault("a misaligned load", run(wide, with(1), 1, 0), "no multiple of 16");
    expect_clean("sums", run(sums, with(0), 32, 0));
    expect_fault("half a warp shuffles", run(sums, with(1), 32, 0), "divergence");
    expect_fault("a lane left before a shuffle", run(sums, with(2), 32, 0), "divergence");
    expect_fault("a mask without the lane", run(sums, with(3), 32, 0), "mask that lacks");
  }
  const std::vector<uint32_t> apart(512);  // on the heap, with nothing registered near it
  void* middle = const_cast<uint32_t*>(apart.data() + 256);
  const EmulatedBuffer from(middle, 128, false, "in");
  auto with_middle = [&](int value) { return Job{middle, out, value}; };
  expect_clean("globals", run(globals, with_middle(0), 32, 0));
  expect_fault("global overrun", run(globals, with_middle(1), 32, 0), "4 bytes at offset 128 of global buffer in");
  expect_fault("an input written", run(globals, with_middle(2), 32, 0), "an input");
  expect_fault("two writers", run(globals, with_middle(3), 32, 0), "wrote with no barrier between: a race");
  expect_fault("before the buffer", run(globals, with_middle(4), 32, 0), "at offset -4 of global buffer in");
}

}  // namespace fastlora::testing
