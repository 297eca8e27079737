#include "counters.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace fastlora::emulator {
namespace {

// All lanes, one after another without a gap.
bool in_a_row(const Lanes& lanes) {
  if (lanes.present != 0xffffffffu) return false;
  bool follows = true;
  for (size_t lane = 1; lane < 32; ++lane) {
    follows &= lanes.address[lane] == lanes.address[0] + lane * static_cast<uint64_t>(lanes.bytes);
  }
  return follows;
}

}  // namespace

int64_t shared_wavefronts(const Lanes& lanes, int64_t* least) {
  const int lanes_a_phase = lanes.bytes <= 4 ? 32 : 128 / lanes.bytes;
  if (in_a_row(lanes)) return *least = 32 / lanes_a_phase;
  int64_t total = 0, phases = 0;
  for (int first = 0; first < 32; first += lanes_a_phase) {
    uint64_t words[32][32];
    int count[32] = {}, busiest = 0;
    for (int lane = first; lane < first + lanes_a_phase; ++lane) {
      if ((lanes.present >> lane & 1) == 0) continue;
      const uint64_t a = lanes.address[static_cast<size_t>(lane)];
      for (uint64_t word = a / 4; word <= (a + static_cast<uint64_t>(lanes.bytes) - 1) / 4; ++word) {
        const uint64_t bank = word % 32;
        uint64_t* end = words[bank] + count[bank];
        if (std::find(words[bank], end, word) != end) continue;
        *end = word;
        busiest = std::max(busiest, ++count[bank]);
      }
    }
    total += busiest;
    phases += busiest > 0 ? 1 : 0;
  }
  *least = phases;
  return total;
}

int64_t global_sectors(const Lanes& lanes, int64_t* least) {
  if (in_a_row(lanes)) {
    *least = lanes.bytes;
    return static_cast<int64_t>((lanes.address[31] + static_cast<uint64_t>(lanes.bytes) - 1) / 32 -
                                lanes.address[0] / 32 + 1);
  }
  std::array<uint64_t, 64> sectors;
  std::array<uint32_t, 64> touched;  // which of its bytes
  size_t count = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((lanes.present >> lane & 1) == 0) continue;
    const uint64_t a = lanes.address[static_cast<size_t>(lane)], end = a + static_cast<uint64_t>(lanes.bytes);
    for (uint64_t sector = a / 32; sector <= (end - 1) / 32; ++sector) {
      size_t i = 0;
      while (i < count && sectors[i] != sector) ++i;
      if (i == count) {
        sectors[i] = sector;
        touched[i] = 0;
        ++count;
      }
      const uint64_t from = std::max(a, sector * 32) % 32, to = std::min(end, sector * 32 + 32) - sector * 32;
      touched[i] |= static_cast<uint32_t>((uint64_t{1} << to) - (uint64_t{1} << from));
    }
  }
  int64_t bytes = 0;
  for (size_t i = 0; i < count; ++i) bytes += __builtin_popcount(touched[i]);
  *least = (bytes + 31) / 32;
  return static_cast<int64_t>(count);
}

// ---- sums ---------------------------------------------------------------------------------------------------

int Counters::site_of(Access access, Where at) {
  const size_t hash = reinterpret_cast<uintptr_t>(at.file) / 8 + static_cast<size_t>(at.line) * 4;
  for (size_t slot = hash + static_cast<size_t>(access);; ++slot) {
    int32_t& found = table_[slot & (table_.size() - 1)];
    if (found < 0) {
      if (2 * sites_.size() >= table_.size()) break;
      found = static_cast<int32_t>(sites_.size());
      sites_.push_back({at.file, at.line, access});
      return found;
    }
    const Site& site = sites_[static_cast<size_t>(found)];
    if (site.line == at.line && site.access == access && site.file == at.file) return found;
  }
  // Twice the room; in the same order, so that every site keeps its number.
  const std::vector<Site> known = std::move(sites_);
  sites_.clear();
  table_.assign(2 * table_.size(), -1);
  for (const Site& site : known) sites_[static_cast<size_t>(site_of(site.access, {site.file, site.line}))] = site;
  return site_of(access, at);
}

