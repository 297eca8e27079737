// How threads meet: the part of a block where they wait for one another.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace fastlora::emulator {
namespace {

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

}  // namespace

void Block::order(const std::vector<Thread*>& met) {
  Gathering gathering(static_cast<int>(threads.size()));
  for (const Thread* thread : met) gathering.add(thread->clock);
  const Seen seen = std::move(gathering).take();
  for (Thread* thread : met) {
    thread->clock.learn(seen);
    thread->clock.tick();
  }
  if (met.size() == threads.size()) shared.all_met();
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

// Faults if a lane that `self` must meet has ended or waits elsewhere.
void Block::check_not_elsewhere(const Thread& self) {
  const Thread::Meeting& meeting = self.meeting;
  for (int lane = 0; lane < 32; ++lane) {
    if ((meeting.lanes >> lane & 1) == 0) continue;
    const size_t t = static_cast<size_t>(self.warp() * 32 + lane);
    if (t >= threads.size()) {
      fault(meeting.at, std::string("calls ") + meeting.what + " with a lane that its warp does not have");
    }
    const Thread& other = *threads[t];
    if (&other == &self || other.state == Thread::State::kReady) continue;
    if (other.state == Thread::State::kEnded || !same(other.meeting.what, meeting.what) ||
        !(other.meeting.at == meeting.at) || other.meeting.lanes != meeting.lanes) {
      diverged(self, other);
    }
  }
}

void Block::meet_warp(const char* what, uint32_t lanes, Where at, void* payload, WarpAction action,
                      bool orders_memory) {
  Thread& self = current();
  self.meeting = {.what = what, .at = at, .lanes = lanes, .payload = payload};
  const uint32_t own = 1u << self.lane();
  if ((lanes & own) == 0) fault(at, std::string("calls ") + what + " with a mask that lacks its own lane");
  Warp& warp = warps[static_cast<size_t>(self.warp())];
  Warp::Gathered& gathered = warp.gathered[static_cast<size_t>(__builtin_ctz(lanes))];
  // What has been looked at holds; of the rest, those who may run will still come.
  const bool known = gathered.lanes == lanes && gathered.at == at && same(gathered.what, what);
  if ((lanes & ~own & ~warp.ready & ~(known ? gathered.arrived : 0)) != 0) check_not_elsewhere(self);
  gathered = {what, at, lanes, lanes & (~warp.ready | own)};
  if ((lanes & ~own & warp.ready) != 0) return pause(self);
  gathered.arrived = 0;
  void* payloads[32] = {};
  met_.clear();
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    Thread& thread = *threads[static_cast<size_t>(self.warp() * 32 + __builtin_ctz(left))];
    payloads[thread.lane()] = thread.meeting.payload;
    met_.push_back(&thread);
  }
  if (action != nullptr) action(payloads, lanes);
  if (orders_memory) order(met_);
  for (Thread* thread : met_) thread->state = Thread::State::kReady;
  warp.ready |= lanes;
}

// Warps of a warpgroup may be anywhere when its first thread comes, but not ended, and not at another such
// meeting.
void Block::meet_warpgroup(const char* what, Where at, void* payload, WarpgroupAction action) {
  Thread& self = current();
  self.meeting = {.what = what, .at = at, .payload = payload, .warpgroup = true};
  const auto group = static_cast<size_t>(self.index / kWarpgroup);
  if ((group + 1) * kWarpgroup > threads.size()) {
    fault(at, std::string("calls ") + what + " outside a whole warpgroup of 128 threads");
  }
  std::vector<Thread*>& met = at_warpgroup_[group];
  if (!met.empty() && (!same(met.front()->meeting.what, what) || !(met.front()->meeting.at == at))) {
    diverged(self, *met.front());
  }
  met.push_back(&self);
  if (met.size() < kWarpgroup) return pause(self);
  std::sort(met.begin(), met.end(), [](const Thread* a, const Thread* b) { return a->index < b->index; });
  if (action != nullptr) action(*this, met, at);
  for (Thread* thread : met) set_state(*thread, Thread::State::kReady);
  met.clear();
}

void Block::meet_block(const char* what, int barrier, int expected, Where at) {
  Thread& self = current();
  self.meeting = {.what = what, .at = at, .barrier = barrier, .expected = expected};
  std::vector<Thread*>& met = at_barrier_[static_cast<size_t>(barrier)];
  if (!met.empty()) {  // all who wait agree: name the first
    const auto before = [](const Thread* a, const Thread* b) { return a->index < b->index; };
    const Thread& first = **std::min_element(met.begin(), met.end(), before);
    if (barrier == 0 && !(first.meeting.at == at)) diverged(self, first);
    if (first.meeting.expected != expected) {
      fault(at, std::string("expects ") + std::to_string(expected) + " threads at a barrier where thread " +
                    std::to_string(first.index) + " expects " + std::to_string(first.meeting.expected));
    }
  }
  met.push_back(&self);
  if (static_cast<int>(met.size()) < expected) return pause(self);
  order(met);
  for (Thread* thread : met) set_state(*thread, Thread::State::kReady);
  met.clear();
}

void Block::meet_grid(Where at) {
  Thread& self = current();
  if (!grid.shape.cooperative) fault(at, "meets the grid in a launch that is not cooperative");
  self.meeting = {.what = "grid barrier", .at = at};
  pause(self);
}

void Block::release_grid_barrier() {
  met_.clear();
  for (const auto& thread : threads) met_.push_back(thread.get());
  order(met_);
  for (Thread* thread : met_) set_state(*thread, Thread::State::kReady);
}

void Block::arrive_memory(MemoryBarrier& barrier) {
  Thread& self = current();
  barrier.arrived.add(self.clock);
  self.clock.tick();
  if (--barrier.pending != 0) return;
  barrier.pending = barrier.expected;
  ++barrier.phase;
  barrier.passed = barrier.arrived.all();
  barrier.learner.reset();
  std::erase_if(at_memory_, [&](Thread* thread) {
    if (thread->meeting.memory != &barrier || !barrier.lets_pass(thread->meeting.parity)) return false;
    learn_passed(*thread, barrier);
    set_state(*thread, Thread::State::kReady);
    return true;
  });
}

void Block::wait_memory(MemoryBarrier& barrier, int parity, Where at) {
  Thread& self = current();
  if (barrier.lets_pass(parity)) return learn_passed(self, barrier);
  self.meeting = {.what = "an mbarrier", .at = at, .memory = &barrier, .parity = parity};
  at_memory_.push_back(&self);
  pause(self);
}

// What those who arrived had done is ordered before what `thread` will do.
void Block::learn_passed(Thread& thread, MemoryBarrier& barrier) {
  if (barrier.passed == nullptr) return;  // no phase has ended
  if (thread.clock.seen() != barrier.learner) {
    Gathering both(static_cast<int>(threads.size()));
    both.add(thread.clock.seen());
    both.add(barrier.passed);
    barrier.learner = thread.clock.seen();
    barrier.learned = std::move(both).take();
  }
  thread.clock.learn(barrier.learned);
}

}  // namespace fastlora::emulator
