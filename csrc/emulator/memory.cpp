#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace fastlora::emulator {
namespace {

constexpr size_t kSharedAlignment = 1024;  // what swizzled layouts may count on

std::string bytes_at(int64_t offset, int64_t bytes) {
  return std::to_string(bytes) + " bytes at offset " + std::to_string(offset);
}

}  // namespace

// ---- shared -------------------------------------------------------------------------------------------------

SharedMemory::SharedMemory(int64_t bytes, int threads)
    : bytes_(bytes),
      threads_(threads),
      cells_(static_cast<size_t>(bytes)),
      many_reads_(static_cast<size_t>((bytes + 3) / 4)) {
  const size_t room = (static_cast<size_t>(bytes) + kSharedAlignment) / kSharedAlignment * kSharedAlignment;
  base_ = static_cast<uint8_t*>(std::aligned_alloc(kSharedAlignment, room));
  if (base_ == nullptr) throw std::bad_alloc();
  std::memset(base_, 0xff, room);
}

SharedMemory::~SharedMemory() { std::free(base_); }

int64_t SharedMemory::offset_of(const void* p, int64_t bytes, const char* verb, Where at) const {
  const int64_t offset = reinterpret_cast<intptr_t>(p) - reinterpret_cast<intptr_t>(base_);
  if (offset < 0 || offset + bytes > bytes_) {
    fault(at, std::string(verb) + " " + bytes_at(offset, bytes) + " of shared memory, which has " +
                  std::to_string(bytes_));
  }
  return offset;
}

void SharedMemory::check_written_before(const Cell& cell, int64_t offset, const Actor& who, const char* verb,
                                        Where at) const {
  if (cell.copier != kNobody) {
    fault(at, std::string(verb) + " shared byte " + std::to_string(offset) +
                  " while an asynchronous copy of thread " + std::to_string(cell.copier) +
                  " to it is under way: a wait is missing");
  }
  if (cell.writer >= 0 && cell.writer != who.thread && !who.clock.has_seen(cell.writer, cell.written)) {
    fault(at, std::string(verb) + " shared byte " + std::to_string(offset) + " that thread " +
                  std::to_string(cell.writer) + " wrote with no barrier between: a race");
  }
}

void SharedMemory::check_read_before(const Cell& cell, int64_t offset, const Actor& who, Where at) const {
  int reader = kNobody;
  if (cell.reader >= 0 && cell.reader != who.thread && !who.clock.has_seen(cell.reader, cell.read)) {
    reader = cell.reader;
  } else if (cell.reader == kMany) {
    const Moment* reads = many_reads_[static_cast<size_t>(offset / 4)].get();
    for (int t = 0; t < threads_; ++t) {
      if (t != who.thread && reads[t] != 0 && !who.clock.has_seen(t, reads[t])) reader = t;
    }
  }
  if (reader != kNobody) {
    fault(at, "writes shared byte " + std::to_string(offset) + " that thread " + std::to_string(reader) +
                  " read with no barrier between: a race");
  }
}

void SharedMemory::read(const void* p, int64_t bytes, const Actor& who, Where at) {
  const int64_t offset = offset_of(p, bytes, "reads", at);
  for (int64_t i = offset; i < offset + bytes; ++i) {
    Cell& cell = cells_[static_cast<size_t>(i)];
    check_written_before(cell, i, who, "reads", at);
    if (cell.writer == kNobody) {
      fault(at, "reads shared byte " + std::to_string(i) + ", which nothing has written");
    }
    if (cell.reader == kNobody || cell.reader == who.thread) {
      cell.reader = static_cast<int16_t>(who.thread);
      cell.read = who.clock.now();
      continue;
    }
    auto& reads = many_reads_[static_cast<size_t>(i / 4)];
    if (reads == nullptr) reads = std::make_unique<Moment[]>(static_cast<size_t>(threads_));
    if (cell.reader != kMany) {
      reads[static_cast<size_t>(cell.reader)] = cell.read;
      cell.reader = kMany;
    }
    reads[static_cast<size_t>(who.thread)] = who.clock.now();
  }
}

