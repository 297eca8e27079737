// Reads of shared memory by products that go on after their instruction: the part of SharedMemory that knows them.
#include <algorithm>
#include <string>

#include "shared_memory.h"

namespace fastlora::emulator {

// Calls visit(offset) for every 16 bytes of the tile's step.
template <class Visit>
void SharedMemory::each_chunk(const TileRead& tile, const Visit& visit) const {
  const int64_t base = static_cast<const uint8_t*>(tile.base) - base_;
  for (int row = 0; row < tile.rows; ++row) {
    for (int half = 0; half < 2; ++half) visit(base + 128 * row + 16 * ((2 * tile.step + half) ^ (row % 8)));
  }
}

int SharedMemory::begin_tile_read(const TileRead& tile, const Moment* seen, const Moment* fenced, Where at) {
  offset_of(tile.base, 128 * static_cast<int64_t>(tile.rows), "multiplies by", at);
  if (chunks_.empty()) chunks_.resize(static_cast<size_t>((bytes_ + 15) / 16));
  each_chunk(tile, [&](int64_t offset) {
    const auto check = [&](const Cell& cell, int64_t i) {
      const std::string verb = "multiplies by shared byte " + std::to_string(i);
      if (cell.copier != kNobody) {
        fault(at, verb + " while an asynchronous copy of thread " + std::to_string(cell.copier) +
                      " to it is under way: a wait is missing");
      }
      if (cell.writer == kNobody) fault(at, verb + ", which nothing has written");
      const std::string writer = " that thread " + std::to_string(cell.writer) + " wrote with no ";
      if (cell.written > seen[cell.writer]) fault(at, verb + writer + "barrier between: a race");
      if (cell.written > fenced[cell.writer]) fault(at, verb + writer + "proxy fence before the barrier between");
    };
    cells_.each(
        offset, 16,
        [&](const Cell& cell, int64_t i) {
          const bool good =
              cell.copier == kNobody && cell.writer != kNobody && cell.written <= fenced[cell.writer];
          if (!good) check(cell, i);
        },
        [&](const Cell& cell) { return split(cell); });
    ++chunks_[static_cast<size_t>(offset / 16)].under_way;
  });
  tile_reads_.push_back({.tile = tile});
  return static_cast<int>(tile_reads_.size() - 1);
}

void SharedMemory::end_tile_read(int number, const Actor& who) {
  TileReads& read = tile_reads_[static_cast<size_t>(number)];
  read.ended[static_cast<size_t>(who.thread - read.tile.first_thread)] = who.clock.now();
  if (--read.under_way != 0) return;
  read.meetings = meetings_;
  each_chunk(read.tile, [&](int64_t offset) {
    Chunk& chunk = chunks_[static_cast<size_t>(offset / 16)];
    --chunk.under_way;
    chunk.done[static_cast<size_t>(read.tile.first_thread / kTileReaders)] = number + 1;
  });
}

void SharedMemory::check_not_in_tile_read(int64_t offset, int64_t bytes, const char* verb, const Actor& who,
                                          Where at) {
  if (chunks_.empty()) return;
  for (int64_t c = offset / 16; c <= (offset + bytes - 1) / 16; ++c) {
    Chunk& chunk = chunks_[static_cast<size_t>(c)];
    if (chunk.under_way != 0) {
      fault(at, std::string(verb) + " shared byte " + std::to_string(std::max(offset, 16 * c)) +
                    " before all of a warpgroup have waited for a product that reads it");
    }
    for (int32_t& number : chunk.done) {
      if (number == 0) continue;
      const TileReads& read = tile_reads_[static_cast<size_t>(number - 1)];
      for (int i = 0; i < kTileReaders && read.meetings == meetings_; ++i) {
        if (who.clock.has_seen(read.tile.first_thread + i, read.ended[static_cast<size_t>(i)])) continue;
        fault(at, std::string(verb) + " shared byte " + std::to_string(std::max(offset, 16 * c)) +
                      " that a product of thread " + std::to_string(read.tile.first_thread + i) +
                      " read with no barrier between: a race");
      }
      number = 0;
    }
  }
}

}  // namespace fastlora::emulator
