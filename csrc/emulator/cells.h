// What is known of every byte of a memory. Most accesses are of whole words of four bytes, so that a word has one
// cell for as long as its bytes share their history, and four once they do not.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace fastlora::emulator {

template <class Cell>
class Cells {
 public:
  // Of `bytes` bytes, the first of which lies `phase` bytes past a multiple of four.
  Cells(int64_t bytes, int64_t phase) : phase_(phase), words_(static_cast<size_t>((bytes + phase + 3) / 4)) {}

  // visit(cell, offset) of every cell in `bytes` bytes at `offset`; split(cell) makes another cell with its
  // history.
  template <class Visit, class Split>
  void each(int64_t offset, int64_t bytes, const Visit& visit, const Split& split) {
    const int64_t end = offset + bytes;
    for (int64_t i = offset; i < end;) {
      Word& word = words_[static_cast<size_t>((i + phase_) / 4)];
      const bool whole = (i + phase_) % 4 == 0 && end - i >= 4;
      if (whole && word.apart < 0) {
        visit(word.cell, i);
        i += 4;
        continue;
      }
      if (word.apart < 0) take_apart(word, split);
      visit(apart_[static_cast<size_t>(word.apart)][static_cast<size_t>((i + phase_) % 4)], i);
      ++i;
    }
  }
  // The same, where the visit leaves one history in every cell that it sees.
  template <class Visit, class Split>
  void each_alike(int64_t offset, int64_t bytes, const Visit& visit, const Split& split) {
    each(offset, bytes, visit, split);
    if (free_.size() == apart_.size()) return;
    for (int64_t i = offset + (4 - (offset + phase_) % 4) % 4; i + 4 <= offset + bytes; i += 4) {
      Word& word = words_[static_cast<size_t>((i + phase_) / 4)];
      if (word.apart < 0) continue;
      word.cell = apart_[static_cast<size_t>(word.apart)][0];
      free_.push_back(word.apart);
      word.apart = -1;
    }
  }

 private:
  struct Word {
    Cell cell;
    int32_t apart = -1;  // where in apart_ the cells of its bytes are
  };

  template <class Split>
  void take_apart(Word& word, const Split& split) {
    if (free_.empty()) {
      free_.push_back(static_cast<int32_t>(apart_.size()));
      apart_.emplace_back();
    }
    word.apart = free_.back();
    free_.pop_back();
    auto& bytes = apart_[static_cast<size_t>(word.apart)];
    bytes[0] = word.cell;
    for (size_t i = 1; i < 4; ++i) bytes[i] = split(word.cell);
  }

  int64_t phase_;
  std::vector<Word> words_;
  std::vector<std::array<Cell, 4>> apart_;
  std::vector<int32_t> free_;  // of apart_
};

}  // namespace fastlora::emulator
