#include "global_memory.h"

#include <iterator>

namespace fastlora::emulator {
namespace {

std::string bytes_at(int64_t offset, int64_t bytes) {
  return std::to_string(bytes) + " bytes at offset " + std::to_string(offset);
}

std::string place(int64_t offset, const std::string& buffer) {
  return "byte " + std::to_string(offset) + " of global buffer " + buffer;
}

constexpr auto kSame = [](const auto& cell) { return cell; };

}  // namespace

void GlobalMemory::add(const void* base, int64_t bytes, bool writable, const std::string& name) {
  const auto* first = static_cast<const uint8_t*>(base);
  remove(base);
  // What cannot be written has nothing to race with.
  Cells<Cell> cells(writable ? bytes : 0, static_cast<int64_t>(reinterpret_cast<uintptr_t>(base) % 4));
  buffers_.emplace(first, Buffer{first, bytes, writable, name, std::move(cells)});
}

void GlobalMemory::remove(const void* base) {
  buffers_.erase(static_cast<const uint8_t*>(base));
  last_ = nullptr;
}

GlobalMemory::Buffer& GlobalMemory::find(const void* p, int64_t bytes, const char* verb, Where at) {
  const auto* byte = static_cast<const uint8_t*>(p);
  if (last_ != nullptr && byte >= last_->base && byte - last_->base + bytes <= last_->bytes) return *last_;
  auto after = buffers_.upper_bound(byte);
  if (after != buffers_.begin()) {
    Buffer& buffer = std::prev(after)->second;
    const int64_t offset = byte - buffer.base;
    if (offset + bytes <= buffer.bytes) {
      const bool alone = after == buffers_.end() || after->first >= buffer.base + buffer.bytes;
      last_ = alone ? &buffer : nullptr;
      return buffer;
    }
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

GlobalMemory::Buffer& GlobalMemory::find_writable(const void* p, int64_t bytes, const char* verb, Where at) {
  Buffer& buffer = find(p, bytes, verb, at);
  if (!buffer.writable) fault(at, std::string(verb) + " global buffer " + buffer.name + ", an input");
  return buffer;
}

bool GlobalMemory::write_ordered(const Cell& cell, const Actor& who) const {
  if (cell.write_launch != launch_ || cell.write_epoch != who.grid_epoch) return true;
  return cell.write_block == who.block && who.clock.has_seen(cell.write_thread, cell.written);
}

bool GlobalMemory::read_ordered(const Cell& cell, const Actor& who) const {
  if (cell.read_launch != launch_ || cell.read_block == kNobody || cell.read_epoch != who.grid_epoch) return true;
  return cell.read_block == who.block && who.clock.has_seen(cell.read_thread, cell.read);
}

void GlobalMemory::check_previous(const Cell& cell, bool writes, int64_t offset, const Buffer& buffer,
                                  const char* verb, Where at) const {
  const auto under_way = [&](int32_t launch) { return launch >= oldest_ && launch < launch_; };
  const bool written = under_way(cell.write_launch);
  if (written || (writes && under_way(cell.read_launch))) {
    fault(at, std::string(verb) + " " + place(offset, buffer.name) + ", which an earlier launch " +
                  (written ? "writes" : "reads") + ", before wait_for_previous_launch");
  }
}

void GlobalMemory::note_read(Cell& cell, const Actor& who) const {
  const bool read_in_this_epoch =
      cell.read_launch == launch_ && cell.read_block != kNobody && cell.read_epoch == who.grid_epoch;
  cell.read_block = read_in_this_epoch && cell.read_block != who.block ? kMany : who.block;
  cell.read_launch = launch_;
  cell.read_thread = static_cast<int16_t>(who.thread);
  cell.read_epoch = who.grid_epoch;
  cell.read = who.clock.now();
}

void GlobalMemory::note_write(Cell& cell, const Actor& who, bool by_atomic) const {
  cell.write_launch = launch_;
  cell.write_block = who.block;
  cell.write_thread = static_cast<int16_t>(who.thread);
  cell.write_epoch = who.grid_epoch;
  cell.written = who.clock.now();
  cell.by_atomic = by_atomic;
}

void GlobalMemory::read(const void* p, int64_t bytes, const Actor& who, Where at) {
  Buffer& buffer = find(p, bytes, "reads", at);
  if (!buffer.writable) return;
  buffer.cells.each(
      static_cast<const uint8_t*>(p) - buffer.base, bytes,
      [&](Cell& cell, int64_t i) {
        if (!who.previous_over) check_previous(cell, false, i, buffer, "reads", at);
        if (!write_ordered(cell, who)) {
          fault(at, "reads " + place(i, buffer.name) + " that thread " + std::to_string(cell.write_thread) +
                        " of block " + std::to_string(cell.write_block) +
                        " wrote with no barrier between: a race");
        }
        note_read(cell, who);
      },
      kSame);
}

void GlobalMemory::write(const void* p, int64_t bytes, const Actor& who, Where at) {
  Buffer& buffer = find_writable(p, bytes, "writes", at);
  buffer.cells.each_alike(
      static_cast<const uint8_t*>(p) - buffer.base, bytes,
      [&](Cell& cell, int64_t i) {
        if (!who.previous_over) check_previous(cell, true, i, buffer, "writes", at);
        if (!write_ordered(cell, who)) {
          fault(at, "writes " + place(i, buffer.name) + " that thread " + std::to_string(cell.write_thread) +
                        " of block " + std::to_string(cell.write_block) +
                        " wrote with no barrier between: a race");
        }
        if (!read_ordered(cell, who)) {
          fault(at,
                "writes " + place(i, buffer.name) + " that another thread read with no barrier between: a race");
        }
        note_write(cell, who, false);
        cell.read_block = kNobody;
      },
      kSame);
}

void GlobalMemory::atomic(const void* p, int64_t bytes, const Actor& who, Where at) {
  Buffer& buffer = find_writable(p, bytes, "updates", at);
  buffer.cells.each(
      static_cast<const uint8_t*>(p) - buffer.base, bytes,
      [&](Cell& cell, int64_t i) {
        if (!who.previous_over) check_previous(cell, true, i, buffer, "updates", at);
        const bool after_atomic = cell.write_launch == launch_ && cell.by_atomic;
        if (!after_atomic && !write_ordered(cell, who)) {
          fault(at,
                "updates " + place(i, buffer.name) + " that another thread wrote with no barrier between: a race");
        }
        note_write(cell, who, true);
      },
      kSame);
}

}  // namespace fastlora::emulator
