// Vector clocks: who may have seen what. Thread t's clock holds, for every thread s of the block, the last moment
// of s that is ordered before t's present by a barrier. An access by s at moment c is ordered before t's iff
// c <= clock_t[s]. (Lamport 1978; as race detectors such as FastTrack use them, Flanagan and Freund 2009.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastlora::emulator {

using Moment = uint32_t;

class VectorClock {
 public:
  VectorClock() = default;
  VectorClock(int threads, int self) : moments_(static_cast<size_t>(threads), 0), self_(self) {
    moments_[static_cast<size_t>(self)] = 1;
  }

  Moment now() const { return moments_[static_cast<size_t>(self_)]; }
  bool has_seen(int thread, Moment moment) const { return moment <= moments_[static_cast<size_t>(thread)]; }
  void tick() { ++moments_[static_cast<size_t>(self_)]; }
  const std::vector<Moment>& moments() const { return moments_; }

  void join(const std::vector<Moment>& other) {
    for (size_t i = 0; i < moments_.size(); ++i) moments_[i] = std::max(moments_[i], other[i]);
  }

 private:
  std::vector<Moment> moments_;
  int self_ = 0;
};

}  // namespace fastlora::emulator
