#include "shared_memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace fastlora::emulator {
namespace {

constexpr size_t kSharedAlignment = 1024;  // what swizzled layouts may count on

}  // namespace

SharedMemory::SharedMemory(int64_t bytes, int threads) : bytes_(bytes), threads_(threads), cells_(bytes, 0) {
  const size_t room = (static_cast<size_t>(bytes) + kSharedAlignment) / kSharedAlignment * kSharedAlignment;
  base_ = static_cast<uint8_t*>(std::aligned_alloc(kSharedAlignment, room));
  if (base_ == nullptr) throw std::bad_alloc();
  std::memset(base_, 0xff, room);
}

SharedMemory::~SharedMemory() { std::free(base_); }

int64_t SharedMemory::offset_of(const void* p, int64_t bytes, const char* verb, Where at) const {
  const int64_t offset = reinterpret_cast<intptr_t>(p) - reinterpret_cast<intptr_t>(base_);
  if (offset < 0 || offset + bytes > bytes_) {
    fault(at, std::string(verb) + " " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
                  " of shared memory, which has " + std::to_string(bytes_));
  }
  return offset;
}

void SharedMemory::fault_after_write(const Cell& cell, int64_t offset, const char* verb, Where at) {
  if (cell.copier != kNobody) {
    fault(at, std::string(verb) + " shared byte " + std::to_string(offset) +
                  " while an asynchronous copy of thread " + std::to_string(cell.copier) +
                  " to it is under way: a wait is missing");
  }
  fault(at, std::string(verb) + " shared byte " + std::to_string(offset) + " that thread " +
                std::to_string(cell.writer) + " wrote with no barrier between: a race");
}

void SharedMemory::check_read_before(const Cell& cell, int64_t offset, const Actor& who, Where at) const {
  int reader = kNobody;
  if (cell.reader >= 0 && !who.clock.has_seen(cell.reader, cell.read)) {
    reader = cell.reader;
  } else if (cell.reader == kMany) {
    const Moment* reads = readers_[cell.read].get();
    if (reads[0] == meetings_) {
      for (int t = 0; t < threads_; ++t) {
        if (!who.clock.has_seen(t, reads[1 + t])) reader = t;
      }
    }
  }
  if (reader != kNobody) {
    fault(at, "writes shared byte " + std::to_string(offset) + " that thread " + std::to_string(reader) +
                  " read with no barrier between: a race");
  }
}

Moment SharedMemory::take_readers() {
  const auto size = static_cast<size_t>(threads_) + 1;
  if (free_readers_.empty()) {
    readers_.push_back(std::make_unique<Moment[]>(size));
    return static_cast<Moment>(readers_.size() - 1);
  }
  const Moment index = free_readers_.back();
  free_readers_.pop_back();
  std::memset(readers_[index].get(), 0, size * sizeof(Moment));
  return index;
}

SharedMemory::Cell SharedMemory::split(const Cell& cell) {
  Cell copy = cell;
  if (cell.reader == kMany) {
    copy.read = take_readers();
    std::memcpy(readers_[copy.read].get(), readers_[cell.read].get(),
                (static_cast<size_t>(threads_) + 1) * sizeof(Moment));
  }
  return copy;
}

void SharedMemory::note_read(Cell& cell, const Actor& who) {
  if (cell.reader == kNobody || cell.reader == who.thread) {
    cell.reader = static_cast<int16_t>(who.thread);
    cell.read = who.clock.now();
    return;
  }
  if (cell.reader != kMany) {
    const Moment index = take_readers();
    readers_[index][static_cast<size_t>(1 + cell.reader)] = cell.read;
    cell.reader = kMany;
    cell.read = index;
  }
  Moment* reads = readers_[cell.read].get();
  reads[0] = meetings_;
  reads[1 + who.thread] = who.clock.now();
}

void SharedMemory::note_write(Cell& cell, const Actor& who, bool by_atomic) {
  if (cell.reader == kMany) free_readers_.push_back(cell.read);
  cell.writer = static_cast<int16_t>(who.thread);
  cell.written = who.clock.now();
  cell.reader = kNobody;
  cell.read = 0;
  cell.by_atomic = by_atomic;
}

void SharedMemory::read(const void* p, int64_t bytes, const Actor& who, Where at) {
  cells_.each(
      offset_of(p, bytes, "reads", at), bytes,
      [&](Cell& cell, int64_t i) {
        if (!after_write(cell, who)) fault_after_write(cell, i, "reads", at);
        if (cell.writer == kNobody) {
          fault(at, "reads shared byte " + std::to_string(i) + ", which nothing has written");
        }
        note_read(cell, who);
      },
      [&](const Cell& cell) { return split(cell); });
}

void SharedMemory::write(const void* p, int64_t bytes, const Actor& who, Where at) {
  const int64_t offset = offset_of(p, bytes, "writes", at);
  check_not_in_tile_read(offset, bytes, "writes", who, at);
  cells_.each_alike(
      offset, bytes,
      [&](Cell& cell, int64_t i) {
        if (!after_write(cell, who)) fault_after_write(cell, i, "writes", at);
        check_read_before(cell, i, who, at);
        note_write(cell, who, false);
      },
      [&](const Cell& cell) { return split(cell); });
}

void SharedMemory::begin_copy(const void* p, int64_t bytes, const Actor& who, Where at) {
  const int64_t offset = offset_of(p, bytes, "copies to", at);
  check_not_in_tile_read(offset, bytes, "copies to", who, at);
  cells_.each(
      offset, bytes,
      [&](Cell& cell, int64_t i) {
        if (!after_write(cell, who)) fault_after_write(cell, i, "copies to", at);
        check_read_before(cell, i, who, at);
        cell.copier = static_cast<int16_t>(who.thread);
      },
      [&](const Cell& cell) { return split(cell); });
}

void SharedMemory::land_copy(const void* p, int64_t bytes, const Actor& who, Where at) {
  cells_.each_alike(
      offset_of(p, bytes, "copies to", at), bytes,
      [&](Cell& cell, int64_t) {
        cell.copier = kNobody;
        note_write(cell, who, false);
      },
      [&](const Cell& cell) { return split(cell); });
}

void SharedMemory::atomic(const void* p, int64_t bytes, const Actor& who, Where at) {
  const int64_t offset = offset_of(p, bytes, "updates", at);
  check_not_in_tile_read(offset, bytes, "updates", who, at);
  cells_.each_alike(
      offset, bytes,
      [&](Cell& cell, int64_t i) {
        if (cell.writer == kNobody)
          fault(at, "updates shared byte " + std::to_string(i) + ", which nothing has written");
        if (!cell.by_atomic && !after_write(cell, who)) fault_after_write(cell, i, "updates", at);
        check_read_before(cell, i, who, at);
        note_write(cell, who, true);
      },
      [&](const Cell& cell) { return split(cell); });
}

}  // namespace fastlora::emulator
