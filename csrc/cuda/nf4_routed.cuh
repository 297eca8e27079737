// The fused layer where every row of x has an adapter of its own: rows are taken in the order of a routing, so
// that those of one adapter are neighbours in a tile, and the low-rank steps of a tile are those of all adapters
// that it meets, each with the other rows of its right operand zero. W is read, and dequantised, as often as
// without adapters, and results are rounded once.
#pragma once

#include <type_traits>

#include "segmented.cuh"

namespace fastlora::cuda {

// inner is u (or v): (m, slices.ranks), in the order of the routing; factor is not used.
struct RoutedArgs : ProductArgs {
  Segments segments;
  Slices slices;     // forward the b pools, whose slices are columns of y; for the input's gradient the a pools
  bool inner_quads;  // ranks of a slice lie in fours at multiples of 8 bytes
};
template <class Args>
inline constexpr bool kIsRouted = std::is_same_v<Args, RoutedArgs>;

// The row of x that is read for a position, and the row where its result is written, args.m for none.
FASTLORA_DEVICE int source_row(const ProductArgs&, int position) { return position; }
FASTLORA_DEVICE int source_row(const RoutedArgs& args, int position) {
  const int row = row_at(args.segments, position);
  return row < 0 ? 0 : row;
}
FASTLORA_DEVICE int result_row(const ProductArgs&, int position) { return position; }
FASTLORA_DEVICE int result_row(const RoutedArgs& args, int position) {
  const int row = position < args.m ? row_at(args.segments, position) : -1;
  return row < 0 ? args.m : row;
}

// Up to 16 ranks of one adapter, in one slice, and the positions that they are for.
struct LowRankStep {
  int slice, begin, end;
  int pool_row, ranks, rank_at;  // the first rank in the pool; how many there are, 0 for no step; the first in u
  float scale;

  FASTLORA_DEVICE bool meets(int position) const { return begin < position + 8 && end > position; }
};

// All steps of positions [begin, end) and of the slices that meet `columns` columns from `column` on (0: of all),
// one after another. By a whole warp: its lanes look up 32 segments at a time, for what they find depends on three
// loads in a row.
class LowRankWalk {
 public:
  FASTLORA_DEVICE LowRankWalk(const RoutedArgs& args, int begin, int end, int column, int columns)
      : args_(args), begin_(begin), end_(end < args.m ? end : args.m), column_(column), columns_(columns) {
    const int found =
        count_segments(args.segments, [begin](int, int slot, int first) { return slot >= 0 && first <= begin; });
    first_segment_ = found > 0 ? found - 1 : 0;
  }

  FASTLORA_DEVICE LowRankStep next() {
    for (;;) {
      if (done_ < rank_) {
        const LowRankStep step{.slice = slice_,
                               .begin = rows_begin_,
                               .end = rows_end_,
                               .pool_row = pool_row_ + done_,
                               .ranks = rank_ - done_ < 16 ? rank_ - done_ : 16,
                               .rank_at = args_.slices.of[slice_].rank_at + done_,
                               .scale = scale_};
        done_ += 16;
        return step;
      }
      if (at_ + 1 < loaded_) {
        take(++at_);
      } else if (loaded_ == 32) {
        load_batch();
      } else if (next_slice()) {
        segment_ = first_segment_;
        load_batch();
      } else {
        return {};
      }
    }
  }

 private:
  FASTLORA_DEVICE bool next_slice() {
    for (++slice_; slice_ < args_.slices.count; ++slice_) {
      const SliceView& slice = args_.slices.of[slice_];
      if (columns_ == 0) return true;
      if (slice.column < column_ + columns_ && slice.column + slice.width > column_) return true;
    }
    return false;
  }

  // The adapters of the next 32 segments, one a lane.
  FASTLORA_DEVICE void load_batch() {
    const int index = segment_ + lane_index();
    bool inside = false;
    lane_rank_ = 0;
    if (index < args_.segments.rows) {
      const Span span = segment_span(args_.segments, index);
      inside = span.slot >= 0 && span.begin < end_;
      lane_begin_ = span.begin > begin_ ? span.begin : begin_;
      lane_end_ = span.end < end_ ? span.end : end_;
      if (inside && lane_begin_ < lane_end_) {
        const Adapter adapter = adapter_of(args_.slices, slice_, span.slot);
        lane_row_ = adapter.first;
        lane_rank_ = adapter.rank;
        lane_scale_ = adapter.scale;
      }
    }
    const uint32_t lanes = ballot(inside);
    loaded_ = count_bits(lanes & ~(lanes + 1));  // the first ones; those that follow are past the end
    segment_ += 32;
    at_ = -1;
  }

