// What an access pattern costs on the device, per line of source: shared-memory wavefronts and global sectors of
// every warp-wide instruction, beside the fewest that its bytes could take.
#pragma once

#include <array>
#include <cstdint>
#include <string>
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

// The addresses that a warp's lanes give one instruction.
struct Lanes {
  std::array<uint64_t, 32> address;
  uint32_t present = 0;  // a bit a lane
  int bytes = 0;
};

// Sums by site: a line and what it does there.
class Counters {
 public:
  int site_of(Access access, Where at);
  void settle(int site, const Lanes& lanes);
  // Eight rows of 16 bytes read together: one ldmatrix phase.
  void add_matrix(Where at, const std::array<uint64_t, 8>& rows);
  std::vector<LineCount> lines() const;

 private:
  struct Site {
    const char* file;  // by its literal's address: lines() merges
    int line;
    Access access;
    int64_t instructions = 0, bytes = 0, cost = 0, least = 0;
  };

  std::vector<Site> sites_;
  std::vector<int32_t> table_ = std::vector<int32_t>(64, -1);  // sites by hash, a power of two
};

// Instructions of one warp that not all of its lanes have passed. Lanes run one after another here: the n-th time
// that each of them passes a line is taken for the n-th execution of one warp-wide instruction, as it is on the
// device where lanes do not diverge.
class OpenInstructions {
 public:
  void add(Counters& counters, Access access, Where at, int lane, uint64_t address, int bytes);
  // Nobody else will come.
  void finish(Counters& counters);

 private:
  // One lane's part: where, and above the 56 bits of an address, how many bytes.
  using Passed = uint64_t;
  static constexpr int kAddressBits = 56;
  struct Queue {                     // of one site
    std::array<size_t, 32> count{};  // instructions that each lane has passed
    size_t first = 0;                // that not all have
    uint32_t behind = 0xffffffffu;   // lanes that have not passed it
    size_t room = 0;                 // instructions from first on, a power of two
    std::vector<Passed> passed;      // lane after lane, each a ring
    Passed& at(int lane, size_t instruction) {
      return passed[static_cast<size_t>(lane) * room + (instruction & (room - 1))];
    }
    void grow();
    Lanes take_first();
  };
  std::vector<Queue> queues_;
};

// Wavefronts of one shared-memory instruction: lanes in phases of 128 bytes; within a phase, as many as the
// busiest of 32 four-byte banks has distinct words.
int64_t shared_wavefronts(const Lanes& lanes, int64_t* least);

// Distinct 32-byte sectors, and the fewest that hold as many distinct bytes.
int64_t global_sectors(const Lanes& lanes, int64_t* least);

}  // namespace fastlora::emulator
