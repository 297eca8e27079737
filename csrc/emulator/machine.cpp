#include "machine.h"

#include <algorithm>
#include <cstring>
#include <optional>

namespace fastlora::emulator {
namespace {

thread_local Thread* t_current = nullptr;
thread_local std::optional<Fault> t_fault;

struct Cancelled {};

std::string name_of(const Thread& thread) {
  const Block& block = thread.block;
  return "block (" + std::to_string(block.index[0]) + ", " + std::to_string(block.index[1]) + ", " +
         std::to_string(block.index[2]) + ") thread " + std::to_string(thread.index);
}

// Fiber entry: faults end here, for none may cross from one stack to another.
void thread_body(void* argument) {
  auto& thread = *static_cast<Thread*>(argument);
  try {
    thread.block.grid.body();
    if (!thread.copies.empty()) {
      fault(thread.copies.front().at, "returns with an asynchronous copy under way: a wait is missing");
    }
  } catch (Fault& f) {
    if (!t_fault) t_fault = std::move(f);
  } catch (const Cancelled&) {
  }
  thread.state = Thread::State::kEnded;
}

}  // namespace

std::string to_string(Where where) {
  const char* slash = std::strrchr(where.file, '/');
  return std::string(slash == nullptr ? where.file : slash + 1) + ":" + std::to_string(where.line);
}

void fault(Where where, const std::string& what) {
  const std::string place = to_string(where) + ": ";
  if (t_current == nullptr) throw Fault{place + what};
  throw Fault{place + "kernel " + t_current->block.grid.shape.kernel + ", " + name_of(*t_current) + " " + what};
}

Thread& current() {
  if (t_current == nullptr) throw Fault{"a device function was called outside a kernel"};
  return *t_current;
}

Actor Thread::actor() const { return {block.linear, index, block.grid.epoch, clock}; }

int64_t Thread::occurrence(Access access, Where at) { return passes[{at.file, at.line, access}]++; }

// ---- a block ------------------------------------------------------------------------------------------------

Block::Block(Grid& grid, int linear, const int (&where)[3])
    : grid(grid),
      linear(linear),
      index{where[0], where[1], where[2]},
      shared(grid.shape.shared_bytes, grid.shape.threads) {
  for (int t = 0; t < grid.shape.threads; ++t) {
    threads.push_back(std::make_unique<Thread>(*this, t, grid.shape.threads, grid.stacks));
    threads.back()->fiber.prepare(thread_body, threads.back().get());
  }
}

Block::~Block() {
  for (const auto& thread : threads) {
    if (!thread->started || thread->state == Thread::State::kEnded) continue;
    thread->cancelled = true;
    t_current = thread.get();
    thread->fiber.enter();
    t_current = nullptr;
  }
}

bool Block::ended() const {
  return std::all_of(threads.begin(), threads.end(),
                     [](const auto& thread) { return thread->state == Thread::State::kEnded; });
}

void Block::run() {
  std::vector<Thread*> ready;
  while (true) {
    ready.clear();
    bool at_grid_barrier = true;
    for (const auto& thread : threads) {
      if (thread->state == Thread::State::kWaiting && thread->meeting.condition && thread->meeting.condition()) {
        thread->state = Thread::State::kReady;
      }
      if (thread->state == Thread::State::kReady) ready.push_back(thread.get());
      if (std::strcmp(thread->meeting.what, "grid barrier") != 0) at_grid_barrier = false;
    }
    if (ready.empty()) {
      if (ended() || at_grid_barrier) return;
      stuck();
    }
    std::shuffle(ready.begin(), ready.end(), grid.random);
    for (Thread* thread : ready) {
      if (thread->state != Thread::State::kReady) continue;
      t_current = thread;
      thread->started = true;
      thread->fiber.enter();
      t_current = nullptr;
      if (t_fault) {
        Fault f = std::move(*t_fault);
        t_fault.reset();
        throw f;
      }
    }
  }
}

void Block::pause(Thread& self) {
  self.state = Thread::State::kWaiting;
  self.fiber.leave();
  if (self.cancelled) throw Cancelled{};
  self.meeting = {};
}

// All that `met` have done is ordered before all that they will do.
void Block::order(const std::vector<Thread*>& met) {
  std::vector<Moment> joined = met.front()->clock.moments();
  for (const Thread* thread : met) {
    const auto& moments = thread->clock.moments();
    for (size_t i = 0; i < joined.size(); ++i) joined[i] = std::max(joined[i], moments[i]);
  }
  for (Thread* thread : met) {
    thread->clock.join(joined);
    thread->clock.tick();
  }
}

void Block::diverged(const Thread& waiting, const Thread& other) {
  std::string where;
  if (other.state == Thread::State::kEnded) {
    where = "has returned";
  } else {
    where = std::string("is at ") + other.meeting.what + " in " + to_string(other.meeting.at);
  }
  fault(waiting.meeting.at, std::string("waits at ") + waiting.meeting.what + " for thread " +
                                std::to_string(other.index) + ", which " + where + ": divergence");
}

void Block::meet_warp(const char* what, uint32_t lanes, Where at, void* payload, WarpAction action,
                      bool orders_memory) {
  Thread& self = current();
  self.meeting = {.what = what, .at = at, .lanes = lanes, .payload = payload, .condition = {}};
  if ((lanes >> self.lane() & 1) == 0)
    fault(at, std::string("calls ") + what + " with a mask that lacks its own lane");
  std::vector<Thread*> met;
  bool complete = true;
  for (int lane = 0; lane < 32; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    const size_t t = static_cast<size_t>(self.warp() * 32 + lane);
    if (t >= threads.size()) fault(at, std::string("calls ") + what + " with a lane that its warp does not have");
    Thread& other = *threads[t];
    met.push_back(&other);
    if (&other == &self) continue;
    if (other.state == Thread::State::kReady) {
      complete = false;
    } else if (other.state == Thread::State::kEnded || std::strcmp(other.meeting.what, what) != 0 ||
               !(other.meeting.at == at) || other.meeting.lanes != lanes) {
      diverged(self, other);
    }
  }
  if (!complete) return pause(self);
  void* payloads[32] = {};
  for (Thread* thread : met) payloads[thread->lane()] = thread->meeting.payload;
  if (action != nullptr) action(payloads, lanes);
  if (orders_memory) order(met);
  for (Thread* thread : met) {
    if (thread != &self) thread->state = Thread::State::kReady;
  }
  self.meeting = {};
}

void Block::meet_block(const char* what, int64_t barrier, int expected, Where at) {
  Thread& self = current();
  self.meeting = {.what = what, .at = at, .barrier = barrier, .expected = expected, .condition = {}};
  std::vector<Thread*> met{&self};
  for (const auto& thread : threads) {
    if (thread->state == Thread::State::kWaiting && thread->meeting.barrier == barrier)
      met.push_back(thread.get());
  }
  for (Thread* thread : met) {
    if (!(thread->meeting.at == at) && barrier == 0) diverged(self, *thread);
    if (thread->meeting.expected != expected) {
      fault(at, std::string("expects ") + std::to_string(expected) + " threads at a barrier where thread " +
                    std::to_string(thread->index) + " expects " + std::to_string(thread->meeting.expected));
    }
  }
  if (static_cast<int>(met.size()) < expected) return pause(self);
  order(met);
  for (Thread* thread : met) {
    if (thread != &self) thread->state = Thread::State::kReady;
  }
  self.meeting = {};
}

void Block::meet_grid(Where at) {
  Thread& self = current();
  if (!grid.shape.cooperative) fault(at, "meets the grid in a launch that is not cooperative");
  self.meeting = {.what = "grid barrier", .at = at, .condition = {}};
  pause(self);
}

void Block::release_grid_barrier() {
  std::vector<Thread*> all;
  for (const auto& thread : threads) all.push_back(thread.get());
  order(all);
  for (Thread* thread : all) thread->state = Thread::State::kReady;
}

void Block::wait_until(const char* what, std::function<bool()> condition, Where at) {
  Thread& self = current();
  if (condition()) return;
  self.meeting = {.what = what, .at = at, .condition = std::move(condition)};
  pause(self);
}

void Block::stuck() {
  const Thread* waiting = nullptr;
  for (const auto& thread : threads) {
    if (thread->state == Thread::State::kWaiting) {
      waiting = thread.get();
      break;
    }
  }
  t_current = const_cast<Thread*>(waiting);
  struct Reset {
    ~Reset() { t_current = nullptr; }
  } reset;
  // Name one that is missing: a lane of its mask, or any thread that is elsewhere.
  for (const auto& other : threads) {
    if (other.get() == waiting) continue;
    const bool same_warp = other->warp() == waiting->warp();
    if (waiting->meeting.lanes != 0 && (!same_warp || (waiting->meeting.lanes >> other->lane() & 1) == 0))
      continue;
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
    ~Cleared() { t_current = nullptr; }
  } cleared;
  const int blocks = shape.grid[0] * shape.grid[1] * shape.grid[2];
  std::vector<int> order(static_cast<size_t>(blocks));
  for (int b = 0; b < blocks; ++b) order[static_cast<size_t>(b)] = b;
  std::shuffle(order.begin(), order.end(), random);
  auto make = [&](int b) {
    const int where[3] = {b % shape.grid[0], b / shape.grid[0] % shape.grid[1], b / shape.grid[0] / shape.grid[1]};
    return std::make_unique<Block>(*this, b, where);
  };
  global.begin_launch();
  if (!shape.cooperative) {
    for (int b : order) {
      make(b)->run();
      counters.finish_block();
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
  counters.finish_block();
}

}  // namespace fastlora::emulator