void SharedMemory::note_write(Cell& cell, const Actor& who, bool by_atomic) {
  cell.writer = static_cast<int16_t>(who.thread);
  cell.written = who.clock.now();
  cell.reader = kNobody;
  cell.by_atomic = by_atomic;
}

void SharedMemory::write(const void* p, int64_t bytes, const Actor& who, Where at) {
  const int64_t offset = offset_of(p, bytes, "writes", at);
  for (int64_t i = offset; i < offset + bytes; ++i) {
    Cell& cell = cells_[static_cast<size_t>(i)];
    check_written_before(cell, i, who, "writes", at);
    check_read_before(cell, i, who, at);
    note_write(cell, who, false);
  }
}

void SharedMemory::begin_copy(const void* p, int64_t bytes, const Actor& who, Where at) {
  const int64_t offset = offset_of(p, bytes, "copies to", at);
  for (int64_t i = offset; i < offset + bytes; ++i) {
    Cell& cell = cells_[static_cast<size_t>(i)];
    check_written_before(cell, i, who, "copies to", at);
    check_read_before(cell, i, who, at);
    cell.copier = static_cast<int16_t>(who.thread);
  }
}

void SharedMemory::land_copy(const void* p, int64_t bytes, const Actor& who, Where at) {
  const int64_t offset = offset_of(p, bytes, "copies to", at);
  for (int64_t i = offset; i < offset + bytes; ++i) {
    Cell& cell = cells_[static_cast<size_t>(i)];
    cell.copier = kNobody;
    note_write(cell, who, false);
  }
}

void SharedMemory::atomic(const void* p, int64_t bytes, const Actor& who, Where at) {
  const int64_t offset = offset_of(p, bytes, "updates", at);
  for (int64_t i = offset; i < offset + bytes; ++i) {
    Cell& cell = cells_[static_cast<size_t>(i)];
    if (cell.writer == kNobody)
      fault(at, "updates shared byte " + std::to_string(i) + ", which nothing has written");
    if (!cell.by_atomic) check_written_before(cell, i, who, "updates", at);
    check_read_before(cell, i, who, at);
    note_write(cell, who, true);
  }
}

// ---- global -------------------------------------------------------------------------------------------------

void GlobalMemory::add(const void* base, int64_t bytes, bool writable, const std::string& name) {
  const auto* first = static_cast<const uint8_t*>(base);
  buffers_[first] = {first, bytes, writable, name, {}};
}

void GlobalMemory::remove(const void* base) { buffers_.erase(static_cast<const uint8_t*>(base)); }

GlobalMemory::Buffer& GlobalMemory::find(const void* p, int64_t bytes, const char* verb, Where at) {
  const auto* byte = static_cast<const uint8_t*>(p);
  auto after = buffers_.upper_bound(byte);
  if (after != buffers_.begin()) {
    Buffer& buffer = std::prev(after)->second;
    const int64_t offset = byte - buffer.base;
    if (offset + bytes <= buffer.bytes) return buffer;
    if (offset < buffer.bytes + 4096) {
      fault(at, std::string(verb) + " " + bytes_at(offset, bytes) + " of global buffer " + buffer.name +
                    ", which has " + std::to_string(buffer.bytes));
    }
  }
  if (after != buffers_.end() && after->second.base - byte < 4096) {
    fault(at, std::string(verb) + " " + bytes_at(byte - after->second.base, bytes) + " of global buffer " +
                  after->second.name);
  }
  fault(at, std::string(verb) + " " + std::to_string(bytes) + " bytes of global memory outside every buffer");
}

GlobalMemory::Cell& GlobalMemory::cell_of(Buffer& buffer, const uint8_t* byte) {
  if (buffer.cells.empty()) buffer.cells.resize(static_cast<size_t>(buffer.bytes));
  Cell& cell = buffer.cells[static_cast<size_t>(byte - buffer.base)];
  if (cell.launch != launch_) {
    cell = {};
    cell.launch = launch_;
  }
  return cell;
}

