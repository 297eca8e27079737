// The global memory that a launch may touch, known by address and length and watched within one launch; and across
// launches that overlap, in buffers that stay registered.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "cells.h"
#include "shared_memory.h"

namespace fastlora::emulator {

// Buffers of tests, registered one by one; anything else is out of bounds.
class GlobalMemory {
 public:
  void add(const void* base, int64_t bytes, bool writable, const std::string& name);
  void remove(const void* base);
  void begin_launch(bool overlaps) {
    ++launch_;
    if (!overlaps) oldest_ = launch_;
  }

  void read(const void* p, int64_t bytes, const Actor& who, Where at);
  void write(const void* p, int64_t bytes, const Actor& who, Where at);
  void atomic(const void* p, int64_t bytes, const Actor& who, Where at);

 private:
  struct Cell {
    int32_t write_launch = 0, read_launch = 0;       // what else is known holds for these alone
    int32_t write_block = -1, read_block = kNobody;  // kMany: several blocks have read it
    int16_t write_thread = 0, read_thread = 0;
    int32_t write_epoch = 0, read_epoch = 0;
    Moment written = 0, read = 0;
    bool by_atomic = false;
  };
  static constexpr int kNobody = -1, kMany = -2;
  struct Buffer {
    const uint8_t* base;
    int64_t bytes;
    bool writable;
    std::string name;
    Cells<Cell> cells;
  };
  // Whether the last write to a byte, or the last read of it, is ordered before what `who` does now.
  bool write_ordered(const Cell& cell, const Actor& who) const;
  bool read_ordered(const Cell& cell, const Actor& who) const;
  // Faults if a launch that may be under way still has written the byte, or `verb` is not to read and it has read
  // it.
  void check_previous(const Cell& cell, bool writes, int64_t offset, const Buffer& buffer, const char* verb,
                      Where at) const;
  void note_read(Cell& cell, const Actor& who) const;
  void note_write(Cell& cell, const Actor& who, bool by_atomic) const;
  Buffer& find(const void* p, int64_t bytes, const char* verb, Where at);
  Buffer& find_writable(const void* p, int64_t bytes, const char* verb, Where at);

  std::map<const uint8_t*, Buffer> buffers_;
  Buffer* last_ = nullptr;  // that was found
  int32_t launch_ = 0;
  int32_t oldest_ = 1;  // of the launches that may be under way
};

}  // namespace fastlora::emulator
