// What an access pattern costs on the device, per line of source: shared-memory wavefronts and global sectors of
// every warp-wide instruction, beside the fewest that its bytes could take.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "fault.h"

namespace fastlora::emulator {

enum class Access : uint8_t { kGlobalLoad, kGlobalStore, kSharedLoad, kSharedStore };

// Sums over a launch. cost and least are wavefronts (shared) or 32-byte sectors (global).
struct LineCount {
  std::string file;
  int line;
  Access access;
  int64_t instructions;  // of a warp
  int64_t bytes;
  int64_t cost;
  int64_t least;
};

// A warp's lanes run one after another here. The n-th time that each of them passes a line is taken for the n-th
// execution of one warp-wide instruction, as it is on the device where lanes do not diverge.
class Counters {
 public:
  void add(Access access, Where at, int warp, int lane, int64_t occurrence, uint64_t address, int bytes);
  // Eight rows of 16 bytes read together: one ldmatrix phase.
  void add_matrix(Where at, const std::array<uint64_t, 8>& rows);
  void finish_block();
  std::vector<LineCount> lines() const;

 private:
  struct Lanes {
    std::array<uint64_t, 32> address{};
    uint32_t present = 0;
    int bytes = 0;
  };
  using Site = std::tuple<const char*, int, Access>;  // the file by its literal's address: lines() merges
  void settle(const Site& site, const Lanes& lanes);

  std::map<std::tuple<Site, int, int64_t>, Lanes> open_;
  std::map<Site, LineCount> done_;
};

// Wavefronts of one shared-memory instruction: lanes in phases of 128 bytes; within a phase, as many as the
// busiest of 32 four-byte banks has distinct words. `present` is the mask of lanes that take part.
int64_t shared_wavefronts(const std::array<uint64_t, 32>& address, uint32_t present, int bytes, int64_t* least);

// Distinct 32-byte sectors, and the fewest that hold as many distinct bytes.
int64_t global_sectors(const std::array<uint64_t, 32>& address, uint32_t present, int bytes, int64_t* least);

}  // namespace fastlora::emulator
