// What the kernels of many adapters in one batch share: how a block finds its rows and their adapter, and how they
// find rows of x and of the pools.
//
// Rows are taken in the order that lora_route gave them. A launch is sized by m and the capacity alone, for the
// segments are known on the device only: the unit (segment i, its j-th tile of `rows` rows) is number
//     first[i] / rows + i + j
// which no two units share, and which grows with i, so that a block finds its segment by a search. Some numbers
// are of no unit; there are at most as many of them as segments, and one.
//
// Nothing read from memory is trusted: an entry that leaves its pool, a slot outside the table and a row outside x
// make no work.
#pragma once

#include "fastlora/segmented_lora.h"
#include "nf4_linear.cuh"

namespace fastlora::cuda {

struct Segments {
  const int32_t* order;     // (m)
  const int32_t* segments;  // (rows, 2): slot, first position; {-1, routed rows} in the end
  int m, rows;
};

// There are fewer than so many units of `rows` rows.
FASTLORA_HOST_DEVICE int unit_limit(const Segments& segments, int rows) {
  return segments.m / rows + segments.rows;
}
// Blocks of a launch for them, each of which goes on with every so many further units: one for every unit where
// few of the slots have rows, for the others are seldom any.
inline int unit_blocks(const Segments& segments, int rows, int blocks_for_each) {
  const int slack = blocks_for_each < 32 ? 1024 / blocks_for_each : 32;
  const int limit = unit_limit(segments, rows), usual = segments.m / rows + slack;
  return limit < usual ? limit : usual;
}

// One slice of the adapters, as one of the products uses it.
struct SliceView {
  const void* pool;  // (pool_rows, width)
  int pool_rows, width;
  int column;   // of x or y, where the slice begins
  int ranks;    // columns that it has in u
  int rank_at;  // the first of them
};

struct Slices {
  SliceView of[kMaxSlices];
  const int32_t* entries;  // (count, capacity, 2)
  const float* scaling;    // (count, capacity); null: 1
  int count, capacity;
  int ranks;  // of u, all slices together
  DType dtype;
  bool vectors;  // rows of all pools are whole 16-byte vectors, at such addresses
};

// Adjacent positions in order that share an adapter.
struct Unit {
  int slot;   // -1: rows without an adapter
  int begin;  // position
  int count;  // 0: nothing to do
};

FASTLORA_DEVICE Words2 load_segment(const Segments& s, int index FASTLORA_AT) {
  return load_global(reinterpret_cast<const Words2*>(s.segments + 2 * index) FASTLORA_HERE);
}

// How many entries of the list satisfy `holds(index, slot, first)`, which those at its begin do. By a whole warp,
// 32 entries at a time.
template <class Holds>
FASTLORA_DEVICE int count_segments(const Segments& s, Holds holds FASTLORA_AT) {
  int found = 0, left = s.rows;
  while (left > 0) {
    const int step = (left + 31) / 32, index = (lane_index() + 1) * step - 1;
    bool held = false;
    if (index < left) {
      const Words2 entry = load_segment(s, found + index FASTLORA_HERE);
      held = holds(found + index, static_cast<int>(entry.w[0]), static_cast<int>(entry.w[1]));
    }
    const int steps = count_bits(ballot(held FASTLORA_HERE));
    found += steps * step;
    left = left - steps * step < step - 1 ? left - steps * step : step - 1;
  }
  return found;
}

// Where segment `index` begins, and where it ends.
struct Span {
  int slot, begin, end;
};
FASTLORA_DEVICE Span segment_span(const Segments& s, int index FASTLORA_AT) {
  const Words2 entry = load_segment(s, index FASTLORA_HERE);
  Span span{static_cast<int>(entry.w[0]), static_cast<int>(entry.w[1]), s.m};
  if (span.slot >= 0 && index + 1 < s.rows) {
    span.end = static_cast<int>(load_segment(s, index + 1 FASTLORA_HERE).w[1]);
  }
  if (span.begin < 0) span.begin = 0;
  if (span.end > s.m) span.end = s.m;
  return span;
}

// Which segment, and which of its tiles of `rows` rows: from its begin on, or at multiples of `rows`.
template <bool kFromBegin>
FASTLORA_DEVICE Unit find_unit(const Segments& s, int number, int rows, Span* whole FASTLORA_AT) {
  const auto begins = [number, rows](int index, int slot, int first) {
    return slot >= 0 && first / rows + index <= number;
  };
  const int found = count_segments(s, begins FASTLORA_HERE);
  // Segment found - 1, or, where that ends before, the rows without an adapter, if its end is the next entry.
  for (int index = found > 0 ? found - 1 : 0; index <= found && index < s.rows; ++index) {
    const Span span = segment_span(s, index FASTLORA_HERE);
    const int tile = number - span.begin / rows - index;
    int begin = kFromBegin ? span.begin + tile * rows : (span.begin / rows + tile) * rows;
    const int next = begin + rows;
    if (begin < span.begin) begin = span.begin;
    if (tile < 0 || begin >= span.end || (index == found && span.slot >= 0)) continue;
    *whole = span;
    return {span.slot, begin, (next < span.end ? next : span.end) - begin};
  }
  return {-1, 0, 0};
}

// No unit is number `unit` or a later one.
FASTLORA_DEVICE bool past_units(const Segments& s, int unit, int rows FASTLORA_AT) {
  if (unit >= unit_limit(s, rows)) return true;
  // Segment i has no unit past number m / rows + i.
  const int segment = unit - s.m / rows - 1;
  return segment >= 0 && static_cast<int>(load_segment(s, segment FASTLORA_HERE).w[0]) < 0;
}

FASTLORA_DEVICE Unit find_tile(const Segments& s, int number, int rows FASTLORA_AT) {
  Span whole;
  return find_unit<true>(s, number, rows, &whole FASTLORA_HERE);
}

// The row of x at a position; -1 where there is none.
FASTLORA_DEVICE int row_at(const Segments& s, int position FASTLORA_AT) {
  const int row = load_global(s.order + position FASTLORA_HERE);
  return row >= 0 && row < s.m ? row : -1;
}

// The rows of a slot in a slice's pool.
struct Adapter {
  int first, rank;
  float scale;
};
FASTLORA_DEVICE Adapter adapter_of(const Slices& slices, int slice, int slot FASTLORA_AT) {
  if (slot < 0 || slot >= slices.capacity) return {0, 0, 0.0f};
  const SliceView& view = slices.of[slice];
  const int64_t cell = static_cast<int64_t>(slice) * slices.capacity + slot;
  const int first = load_global(slices.entries + 2 * cell FASTLORA_HERE);
  int rank = load_global(slices.entries + 2 * cell + 1 FASTLORA_HERE);
  const bool inside = first >= 0 && rank > 0 && rank <= view.pool_rows && first <= view.pool_rows - rank;
  if (!inside) return {0, 0, 0.0f};
  if (rank > view.ranks) rank = view.ranks;
  return {first, rank, slices.scaling == nullptr ? 1.0f : load_global(slices.scaling + cell FASTLORA_HERE)};
}

// Four adjacent ranks of u, which the launch before wrote, as two pairs; those from `valid` on are another's, and
// zero here. `quads`: the address is a multiple of 8.
FASTLORA_DEVICE void load_ranks(const uint16_t* from, int valid, bool quads, uint32_t (&out)[2] FASTLORA_AT) {
  if (quads && valid >= 4) {
    const Words2 two = load_global(reinterpret_cast<const Words2*>(from) FASTLORA_HERE);
    out[0] = two.w[0];
    out[1] = two.w[1];
    return;
  }
  FASTLORA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t low = 2 * i < valid ? load_global(from + 2 * i FASTLORA_HERE) : 0;
    const uint32_t high = 2 * i + 1 < valid ? load_global(from + 2 * i + 1 FASTLORA_HERE) : 0;
    out[i] = low | high << 16;
  }
}

// Slice and block within it, of blocks that are `per` columns or ranks each, slices one after another.
struct SliceBlock {
  int slice, first;
};
template <class Size>
FASTLORA_DEVICE SliceBlock slice_block(const Slices& slices, int block, int per, Size size) {
  int slice = 0;
  for (; slice + 1 < slices.count; ++slice) {
    const int blocks = (size(slices.of[slice]) + per - 1) / per;
    if (block < blocks) break;
    block -= blocks;
  }
  return {slice, block * per};
}

}  // namespace fastlora::cuda
