// How a call is cut into units of work, and how one thread's scratch is laid out.
#pragma once

#include "gemm_layout.h"

namespace fastlora::cpu {
namespace {

// Units of work are (row block, strip or run) in row-block order. One costs its rows and, whatever their number,
// the dequantising of its weights, about as much as kFillRows rows: a thread's share is cut by cost, because the
// last row block may be short. The unit at position `at` of total_cost.
constexpr int64_t kFillRows = 12;

inline int64_t total_cost(int64_t m, int64_t row_block, int64_t per_block) {
  return (m + ceil_div(m, row_block) * kFillRows) * per_block;
}

inline int64_t unit_at(int64_t at, int64_t m, int64_t row_block, int64_t per_block) {
  const int64_t full = (row_block + kFillRows) * per_block, block = at / full;
  const int64_t rows = min64(row_block, m - block * row_block);
  return block * per_block + (rows > 0 ? (at - block * full) / (rows + kFillRows) : 0);
}

// How one thread's scratch is laid out; every size is bounded whatever the shape.
struct Plan {
  int64_t row_block;     // rows of x (dy) packed at a time
  int64_t blocks;        // 64-byte blocks of the whole contraction
  int64_t chunk_blocks;  // of them packed at a time
  int64_t chunks;
  int64_t rank_blocks;   // blocks of the low-rank extension
  int64_t rank_chunk;    // of them packed at a time
  int64_t group_blocks;  // the same of the weight's offsets
  int64_t group_chunk;
  int64_t units_per_c;  // strips (runs) whose C is kept while the chunks go by
};

template <class L>
Plan make_plan(int64_t m, int64_t contraction, int64_t step_blocks, int64_t r, int64_t groups, int64_t rows,
               int64_t row_step, int64_t c_bytes_per_row, int64_t packed_bytes = L::kPackedBytes) {
  constexpr int64_t kPerVector = Gemm<L>::kPerVector;
  Plan plan;
  plan.rank_blocks = ceil_div(r, kPerVector);
  plan.group_blocks = ceil_div(groups, kPerVector);
  plan.blocks = round_up(ceil_div(contraction, kPerVector), step_blocks);
  // A short contraction leaves room for more rows, and more rows share one dequantising.
  const int64_t room = packed_bytes / (64 * max64(plan.blocks, 1)) / row_step * row_step;
  const int64_t most_rows = max64(rows, min64(room, 2 * rows));
  plan.row_block = round_up(ceil_div(m, ceil_div(m, most_rows)), row_step);
  while (plan.row_block > row_step &&
         max64(plan.rank_blocks, plan.group_blocks) * 64 * plan.row_block > packed_bytes) {
    plan.row_block = round_up(plan.row_block / 2, row_step);
  }
  plan.rank_chunk = min64(plan.rank_blocks, packed_bytes / (plan.row_block * 64));
  plan.group_chunk = min64(plan.group_blocks, packed_bytes / (plan.row_block * 64));
  const int64_t most = max64(1, packed_bytes / (plan.row_block * 64) / step_blocks);
  const int64_t steps = max64(1, plan.blocks / step_blocks);
  plan.chunks = ceil_div(steps, most);
  plan.chunk_blocks = ceil_div(steps, plan.chunks) * step_blocks;
  plan.chunks = max64(1, ceil_div(plan.blocks, plan.chunk_blocks));
  plan.units_per_c = plan.chunks == 1 ? 1 : max64(1, L::kAccumulatorBytes / (plan.row_block * c_bytes_per_row));
  return plan;
}

}  // namespace
}  // namespace fastlora::cpu
