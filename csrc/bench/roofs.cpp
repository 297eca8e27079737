// The module fastlora._roofs: runs a roof's loop on every thread at once and says how fast it went. Built by
// FASTLORA_BENCH=ON only; bench/_roofs.py is its one user.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "fastlora/cpu.h"
#include "roofs.h"

namespace py = pybind11;
using namespace fastlora;
using namespace fastlora::bench;

namespace {

constexpr size_t kL2Bytes = size_t{512} << 10;  // of each thread's operands: past L1, within any L2 here

using Buffer = std::unique_ptr<void, decltype(&std::free)>;

// 64-byte aligned and filled by the calling thread, so that the pages are its own. Both halves of every word are
// small finite numbers as bfloat16, and so is the word as float32: random bits in the mantissas, no NaN.
Buffer random_buffer(size_t bytes, uint64_t seed) {
  Buffer buffer(std::aligned_alloc(4096, (bytes + 4095) & ~size_t{4095}), &std::free);
  if (buffer == nullptr) return buffer;
  uint32_t* words = static_cast<uint32_t*>(buffer.get());
  uint64_t state = 0x9e3779b97f4a7c15u + seed;
  for (size_t i = 0; i < bytes / sizeof(uint32_t); ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    words[i] = (static_cast<uint32_t>(state >> 32) & 0x807f807fu) | 0x3f003f00u;  // magnitudes of 0.5 to 1
  }
  return buffer;
}

Isa available(int32_t isa) {
  if (isa < 0 || isa >= kIsaCount || !isa_available(static_cast<Isa>(isa))) {
    throw std::runtime_error("roofs: expected a level that this machine has, got " + std::to_string(isa));
  }
  return static_cast<Isa>(isa);
}

// The best rate of `repeats` runs: work per second, all threads together. prepare(thread) makes a thread's own
// state once; run(state) does the work and returns its amount.
template <class Prepare, class Run>
double best_rate(int threads, int repeats, Prepare prepare, Run run) {
  if (threads < 1 || repeats < 1)
    throw std::invalid_argument("roofs: expected at least one thread and one repeat");
  double best = 0, total = 0;
  bool failed = false;
  std::chrono::steady_clock::time_point begin;
#pragma omp parallel num_threads(threads)
  {
    auto state = prepare(omp_get_thread_num());
    if (!state.ok()) {
#pragma omp critical
      failed = true;
    }
#pragma omp barrier
    for (int turn = 0; !failed && turn < repeats; ++turn) {
#pragma omp single
      {
        total = 0;
        begin = std::chrono::steady_clock::now();
      }
      const double work = run(state);
#pragma omp critical
      total += work;
#pragma omp barrier
#pragma omp master
      best =
          std::max(best, total / std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
#pragma omp barrier
    }
  }
  if (failed) throw std::runtime_error("roofs: no memory");
  return best;
}

volatile double g_kept;  // what the loops return ends here, so that no compiler drops them

struct OneBuffer {
  Buffer data;
  bool ok() const { return data != nullptr; }
};
struct TwoBuffers {
  Buffer from, to;
  bool ok() const { return from != nullptr && to != nullptr; }
};

// The loop of a level; other processors' sources are not even compiled.
#ifdef FASTLORA_X86
#define FASTLORA_PICK(level, name) \
  ((level) >= Isa::kAvx512 ? name##_avx512 : (level) >= Isa::kAvx2 ? name##_avx2 : name##_scalar)
#else
#define FASTLORA_PICK(level, name) (static_cast<void>(level), name##_scalar)
#endif

size_t share_of(size_t bytes, int threads) {
  return std::max<size_t>(bytes / static_cast<size_t>(std::max(threads, 1)) & ~size_t{1023}, 1024);
}

double read_gbps(int32_t isa, size_t bytes, int threads, int repeats) {
  const Isa level = available(isa);
  const auto loop = FASTLORA_PICK(level, read);
  const size_t share = share_of(bytes, threads);
  const int passes = static_cast<int>(std::max<size_t>(1, (size_t{8} << 20) / share));
  return 1e-9 * best_rate(
                    threads, repeats, [&](int thread) { return OneBuffer{random_buffer(share, thread)}; },
                    [&](OneBuffer& state) {
                      for (int i = 0; i < passes; ++i) g_kept = static_cast<double>(loop(state.data.get(), share));
                      return static_cast<double>(share) * passes;
                    });
}

// Counts bytes read and bytes written.
double copy_gbps(int32_t isa, size_t bytes, int threads, int repeats, bool streaming) {
  const Isa level = available(isa);
  const auto loop = FASTLORA_PICK(level, copy_streaming);
  const size_t share = share_of(bytes, threads);
  return 1e-9 * best_rate(
                    threads, repeats,
                    [&](int thread) {
                      return TwoBuffers{random_buffer(share, thread), random_buffer(share, 7 + thread)};
                    },
                    [&](TwoBuffers& state) {
                      void *to = state.to.get(), *from = state.from.get();
                      if (streaming) {
                        loop(to, from, share);
                      } else {
                        std::memcpy(to, from, share);
                      }
                      return 2.0 * static_cast<double>(share);
                    });
}

double fma_tflops(int32_t isa, int threads, int repeats) {
  const Isa level = available(isa);
  const auto loop = FASTLORA_PICK(level, fma);
  return 1e-12 * best_rate(
                     threads, repeats, [](int thread) { return OneBuffer{random_buffer(4096, thread)}; },
                     [&](OneBuffer& state) {
                       double flops = 0;
                       g_kept = loop(60000, static_cast<const float*>(state.data.get()), &flops);
                       return flops;
                     });
}

double bf16_tflops(int32_t isa, int threads, int repeats) {
  const Isa level = available(isa);
#ifdef FASTLORA_X86
  if (level != Isa::kAvx512Bf16 && level != Isa::kAmx) {
    throw std::runtime_error("roofs: expected a level with bfloat16 products, got " +
                             std::string(isa_name(level)));
  }
  const auto loop = level == Isa::kAmx ? bf16_tiles_amx : bf16_dot_avx512_bf16;
  return 1e-12 * best_rate(
                     threads, repeats, [](int thread) { return OneBuffer{random_buffer(kL2Bytes, thread)}; },
                     [&](OneBuffer& state) {
                       double flops = 0;
                       g_kept = loop(40, state.data.get(), kL2Bytes, &flops);
                       return flops;
                     });
#else
  throw std::runtime_error("roofs: expected a level with bfloat16 products, got " + std::string(isa_name(level)));
#endif
}

}  // namespace

PYBIND11_MODULE(_roofs, m) {
  m.doc() = "How fast this machine reads, copies and multiplies; threads together, the best of some repeats";
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("read_gbps", &read_gbps, unlocked);
  m.def("copy_gbps", &copy_gbps, unlocked);
  m.def("fma_tflops", &fma_tflops, unlocked);
  m.def("bf16_tflops", &bf16_tflops, unlocked);
}