  FASTLORA_DEVICE void take(int lane) {
    const auto of = [&](int mine) { return static_cast<int>(shuffle(static_cast<uint32_t>(mine), lane)); };
    rank_ = of(lane_rank_);
    rows_begin_ = of(lane_begin_);
    rows_end_ = of(lane_end_);
    pool_row_ = of(lane_row_);
    scale_ = float_of(shuffle(bits_of(lane_scale_), lane));
    done_ = 0;
  }

  const RoutedArgs& args_;
  const int begin_, end_, column_, columns_;
  int first_segment_, segment_ = 0;
  int slice_ = -1, loaded_ = 0, at_ = -1;
  int rank_ = 0, done_ = 0, rows_begin_ = 0, rows_end_ = 0, pool_row_ = 0;
  float scale_ = 0.0f;
  int lane_begin_ = 0, lane_end_ = 0, lane_row_ = 0, lane_rank_ = 0;
  float lane_scale_ = 0.0f;
};

// The factor's part in a step's left operands: kCount (2, 4, 8) adjacent columns from `column` of the result on,
// as pairs, of ranks 4 * quad and the next three; times the scale, rounded to D, as s·B is. Any order of ranks
// will do, if u has the same.
template <DType D, int kCount>
FASTLORA_DEVICE void load_factor(const RoutedArgs& args, const LowRankStep& step, int column,
                                 uint32_t (&out)[4][kCount / 2] FASTLORA_AT) {
  const SliceView& slice = args.slices.of[step.slice];
  const int first = column - slice.column;  // may be outside, on either side
  FASTLORA_UNROLL
  for (int q = 0; q < 4; ++q) {
    const int rank = 4 * (lane_index() % 4) + q;
    const bool inside = rank < step.ranks;
    const int64_t from = static_cast<int64_t>(step.pool_row + rank) * slice.width + first;
    if (args.slices.vectors && args.slices.dtype == D && inside && first >= 0 && first + kCount <= slice.width) {
      struct alignas(2 * kCount) Pairs {
        uint32_t w[kCount / 2];
      };
      const Pairs pairs = load_global(
          reinterpret_cast<const Pairs*>(static_cast<const uint16_t*>(slice.pool) + from) FASTLORA_HERE);
      FASTLORA_UNROLL
      for (int i = 0; i < kCount / 2; ++i) {
        const float low = Element<D>::of_half(static_cast<uint16_t>(pairs.w[i]));
        const float high = Element<D>::of_half(static_cast<uint16_t>(pairs.w[i] >> 16));
        out[q][i] = step.scale == 1.0f ? pairs.w[i] : pack_pair<D>(low * step.scale, high * step.scale);
      }
      continue;
    }
    FASTLORA_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      float values[2];
      FASTLORA_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int c = first + 2 * i + j;
        values[j] = inside && c >= 0 && c < slice.width
                        ? load_any(slice.pool, from + 2 * i + j, args.slices.dtype FASTLORA_HERE) * step.scale
                        : 0.0f;
      }
      out[q][i] = pack_pair<D>(values[0], values[1]);
    }
  }
}

// A step's right operand for the 8 positions from `position` on: zero where they are another adapter's.
FASTLORA_DEVICE void adapter_operand(const RoutedArgs& args, const LowRankStep& step, int position,
                                     uint32_t (&b)[2] FASTLORA_AT) {
  const int row = position + lane_index() / 4, rank = 4 * (lane_index() % 4);
  const auto* from = static_cast<const uint16_t*>(args.inner) + static_cast<int64_t>(row) * args.slices.ranks +
                     step.rank_at + rank;
  load_ranks(from, row >= step.begin && row < step.end ? step.ranks - rank : 0, args.inner_quads, b FASTLORA_HERE);
}

}  // namespace fastlora::cuda
