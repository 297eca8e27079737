#include "counters.h"

#include <algorithm>
#include <set>

namespace fastlora::emulator {

int64_t shared_wavefronts(const std::array<uint64_t, 32>& address, uint32_t present, int bytes, int64_t* least) {
  const int lanes_a_phase = bytes <= 4 ? 32 : 128 / bytes;
  int64_t total = 0, phases = 0;
  for (int first = 0; first < 32; first += lanes_a_phase) {
    std::array<std::set<uint64_t>, 32> words;
    for (int lane = first; lane < first + lanes_a_phase; ++lane) {
      if ((present >> lane & 1) == 0) continue;
      const uint64_t a = address[static_cast<size_t>(lane)];
      for (uint64_t word = a / 4; word <= (a + static_cast<uint64_t>(bytes) - 1) / 4; ++word) {
        words[word % 32].insert(word);
      }
    }
    size_t busiest = 0;
    for (const auto& bank : words) busiest = std::max(busiest, bank.size());
    total += static_cast<int64_t>(busiest);
    phases += busiest > 0 ? 1 : 0;
  }
  *least = phases;
  return total;
}

int64_t global_sectors(const std::array<uint64_t, 32>& address, uint32_t present, int bytes, int64_t* least) {
  std::set<uint64_t> sectors, touched;
  for (int lane = 0; lane < 32; ++lane) {
    if ((present >> lane & 1) == 0) continue;
    const uint64_t a = address[static_cast<size_t>(lane)];
    for (uint64_t byte = a; byte < a + static_cast<uint64_t>(bytes); ++byte) {
      sectors.insert(byte / 32);
      touched.insert(byte);
    }
  }
  *least = (static_cast<int64_t>(touched.size()) + 31) / 32;
  return static_cast<int64_t>(sectors.size());
}

void Counters::add(Access access, Where at, int warp, int lane, int64_t occurrence, uint64_t address, int bytes) {
  const Site site{at.file, at.line, access};
  Lanes& lanes = open_[{site, warp, occurrence}];
  lanes.address[static_cast<size_t>(lane)] = address;
  lanes.present |= 1u << lane;
  lanes.bytes = bytes;
  if (lanes.present == 0xffffffffu) {
    settle(site, lanes);
    open_.erase({site, warp, occurrence});
  }
}

void Counters::add_matrix(Where at, const std::array<uint64_t, 8>& rows) {
  Lanes lanes;
  for (size_t i = 0; i < 8; ++i) lanes.address[i] = rows[i];
  lanes.present = 0xff;
  lanes.bytes = 16;
  settle({at.file, at.line, Access::kSharedLoad}, lanes);
}

void Counters::finish_block() {
  for (const auto& [key, lanes] : open_) settle(std::get<0>(key), lanes);
  open_.clear();
}

void Counters::settle(const Site& site, const Lanes& lanes) {
  const auto& [file, line, access] = site;
  LineCount& count = done_.try_emplace(site, LineCount{file, line, access, 0, 0, 0, 0}).first->second;
  int64_t least = 0;
  const bool global = access == Access::kGlobalLoad || access == Access::kGlobalStore;
  count.cost += (global ? global_sectors : shared_wavefronts)(lanes.address, lanes.present, lanes.bytes, &least);
  count.least += least;
  count.instructions += 1;
  count.bytes += static_cast<int64_t>(__builtin_popcount(lanes.present)) * lanes.bytes;
}

std::vector<LineCount> Counters::lines() const {
  std::map<std::tuple<std::string, int, Access>, LineCount> merged;
  for (const auto& [site, count] : done_) {
    LineCount& sum = merged.try_emplace({count.file, count.line, count.access}, LineCount{}).first->second;
    sum = {count.file,
           count.line,
           count.access,
           sum.instructions + count.instructions,
           sum.bytes + count.bytes,
           sum.cost + count.cost,
           sum.least + count.least};
  }
  std::vector<LineCount> all;
  for (const auto& [key, count] : merged) all.push_back(count);
  return all;
}

}  // namespace fastlora::emulator
