// The emulated device: a grid of blocks, a block of threads that are fibers. Threads run one at a time until they
// meet others (a barrier, a shuffle, a tile product) or end; who runs next is drawn from a seed.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "clock.h"
#include "counters.h"
#include "fault.h"
#include "fiber.h"
#include "global_memory.h"
#include "shared_memory.h"

namespace fastlora::emulator {

struct Shape {
  const char* kernel;
  int grid[3];
  int threads;
  int64_t shared_bytes;
  bool cooperative;  // grid-wide barriers allowed
  bool overlaps;     // may have begun before earlier launches have ended
};

class Block;
class Grid;

// A thread's asynchronous copy: bytes taken at its issue, put into shared memory at its wait.
struct AsyncCopy {
  uint8_t* to;
  uint8_t data[16];
  int64_t bytes;
  int64_t group;  // of the thread's commits
  Where at;
};

// An object of a kernel's in shared memory with more state than its 64 bits: an mbarrier.
struct MemoryBarrier {
  int64_t expected, pending;
  int64_t phase = 0;
  Gathering arrived;          // in all phases up to this one
  Seen passed{};              // by those who come after the last phase
  Seen learner{}, learned{};  // what one who had seen `learner` has seen then: most have seen the same

  // Over once the phase of that parity has ended: the current phase then has the other one.
  bool lets_pass(int parity) const { return phase % 2 != parity; }
};

// A thread's part in the products that its warpgroup has issued and it has not waited for.
struct Products {
  struct Sum {  // registers that hold poison until the last product into them is done
    float* registers;
    int64_t group;  // of the thread's commits
    std::vector<float> values;
  };
  struct Read {
    int number;  // of SharedMemory
    int64_t group;
    Where at;
  };
  std::vector<Sum> sums;
  std::vector<Read> reads;
  int64_t groups_committed = 0;
  bool fenced = false;  // since the last wait
};

struct Thread {
  Thread(Block& block, int index, const Seen& nothing, StackPool& stacks)
      : block(block), index(index), clock(index, nothing), fiber(stacks) {}

  enum class State { kReady, kWaiting, kEnded };
  // What a waiting thread waits for.
  struct Meeting {
    const char* what = "";
    Where at;
    uint32_t lanes = 0;       // of a warp's meeting
    int64_t barrier = -1;     // of a block's
    int expected = 0;         // threads that the barrier needs
    void* payload = nullptr;  // read and written by whoever comes last
    bool warpgroup = false;   // all of it
    MemoryBarrier* memory = nullptr;
    int parity = 0;
  };

  Actor actor();
  int lane() const { return index % 32; }
  int warp() const { return index / 32; }

  Block& block;
  int index;
  State state = State::kReady;
  bool started = false;
  bool cancelled = false;  // another thread's fault has ended the launch: unwind
  Meeting meeting;
  VectorClock clock;
  bool previous_over = false;  // the launches before: it has waited, or seen that another thread had
  std::vector<AsyncCopy> copies;
  int64_t groups_committed = 0;
  Products products;
  std::vector<Moment> proxy_fences;  // the moments that they ended
  Fiber fiber;
};

struct Warp {
  // Lanes that have come to a meeting and wait for the rest of `lanes`.
  struct Gathered {
    const char* what = "";
    Where at;
    uint32_t lanes = 0, arrived = 0;
  };
  uint32_t ready = 0;                 // lanes that may run
  std::array<Gathered, 32> gathered;  // by the lowest lane of a meeting
  OpenInstructions instructions;
};

using WarpAction = void (*)(void* const (&payloads)[32], uint32_t lanes);
// Of a whole warpgroup: its threads, each with its payload in its meeting.
constexpr int kWarpgroup = 128;
using WarpgroupAction = void (*)(Block& block, const std::vector<Thread*>& threads, Where at);

class Block {
 public:
  Block(Grid& grid, int linear, const int (&index)[3]);
  ~Block();  // unwinds the threads that a fault has left in mid-run

  // Run threads until all have ended or wait for the grid.
  void run();
  bool ended() const;
  void release_grid_barrier();
  // Nobody runs any more.
  void finish();

  // From inside a thread: meet the warp's lanes in `lanes`, or the warpgroup, the last of which does `action`;
  // meet `expected` threads of the block at `barrier`; meet all of the grid; arrive at an mbarrier, or wait for a
  // phase of it to end.
  void meet_warp(const char* what, uint32_t lanes, Where at, void* payload, WarpAction action, bool orders_memory);
  void meet_warpgroup(const char* what, Where at, void* payload, WarpgroupAction action);
  void meet_block(const char* what, int barrier, int expected, Where at);
  void meet_grid(Where at);
  void arrive_memory(MemoryBarrier& barrier);
  void wait_memory(MemoryBarrier& barrier, int parity, Where at);

  Grid& grid;
  int linear;
  int index[3];
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  SharedMemory shared;
  std::map<int64_t, MemoryBarrier> memory_barriers;  // by offset
  std::vector<std::pair<int, Moment>> launch_waits;  // threads that have waited for the launch before, and when

  void set_state(Thread& thread, Thread::State state);

 private:
  void start(Thread& thread);
  // All that `met` have done is ordered before all that they will do.
  void order(const std::vector<Thread*>& met);
  void check_not_elsewhere(const Thread& self);
  [[noreturn]] void diverged(const Thread& waiting, const Thread& other);
  [[noreturn]] void stuck();
  void pause(Thread& self);

  bool awaits(const Thread& waiting, const Thread& other) const;
  void learn_passed(Thread& thread, MemoryBarrier& barrier);

  std::array<std::vector<Thread*>, 16> at_barrier_;
  std::array<std::vector<Thread*>, 1024 / kWarpgroup> at_warpgroup_;
  std::vector<Thread*> at_memory_;  // waiting for an mbarrier
  std::vector<Thread*> met_;        // room for a list
};

class Grid {
 public:
  Grid(const Shape& shape, GlobalMemory& global, Counters& counters, StackPool& stacks, uint64_t seed,
       std::function<void()> body)
      : shape(shape), global(global), counters(counters), stacks(stacks), random(seed), body(std::move(body)) {}

  // Throws Fault.
  void run();

  const Shape shape;
  GlobalMemory& global;
  Counters& counters;
  StackPool& stacks;
  std::mt19937_64 random;
  std::function<void()> body;
  int epoch = 0;
};

extern constinit thread_local Thread* t_running;
[[noreturn]] void outside_a_kernel();

// The thread that runs now; a fault if there is none.
inline Thread& current() {
  if (t_running == nullptr) outside_a_kernel();
  return *t_running;
}

}  // namespace fastlora::emulator
