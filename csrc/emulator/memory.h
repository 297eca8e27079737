// The emulated device's memory and who has touched it. Every byte of shared memory knows whether it was written,
// by whom and when, and who read it since; global buffers are known by address and length, and likewise watched
// within one launch.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "clock.h"
#include "fault.h"

namespace fastlora::emulator {

// Who makes an access: a thread of a block, at a moment of its clock, in the grid's current epoch (grid-wide
// barriers passed).
struct Actor {
  int block;
  int thread;
  int grid_epoch;
  const VectorClock& clock;
};

class SharedMemory {
 public:
  // `bytes` of memory filled with NaN patterns and marked unwritten.
  SharedMemory(int64_t bytes, int threads);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  uint8_t* base() const { return base_; }
  bool contains(const void* p) const {
    const auto* byte = static_cast<const uint8_t*>(p);
    return byte >= base_ && byte < base_ + bytes_;
  }

  // Each faults on an address out of range and on an access not ordered by a barrier after another thread's;
  // read also on bytes never written and on those a copy is still under way to.
  void read(const void* p, int64_t bytes, const Actor& who, Where at);
  void write(const void* p, int64_t bytes, const Actor& who, Where at);
  // An asynchronous copy by `who` begins (the bytes may change from now on) and lands.
  void begin_copy(const void* p, int64_t bytes, const Actor& who, Where at);
  void land_copy(const void* p, int64_t bytes, const Actor& who, Where at);
  // Atomics are ordered among themselves, not with plain accesses.
  void atomic(const void* p, int64_t bytes, const Actor& who, Where at);

 private:
  static constexpr int kNobody = -1, kMany = -2;
  struct Cell {
    int16_t writer = kNobody;  // kNobody: never written
    int16_t reader = kNobody;  // since the last write; kMany: see many_reads_
    int16_t copier = kNobody;  // an asynchronous copy to this byte is under way
    bool by_atomic = false;    // the last write
    Moment written = 0;
    Moment read = 0;
  };
  int64_t offset_of(const void* p, int64_t bytes, const char* verb, Where at) const;
  void check_written_before(const Cell& cell, int64_t offset, const Actor& who, const char* verb, Where at) const;
  void check_read_before(const Cell& cell, int64_t offset, const Actor& who, Where at) const;
  void note_write(Cell& cell, const Actor& who, bool by_atomic);

  uint8_t* base_;
  int64_t bytes_;
  int threads_;
  std::vector<Cell> cells_;
  std::vector<std::unique_ptr<Moment[]>> many_reads_;  // per four bytes, a moment a thread
};

// Buffers a launch may touch. Those of tests are registered one by one; anything else is out of bounds.
class GlobalMemory {
 public:
  void add(const void* base, int64_t bytes, bool writable, const std::string& name);
  void remove(const void* base);
  void begin_launch() { ++launch_; }

  void read(const void* p, int64_t bytes, const Actor& who, Where at);
  void write(const void* p, int64_t bytes, const Actor& who, Where at);
  void atomic(const void* p, int64_t bytes, const Actor& who, Where at);

 private:
  struct Cell {  // of one byte, meaningful within one launch
    int32_t launch = 0;
    int32_t write_block = -1, read_block = -1;  // -2: several blocks have read it
    int16_t write_thread = 0, read_thread = 0;
    int32_t write_epoch = 0, read_epoch = 0;
    Moment written = 0, read = 0;
    bool by_atomic = false;
  };
  struct Buffer {
    const uint8_t* base;
    int64_t bytes;
    bool writable;
    std::string name;
    std::vector<Cell> cells;
  };
  // Whether the last write to a byte, or the last read of it, is ordered before what `who` does now.
  static bool write_ordered(const Cell& cell, const Actor& who);
  static bool read_ordered(const Cell& cell, const Actor& who);
  static void note_write(Cell& cell, const Actor& who, bool by_atomic);
  Buffer& find(const void* p, int64_t bytes, const char* verb, Where at);
  Cell& cell_of(Buffer& buffer, const uint8_t* byte);

  std::map<const uint8_t*, Buffer> buffers_;
  int32_t launch_ = 0;
};

}  // namespace fastlora::emulator
