// A block's shared memory and who has touched it: every byte knows whether it was written, by whom and when, and
// who has read it since.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "cells.h"
#include "clock.h"
#include "fault.h"

namespace fastlora::emulator {

// Who makes an access: a thread of a block, at a moment of its clock, in the grid's current epoch (grid-wide
// barriers passed).
struct Actor {
  int block;
  int thread;
  int grid_epoch;
  bool previous_over;  // this comes after the launches before
  const VectorClock& clock;
};

// What a warpgroup's product reads: of 128-byte rows from `base` on, 8 a swizzle, the two chunks of 16 bytes of
// `step`.
struct TileRead {
  const void* base;
  int rows;
  int step;
  int first_thread;  // of the warpgroup
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
  // Every thread of the block has met every other: all accesses so far are ordered before all that follow.
  void all_met() { ++meetings_; }

  // Each faults on an address out of range and on an access not ordered by a barrier after another thread's;
  // read also on bytes never written and on those a copy is still under way to.
  void read(const void* p, int64_t bytes, const Actor& who, Where at);
  void write(const void* p, int64_t bytes, const Actor& who, Where at);
  // An asynchronous copy by `who` begins (the bytes may change from now on) and lands.
  void begin_copy(const void* p, int64_t bytes, const Actor& who, Where at);
  void land_copy(const void* p, int64_t bytes, const Actor& who, Where at);
  // Atomics are ordered among themselves, not with plain accesses.
  void atomic(const void* p, int64_t bytes, const Actor& who, Where at);

  // A product of 128 threads begins to read, and is done for one of them; with the last, its bytes may be written.
  // seen: for every thread, its last moment that all 128 have seen; fenced: the last that a proxy fence has
  // followed. The number of the read.
  int begin_tile_read(const TileRead& tile, const Moment* seen, const Moment* fenced, Where at);
  void end_tile_read(int number, const Actor& who);

 private:
  static constexpr int kNobody = -1, kMany = -2;
  struct Cell {
    int16_t writer = kNobody;  // kNobody: never written
    int16_t reader = kNobody;  // since the last write
    int16_t copier = kNobody;  // an asynchronous copy to this byte is under way
    bool by_atomic = false;    // the last write
    Moment written = 0;
    Moment read = 0;  // of kMany: which of readers_ has them
  };
  int64_t offset_of(const void* p, int64_t bytes, const char* verb, Where at) const;
  // Nothing is under way to the byte, and its last write is ordered before what `who` does.
  static bool after_write(const Cell& cell, const Actor& who) {
    return cell.copier == kNobody && (cell.writer < 0 || who.clock.has_seen(cell.writer, cell.written));
  }
  [[noreturn]] static void fault_after_write(const Cell& cell, int64_t offset, const char* verb, Where at);
  void check_read_before(const Cell& cell, int64_t offset, const Actor& who, Where at) const;
  template <class Visit>
  void each_chunk(const TileRead& tile, const Visit& visit) const;
  void check_not_in_tile_read(int64_t offset, int64_t bytes, const char* verb, const Actor& who, Where at);
  void note_read(Cell& cell, const Actor& who);
  void note_write(Cell& cell, const Actor& who, bool by_atomic);
  Moment take_readers();
  Cell split(const Cell& cell);

  uint8_t* base_;
  int64_t bytes_;
  int threads_;
  Moment meetings_ = 1;
  Cells<Cell> cells_;
  // Of cells with several readers: meetings_ at the last read, then the moment of each thread's, 0 for none.
  std::vector<std::unique_ptr<Moment[]>> readers_;
  std::vector<Moment> free_readers_;

  static constexpr int kTileReaders = 128;
  struct TileReads {
    TileRead tile;
    std::array<Moment, kTileReaders> ended{};  // when each of its threads had waited
    int under_way = kTileReaders;              // for so many of them
    Moment meetings = 0;                       // meetings_ when it was done
  };
  struct Chunk {  // 16 bytes
    int under_way = 0;
    std::array<int32_t, 1024 / kTileReaders>
        done{};  // by warpgroup: the last read of it since a write, counted from 1
  };
  std::vector<TileReads> tile_reads_;
  std::vector<Chunk> chunks_;  // none before the first product
};

}  // namespace fastlora::emulator
