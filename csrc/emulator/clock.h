// Vector clocks: who may have seen what. Thread t's clock holds, for every thread s of the block, the last moment
// of s that is ordered before t's present by a barrier. An access by s at moment c is ordered before t's iff
// c <= clock_t[s]. (Lamport 1978; as race detectors such as FastTrack use them, Flanagan and Freund 2009.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace fastlora::emulator {

using Moment = uint32_t;

// The moments of every thread of a block that some of them have seen. Those who met last share one: a clock is
// its own thread's present and what was seen at the last meeting.
using Seen = std::shared_ptr<const Moment[]>;

class VectorClock {
 public:
  VectorClock(int self, Seen seen) : self_(self), seen_(std::move(seen)) {}

  Moment now() const { return now_; }
  bool has_seen(int thread, Moment moment) const { return thread == self_ || moment <= seen_[thread]; }
  void tick() { ++now_; }
  int self() const { return self_; }
  const Seen& seen() const { return seen_; }
  void learn(const Seen& seen) { seen_ = seen; }  // which holds all that this clock had seen

 private:
  int self_;
  Moment now_ = 1;
  Seen seen_;
};

// What a set of clocks have seen and done, joined one by one.
class Gathering {
 public:
  explicit Gathering(int threads) : threads_(threads), joined_(std::make_shared<Moment[]>(count())) {}
  Gathering(Gathering&&) = default;
  Gathering& operator=(Gathering&&) = default;

  void add(const VectorClock& clock) {
    add(clock.seen());
    Moment& own = joined_[clock.self()];
    own = std::max(own, clock.now());
  }
  void add(const Seen& seen) {
    if (seen == last_) return;
    last_ = seen;
    for (int i = 0; i < threads_; ++i) joined_[i] = std::max(joined_[i], seen[i]);
  }
  // All so far; the gathering goes on.
  Seen all() const {
    auto copy = std::make_shared<Moment[]>(count());
    std::copy_n(joined_.get(), threads_, copy.get());
    return copy;
  }
  // All of it, once.
  Seen take() && { return std::move(joined_); }

 private:
  size_t count() const { return static_cast<size_t>(threads_); }

  int threads_;
  std::shared_ptr<Moment[]> joined_;
  Seen last_;  // what was joined last; most have seen the same
};

}  // namespace fastlora::emulator
