// Launches that may begin before those before them have ended: what they may touch until they have waited.
#include <vector>

#include "cuda/device.cuh"
#include "tests/planted.h"

namespace fastlora::testing {
namespace {

using namespace cuda;

constexpr int kBlocks = 2, kThreads = 64;

enum Way : int {
  kGood,
  kOneThreadWaits,  // and the rest meet it in a barrier
  kReadsEarly,
  kWritesEarly,
  kWritesWhatIsRead,
  kUpdatesEarly,
  kNoBarrierAfterWait,
  kOneBlockNeverWaits,
};

int global_thread() { return block_index() * kThreads + thread_index(); }

// Reads half of the buffer and writes the other half.
void first(Job job) {
  auto* words = static_cast<uint32_t*>(job.out);
  store_global(words + 128 + global_thread(), load_global(words + global_thread()) + 1);
}

// Touches nothing of the first.
void between(Job) { wait_for_previous_launch(); }

void second(Job job) {
  const auto way = static_cast<Way>(job.value);
  auto* words = static_cast<uint32_t*>(job.out);
  const int t = global_thread();
  uint32_t sum = load_readonly(static_cast<const uint32_t*>(job.in) + t);  // an input: no launch writes it
  if (way == kReadsEarly) sum += load_global(words + 128 + t);
  if (way == kWritesEarly) store_global(words + 128 + t, sum);
  if (way == kWritesWhatIsRead) store_global(words + t, sum);
  if (way == kUpdatesEarly) atomic_add(words + 128, sum);
  if (way == kOneBlockNeverWaits && block_index() == 1) return;
  if (way == kOneThreadWaits || way == kNoBarrierAfterWait) {
    if (thread_index() == 0) wait_for_previous_launch();
    if (way == kOneThreadWaits) sync_threads();
  } else {
    wait_for_previous_launch();
  }
  sum += load_global(words + 128 + t);
  store_global(words + t, sum);
}

// The fault of the launches one after another, the last of them in its way, under several orders.
std::string run_all(Way way, bool overlaps, bool three) {
  std::vector<uint32_t> in(kBlocks * kThreads, 5), out(2 * in.size(), 1);
  const EmulatedBuffer from(in.data(), in.size() * 4, false, "in"), to(out.data(), out.size() * 4, true, "middle");
  const Job job{in.data(), out.data(), way};
  LaunchShape shape{.blocks = kBlocks, .threads = kThreads};
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    emulator::set_seed(seed);
    shape.overlaps = false;
    launch("planted", first, shape, job, nullptr);
    shape.overlaps = overlaps;
    if (three) launch("planted", between, shape, job, nullptr);
    launch("planted", second, shape, job, nullptr);
    std::string fault = emulator::take_fault();
    if (!fault.empty()) return fault;
  }
  check(out[7] != 1, "the last launch has written nothing");
  return {};
}

}  // namespace

void test_overlaps() {
  for (const bool three : {false, true}) {
    const auto overlapping = [three](Way way) { return run_all(way, true, three); };
    expect_clean("all threads wait", overlapping(kGood));
    expect_clean("one thread waits for its block", overlapping(kOneThreadWaits));
    expect_clean("a launch that does not overlap", run_all(kReadsEarly, false, three));
    expect_fault("read before the wait", overlapping(kReadsEarly),
                 "of global buffer middle, which an earlier launch writes, before wait_for_previous_launch");
    expect_fault("written before the wait", overlapping(kWritesEarly), "middle, which an earlier launch writes");
    expect_fault("written while read", overlapping(kWritesWhatIsRead), "middle, which an earlier launch reads");
    expect_fault("updated before the wait", overlapping(kUpdatesEarly), "middle, which an earlier launch writes");
    expect_fault("no barrier after one thread's wait", overlapping(kNoBarrierAfterWait),
                 "middle, which an earlier launch writes");
    const std::string fault = overlapping(kOneBlockNeverWaits);
    set_case("a block that never waits");
    check(fault.find("kernel planted, block (1, 0, 0) ends where no thread of it has called "
                     "wait_for_previous_launch") != std::string::npos,
          "got: %s", fault.empty() ? "no fault" : fault.c_str());
  }
}

}  // namespace fastlora::testing