void Counters::add_matrix(Where at, const std::array<uint64_t, 8>& rows) {
  Lanes lanes{};
  for (size_t i = 0; i < 8; ++i) lanes.address[i] = rows[i];
  lanes.present = 0xff;
  lanes.bytes = 16;
  settle(site_of(Access::kSharedLoad, at), lanes);
}

void Counters::settle(int site, const Lanes& lanes) {
  Site& sum = sites_[static_cast<size_t>(site)];
  int64_t least = 0;
  const bool global = sum.access == Access::kGlobalLoad || sum.access == Access::kGlobalStore;
  sum.cost += (global ? global_sectors : shared_wavefronts)(lanes, &least);
  sum.least += least;
  sum.instructions += 1;
  sum.bytes += static_cast<int64_t>(__builtin_popcount(lanes.present)) * lanes.bytes;
}

std::vector<LineCount> Counters::lines() const {
  std::map<std::tuple<std::string, int, Access>, LineCount> merged;
  for (const Site& site : sites_) {
    if (site.instructions == 0) continue;
    LineCount& sum = merged.try_emplace({site.file, site.line, site.access}, LineCount{}).first->second;
    sum = {site.file,
           site.line,
           site.access,
           sum.instructions + site.instructions,
           sum.bytes + site.bytes,
           sum.cost + site.cost,
           sum.least + site.least};
  }
  std::vector<LineCount> all;
  for (const auto& [key, count] : merged) all.push_back(count);
  return all;
}

// ---- what is under way --------------------------------------------------------------------------------------

void OpenInstructions::Queue::grow() {
  const size_t larger = std::max<size_t>(4, 2 * room);
  std::vector<Passed> all(32 * larger);
  for (size_t lane = 0; lane < 32; ++lane) {
    for (size_t i = first; i < first + room; ++i) {
      all[lane * larger + (i & (larger - 1))] = at(static_cast<int>(lane), i);
    }
  }
  passed = std::move(all);
  room = larger;
}

Lanes OpenInstructions::Queue::take_first() {
  Lanes lanes;
  behind = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const Passed mine = at(lane, first);
    const size_t passed_by_it = count[static_cast<size_t>(lane)];
    lanes.address[static_cast<size_t>(lane)] = mine & ((Passed{1} << kAddressBits) - 1);
    if (passed_by_it > first) {
      lanes.present |= 1u << lane;
      lanes.bytes = static_cast<int>(mine >> kAddressBits);
    }
    if (passed_by_it <= first + 1) behind |= 1u << lane;
  }
  ++first;
  return lanes;
}

void OpenInstructions::add(Counters& counters, Access access, Where at, int lane, uint64_t address, int bytes) {
  const auto site = static_cast<size_t>(counters.site_of(access, at));
  if (site >= queues_.size()) queues_.resize(site + 1);
  Queue& queue = queues_[site];
  const size_t instruction = queue.count[static_cast<size_t>(lane)]++;
  if (instruction - queue.first >= queue.room) queue.grow();
  queue.at(lane, instruction) = address | static_cast<Passed>(bytes) << kAddressBits;
  if (instruction != queue.first) return;
  queue.behind &= ~(1u << lane);
  if (queue.behind == 0) counters.settle(static_cast<int>(site), queue.take_first());
}

void OpenInstructions::finish(Counters& counters) {
  for (size_t site = 0; site < queues_.size(); ++site) {
    Queue& queue = queues_[site];
    const size_t end = *std::max_element(queue.count.begin(), queue.count.end());
    while (queue.first < end) counters.settle(static_cast<int>(site), queue.take_first());
  }
  queues_.clear();
}

}  // namespace fastlora::emulator