bool GlobalMemory::write_ordered(const Cell& cell, const Actor& who) {
  if (cell.write_block < 0 || cell.write_epoch != who.grid_epoch) return true;
  return cell.write_block == who.block &&
         (cell.write_thread == who.thread || who.clock.has_seen(cell.write_thread, cell.written));
}

bool GlobalMemory::read_ordered(const Cell& cell, const Actor& who) {
  if (cell.read_block == -1 || cell.read_epoch != who.grid_epoch) return true;
  return cell.read_block == who.block &&
         (cell.read_thread == who.thread || who.clock.has_seen(cell.read_thread, cell.read));
}

void GlobalMemory::note_write(Cell& cell, const Actor& who, bool by_atomic) {
  cell.write_block = who.block;
  cell.write_thread = static_cast<int16_t>(who.thread);
  cell.write_epoch = who.grid_epoch;
  cell.written = who.clock.now();
  cell.by_atomic = by_atomic;
}

void GlobalMemory::read(const void* p, int64_t bytes, const Actor& who, Where at) {
  Buffer& buffer = find(p, bytes, "reads", at);
  if (!buffer.writable) return;  // nothing to race with
  const auto* first = static_cast<const uint8_t*>(p);
  for (const uint8_t* byte = first; byte < first + bytes; ++byte) {
    Cell& cell = cell_of(buffer, byte);
    if (!write_ordered(cell, who)) {
      fault(at, "reads byte " + std::to_string(byte - buffer.base) + " of global buffer " + buffer.name +
                    " that thread " + std::to_string(cell.write_thread) + " of block " +
                    std::to_string(cell.write_block) + " wrote with no barrier between: a race");
    }
    if (cell.read_epoch == who.grid_epoch && cell.read_block != -1 && cell.read_block != who.block) {
      cell.read_block = -2;
    } else {
      cell.read_block = who.block;
    }
    cell.read_thread = static_cast<int16_t>(who.thread);
    cell.read_epoch = who.grid_epoch;
    cell.read = who.clock.now();
  }
}

void GlobalMemory::write(const void* p, int64_t bytes, const Actor& who, Where at) {
  Buffer& buffer = find(p, bytes, "writes", at);
  if (!buffer.writable) fault(at, "writes global buffer " + buffer.name + ", an input");
  const auto* first = static_cast<const uint8_t*>(p);
  for (const uint8_t* byte = first; byte < first + bytes; ++byte) {
    Cell& cell = cell_of(buffer, byte);
    const auto place = [&] {
      return "byte " + std::to_string(byte - buffer.base) + " of global buffer " + buffer.name;
    };
    if (!write_ordered(cell, who)) {
      fault(at, "writes " + place() + " that thread " + std::to_string(cell.write_thread) + " of block " +
                    std::to_string(cell.write_block) + " wrote with no barrier between: a race");
    }
    if (!read_ordered(cell, who)) {
      fault(at, "writes " + place() + " that another thread read with no barrier between: a race");
    }
    note_write(cell, who, false);
    cell.read_block = -1;
  }
}

void GlobalMemory::atomic(const void* p, int64_t bytes, const Actor& who, Where at) {
  Buffer& buffer = find(p, bytes, "updates", at);
  if (!buffer.writable) fault(at, "updates global buffer " + buffer.name + ", an input");
  const auto* first = static_cast<const uint8_t*>(p);
  for (const uint8_t* byte = first; byte < first + bytes; ++byte) {
    Cell& cell = cell_of(buffer, byte);
    if (!cell.by_atomic && !write_ordered(cell, who)) {
      fault(at, "updates byte " + std::to_string(byte - buffer.base) + " of global buffer " + buffer.name +
                    " that another thread wrote with no barrier between: a race");
    }
    note_write(cell, who, true);
  }
}

}  // namespace fastlora::emulator
