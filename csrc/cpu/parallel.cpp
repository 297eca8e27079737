#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "fastlora/cpu.h"

namespace fastlora::cpu {
namespace {

std::atomic<bool> g_in_forked_child{false};

// libgomp's worker threads do not exist in a forked child, and a parallel region there waits for them forever.
struct ForkWatch {
  ForkWatch() {
    pthread_atfork(nullptr, nullptr, [] { g_in_forked_child.store(true, std::memory_order_relaxed); });
  }
};
const ForkWatch g_fork_watch;

struct ThreadScratch {
  void* data = nullptr;
  size_t bytes = 0;
  ~ThreadScratch() { std::free(data); }
};
thread_local ThreadScratch t_scratch, t_beside;

}  // namespace

void parallel_ranges(int64_t count, int32_t threads, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count <= 0) return;
  int64_t parts = threads < 1 ? 1 : threads;
  if (parts > count) parts = count;
  if (parts == 1 || g_in_forked_child.load(std::memory_order_relaxed) || omp_in_parallel()) {
    body(context, 0, count);
    return;
  }
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t base = count / parts, extra = count % parts;
    const int64_t begin = part * base + (part < extra ? part : extra);
    const int64_t end = begin + base + (part < extra ? 1 : 0);
    body(context, begin, end);
  }
}

#ifdef __SANITIZE_ADDRESS__
// Under AddressSanitizer every call gets a block of its own, of exactly this size and full of NaN, so that a
// kernel that writes past what it asked for, or counts on what an earlier call left there, is noticed.
static void* grown(ThreadScratch& scratch, size_t bytes) {
  std::free(scratch.data);
  if (posix_memalign(&scratch.data, 64, bytes) != 0) scratch.data = nullptr;
  scratch.bytes = bytes;
  if (scratch.data != nullptr) std::memset(scratch.data, 0xff, bytes);
  return scratch.data;
}
#else
static void* grown(ThreadScratch& scratch, size_t bytes) {
  if (bytes <= scratch.bytes) return scratch.data;
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t page = bytes > kHugePage / 2 ? kHugePage : 4096, rounded = (bytes + page - 1) & ~(page - 1);
  std::free(scratch.data);
  scratch.data = std::aligned_alloc(page, rounded);
  scratch.bytes = scratch.data == nullptr ? 0 : rounded;
  // Tiles come from more pages than a core's first table of addresses holds.
  if (scratch.data != nullptr) (void)prefer_huge_pages(scratch.data, static_cast<int64_t>(rounded), false);
  return scratch.data;
}
#endif

void* thread_scratch(size_t bytes) { return grown(t_scratch, bytes); }

void* thread_scratch_beside(size_t bytes) { return grown(t_beside, bytes); }

size_t thread_scratch_bytes() { return t_scratch.bytes + t_beside.bytes; }

}  // namespace fastlora::cpu

int64_t fastlora::scratch_bytes() { return static_cast<int64_t>(cpu::thread_scratch_bytes()); }
