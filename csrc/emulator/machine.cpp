#include "machine.h"

#include <algorithm>
#include <cstring>
#include <optional>

namespace fastlora::emulator {
namespace {

thread_local std::optional<Fault> t_fault;

struct Cancelled {};

std::string name_of(const Block& block) {
  return "block (" + std::to_string(block.index[0]) + ", " + std::to_string(block.index[1]) + ", " +
         std::to_string(block.index[2]) + ")";
}

std::string name_of(const Thread& thread) {
  return name_of(thread.block) + " thread " + std::to_string(thread.index);
}

// Fiber entry: faults end here, for none may cross from one stack to another.
void thread_body(void* argument) {
  auto& thread = *static_cast<Thread*>(argument);
  try {
    thread.block.grid.body();
    if (!thread.copies.empty()) {
      fault(thread.copies.front().at, "returns with an asynchronous copy under way: a wait is missing");
    }
    if (!thread.products.reads.empty()) {
      fault(thread.products.reads.front().at, "returns with a product under way: a wait is missing");
    }
  } catch (Fault& f) {
    if (!t_fault) t_fault = std::move(f);
  } catch (const Cancelled&) {
  }
  thread.block.set_state(thread, Thread::State::kEnded);
}

bool waits_for_grid(const std::unique_ptr<Thread>& thread) {
  return thread->state == Thread::State::kWaiting && std::strcmp(thread->meeting.what, "grid barrier") == 0;
}

}  // namespace

std::string to_string(Where where) {
  const char* slash = std::strrchr(where.file, '/');
  return std::string(slash == nullptr ? where.file : slash + 1) + ":" + std::to_string(where.line);
}

void fault(Where where, const std::string& what) {
  const std::string place = to_string(where) + ": ";
  if (t_running == nullptr) throw Fault{place + what};
  throw Fault{place + "kernel " + t_running->block.grid.shape.kernel + ", " + name_of(*t_running) + " " + what};
}

constinit thread_local Thread* t_running = nullptr;

void outside_a_kernel() { throw Fault{"a device function was called outside a kernel"}; }

Actor Thread::actor() {
  if (!previous_over) {
    previous_over = std::any_of(block.launch_waits.begin(), block.launch_waits.end(),
                                [this](const auto& wait) { return clock.has_seen(wait.first, wait.second); });
  }
  return {block.linear, index, block.grid.epoch, previous_over, clock};
}

// ---- a block ------------------------------------------------------------------------------------------------

Block::Block(Grid& grid, int linear, const int (&where)[3])
    : grid(grid),
      linear(linear),
      index{where[0], where[1], where[2]},
      warps(static_cast<size_t>((grid.shape.threads + 31) / 32)),
      shared(grid.shape.shared_bytes, grid.shape.threads) {
  const Seen nothing = Gathering(grid.shape.threads).all();
  for (int t = 0; t < grid.shape.threads; ++t) {
    threads.push_back(std::make_unique<Thread>(*this, t, nothing, grid.stacks));
    set_state(*threads.back(), Thread::State::kReady);
    threads.back()->previous_over = !grid.shape.overlaps;
    threads.back()->fiber.prepare(thread_body, threads.back().get());
  }
}

Block::~Block() {
  for (const auto& thread : threads) {
    if (!thread->started || thread->state == Thread::State::kEnded) continue;
    thread->cancelled = true;
    t_running = thread.get();
    thread->fiber.enter();
    t_running = nullptr;
  }
}

void Block::set_state(Thread& thread, Thread::State state) {
  thread.state = state;
  uint32_t& ready = warps[static_cast<size_t>(thread.warp())].ready;
  const uint32_t lane = 1u << thread.lane();
  ready = state == Thread::State::kReady ? ready | lane : ready & ~lane;
}

bool Block::ended() const {
  return std::all_of(threads.begin(), threads.end(),
                     [](const auto& thread) { return thread->state == Thread::State::kEnded; });
}

void Block::finish() {
  for (Warp& warp : warps) warp.instructions.finish(grid.counters);
  if (grid.shape.overlaps && launch_waits.empty()) {
    throw Fault{
        std::string("kernel ") + grid.shape.kernel + ", " + name_of(*this) +
        " ends where no thread of it has called wait_for_previous_launch: the end of this launch would not "
        "mean the end of those before"};
  }
}

void Block::run() {
  std::vector<Thread*> ready;
  while (true) {
    ready.clear();
    for (const auto& thread : threads) {
      if (thread->state == Thread::State::kReady) ready.push_back(thread.get());
    }
    if (ready.empty()) {
      if (ended() || std::all_of(threads.begin(), threads.end(), waits_for_grid)) return;
      stuck();
    }
    std::shuffle(ready.begin(), ready.end(), grid.random);
    for (Thread* thread : ready) {
      if (thread->state != Thread::State::kReady) continue;
      t_running = thread;
      thread->started = true;
      thread->fiber.enter();
      t_running = nullptr;
      if (t_fault) {
        Fault f = std::move(*t_fault);
        t_fault.reset();
        throw f;
      }
    }
  }
}

void Block::pause(Thread& self) {
  set_state(self, Thread::State::kWaiting);
  self.fiber.leave();
  if (self.cancelled) throw Cancelled{};
}

// Whether a meeting of `waiting` is one for `other` as well; any, where it cannot be told.
bool Block::awaits(const Thread& waiting, const Thread& other) const {
  const Thread::Meeting& meeting = waiting.meeting;
  if (meeting.warpgroup) return other.index / kWarpgroup == waiting.index / kWarpgroup;
  if (meeting.lanes == 0) return true;
  return other.warp() == waiting.warp() && (meeting.lanes >> other.lane() & 1) != 0;
}

void Block::stuck() {
  const Thread* waiting = nullptr;
  for (const auto& thread : threads) {
    if (thread->state == Thread::State::kWaiting) {
      waiting = thread.get();
      break;
    }
  }
  t_running = const_cast<Thread*>(waiting);
  struct Reset {
    ~Reset() { t_running = nullptr; }
  } reset;
  // Name one that is missing: a lane of its mask, or any thread that is elsewhere.
  for (const auto& other : threads) {
    if (other.get() == waiting || !awaits(*waiting, *other)) continue;
    if (other->state == Thread::State::kEnded || other->meeting.barrier != waiting->meeting.barrier ||
        !(other->meeting.at == waiting->meeting.at)) {
      diverged(*waiting, *other);
    }
  }
  fault(waiting->meeting.at, std::string("waits for ever at ") + waiting->meeting.what);
}

// ---- a grid -------------------------------------------------------------------------------------------------

void Grid::run() {
  struct Cleared {
    ~Cleared() { t_running = nullptr; }
  } cleared;
  const int blocks = shape.grid[0] * shape.grid[1] * shape.grid[2];
  std::vector<int> order(static_cast<size_t>(blocks));
  for (int b = 0; b < blocks; ++b) order[static_cast<size_t>(b)] = b;
  std::shuffle(order.begin(), order.end(), random);
  auto make = [&](int b) {
    const int where[3] = {b % shape.grid[0], b / shape.grid[0] % shape.grid[1], b / shape.grid[0] / shape.grid[1]};
    return std::make_unique<Block>(*this, b, where);
  };
  global.begin_launch(shape.overlaps);
  if (!shape.cooperative) {
    for (int b : order) {
      const auto block = make(b);
      block->run();
      block->finish();
    }
    return;
  }
  std::vector<std::unique_ptr<Block>> all;
  for (int b : order) all.push_back(make(b));
  while (true) {
    size_t ended = 0;
    for (const auto& block : all) {
      block->run();
      ended += block->ended() ? 1 : 0;
    }
    if (ended == all.size()) break;
    if (ended != 0)
      throw Fault{std::string("kernel ") + shape.kernel + ": a block ended while others wait for the grid"};
    ++epoch;
    for (const auto& block : all) block->release_grid_barrier();
  }
  for (const auto& block : all) block->finish();
}

}  // namespace fastlora::emulator
