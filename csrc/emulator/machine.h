// The emulated device: a grid of blocks, a block of threads that are fibers. Threads run one at a time until they
// meet others (a barrier, a shuffle, a tile product) or end; who runs next is drawn from a seed.
#pragma once

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
#include "memory.h"

namespace fastlora::emulator {

struct Shape {
  const char* kernel;
  int grid[3];
  int threads;
  int64_t shared_bytes;
  bool cooperative;  // grid-wide barriers allowed
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

struct Thread {
  Thread(Block& block, int index, int threads, StackPool& stacks)
      : block(block), index(index), clock(threads, index), fiber(stacks) {}

  enum class State { kReady, kWaiting, kEnded };
  // What a waiting thread waits for.
  struct Meeting {
    const char* what = "";
    Where at;
    uint32_t lanes = 0;               // of a warp's meeting
    int64_t barrier = -1;             // of a block's
    int expected = 0;                 // threads that the barrier needs
    void* payload = nullptr;          // read and written by whoever comes last
    std::function<bool()> condition;  // of a wait on memory: may it go on?
  };

  Actor actor() const;
  int lane() const { return index % 32; }
  int warp() const { return index / 32; }
  int64_t occurrence(Access access, Where at);

  Block& block;
  int index;
  State state = State::kReady;
  bool started = false;
  bool cancelled = false;  // another thread's fault has ended the launch: unwind
  Meeting meeting;
  VectorClock clock;
  std::vector<AsyncCopy> copies;
  int64_t groups_committed = 0;
  std::map<std::tuple<const char*, int, Access>, int64_t> passes;
  Fiber fiber;
};

using WarpAction = void (*)(void* const (&payloads)[32], uint32_t lanes);

// An object of a kernel's in shared memory with more state than its 64 bits: an mbarrier.
struct MemoryBarrier {
  int64_t expected = 0, pending = 0;
  int64_t phase = 0;
  std::vector<Moment> arrived;  // joined clocks of this phase
  std::vector<Moment> passed;   // of the phases before
};

class Block {
 public:
  Block(Grid& grid, int linear, const int (&index)[3]);
  ~Block();  // unwinds the threads that a fault has left in mid-run

  // Run threads until all have ended or wait for the grid.
  void run();
  bool ended() const;
  void release_grid_barrier();

  // From inside a thread: meet the warp's lanes in `lanes`, the last of which does `action`; meet `expected`
  // threads of the block at `barrier`; meet all of the grid; wait until a condition holds.
  void meet_warp(const char* what, uint32_t lanes, Where at, void* payload, WarpAction action, bool orders_memory);
  void meet_block(const char* what, int64_t barrier, int expected, Where at);
  void meet_grid(Where at);
  void wait_until(const char* what, std::function<bool()> condition, Where at);

  Grid& grid;
  int linear;
  int index[3];
  std::vector<std::unique_ptr<Thread>> threads;
  SharedMemory shared;
  std::map<int64_t, MemoryBarrier> memory_barriers;  // by offset

 private:
  void order(const std::vector<Thread*>& met);
  [[noreturn]] void diverged(const Thread& waiting, const Thread& other);
  [[noreturn]] void stuck();
  void pause(Thread& self);
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

// The thread that runs now; a fault outside any if there is none.
Thread& current();

}  // namespace fastlora::emulator
