// The three products of many adapters, less a level's vectors: each adapter's row is read once from memory and
// meets a few rows of the batch in registers.
//
//   shrink  dots of adapter rows and rows of x, 4 x 4 at a time
//   expand  sums of adapter rows, weighed by u, into rows of y
//   outer   sums of rows of x, weighed by u, into the gradient's rows
//
// The last two are one loop: sums[i] = Σ over s of weight[i][s] · row[s], for a few columns in registers.
//
// V brings Vec, kLanes, kVecs (vectors of a row of sums), zero, set1, fma, add, mul, load_floats, store_floats,
// sum (of lanes), load<dtype>(p), load(p, dtype, count) and store(p, dtype, vec, count) of count <= kLanes
// elements.
//
// Every result is made by one thread in an order fixed by its own adapter's rank and rows. Everything sits in an
// anonymous namespace: each level compiles its own copy with its own flags.
#pragma once

#include <cstring>

#include "parallel.h"
#include "segmented_job.h"

namespace fastlora::cpu {
namespace {

// Walks units of work with a cost each; a thread takes those whose start lies in its range.
struct Share {
  int64_t begin, end, at = 0;
  bool take(int64_t cost) {
    const bool mine = at >= begin && at < end;
    at += cost;
    return mine;
  }
  bool over() const { return at >= end; }
};

template <class Body>
void with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32: return body.template operator()<DType::kFloat32>();
    case DType::kBFloat16: return body.template operator()<DType::kBFloat16>();
    case DType::kFloat16: return body.template operator()<DType::kFloat16>();
  }
}

template <class V>
struct Segmented {
  using Vec = typename V::Vec;
  static constexpr int64_t kLanes = V::kLanes;
  static constexpr int64_t kTile = 4;           // rows of the batch, and rows of an adapter, in registers
  static constexpr int64_t kRows = 8;           // of the batch that are widened to float32 at a time,
  static constexpr int64_t kColumns = 8192;     // and so many of their columns
  static constexpr int64_t kBlock = 512;        // columns of a unit of expand and outer
  static constexpr int64_t kAhead = 1024;       // bytes of a row asked for before their turn
  static constexpr int64_t kWeights = 1 << 18;  // weights laid out at a time

  static int64_t pool_bytes(const SegmentedJob& job) { return dtype_bytes(job.table.dtype); }

  // ---- shrink -------------------------------------------------------------------------------------------------

  struct Shrink {
    const ShrinkArgs& a;
    bool out_of_memory = false;

    static int64_t cost_of(int64_t rows, int64_t cols) { return (rows + 2) * (1 + cols / 256); }

    template <class Body>
    void each_tile(Body&& body) const {
      for (int64_t s = 0; s < a.job.segments; ++s) {
        const Segment segment = a.job.segment(s);
        if (segment.count >= a.many) continue;
        for (int64_t i = 0; i < segment.count; i += kRows) {
          if (!body(segment, segment.begin + i, min64(kRows, segment.count - i))) return;
        }
      }
    }
    int64_t total() const {
      int64_t sum = 0;
      each_tile([&](const Segment& segment, int64_t, int64_t rows) {
        for (int64_t j = 0; j < a.job.table.slices; ++j) {
          sum += ceil_div(a.job.rank(j, segment.slot), kTile) * cost_of(rows, a.side.cols[j]);
        }
        return true;
      });
      return sum;
    }

    // sums[q][i] += rows q of the pool against rows i of x, `count` columns of both.
    template <DType kType, int kQ, int kI>
    static void dots(const void* pool, int64_t stride, int64_t skip, const float* x, int64_t count, float* sums) {
      Vec acc[kQ][kI];
      for (int q = 0; q < kQ; ++q) {
        for (int i = 0; i < kI; ++i) acc[q][i] = V::zero();
      }
      constexpr int64_t bytes = kType == DType::kFloat32 ? 4 : 2;
      const char* base = static_cast<const char*>(pool);
      const auto step = [&](int64_t c, auto&& load) {
        Vec row[kQ];
        const int64_t ahead = c * bytes + kAhead < count * bytes ? kAhead : kAhead + skip;
        for (int q = 0; q < kQ; ++q) {
          const char* here = base + q * stride + c * bytes;
          if (c * bytes % 64 < kLanes * bytes) {
            __builtin_prefetch(
                reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(here) + static_cast<uintptr_t>(ahead)));
          }
          row[q] = load(here);
        }
        for (int i = 0; i < kI; ++i) {
          const Vec value = V::load_floats(x + i * kColumns + c);
          for (int q = 0; q < kQ; ++q) acc[q][i] = V::fma(row[q], value, acc[q][i]);
        }
      };
      int64_t c = 0;
      for (; c + kLanes <= count; c += kLanes) step(c, [](const void* p) { return V::template load<kType>(p); });
      if (c < count) step(c, [&](const void* p) { return V::load(p, kType, count - c); });
      for (int q = 0; q < kQ; ++q) {
        for (int i = 0; i < kI; ++i) sums[q * kRows + i] += V::sum(acc[q][i]);
      }
    }
    template <DType kType, int kQ>
    static void dots_of(int64_t rows, const void* pool, int64_t stride, int64_t skip, const float* x,
                        int64_t count, float* sums) {
      for (int64_t i = 0; i < rows; i += kTile) {
        const float* from = x + i * kColumns;
        switch (min64(kTile, rows - i)) {
          case 1: dots<kType, kQ, 1>(pool, stride, skip, from, count, sums + i); break;
          case 2: dots<kType, kQ, 2>(pool, stride, skip, from, count, sums + i); break;
          case 3: dots<kType, kQ, 3>(pool, stride, skip, from, count, sums + i); break;
          default: dots<kType, kQ, 4>(pool, stride, skip, from, count, sums + i); break;
        }
      }
    }

    // Ranks [q0, q1) of a slice for `rows` rows from `position` on. x: kRows x kColumns floats; sums: a rank's
    // kRows sums, for each of them.
    void unit(const Segment& segment, int64_t j, int64_t position, int64_t rows, int64_t q0, int64_t q1, float* x,
              float* sums) const {
      const SegmentedJob& job = a.job;
      const int64_t cols = a.side.cols[j], bytes = pool_bytes(job), stride = cols * bytes;
      const DType pool_dtype = job.table.dtype;
      std::memset(sums, 0, static_cast<size_t>((q1 - q0) * kRows) * sizeof(float));
      for (int64_t c0 = 0; c0 < cols; c0 += kColumns) {
        const int64_t count = min64(kColumns, cols - c0);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = job.row(position + i) * a.side.ld + a.side.column[j] + c0;
          int64_t c = 0;
          for (; c < count; c += kLanes) {
            V::store_floats(x + i * kColumns + c,
                            V::load(element_ptr(a.wide, at + c, job.dtype), job.dtype, min64(kLanes, count - c)));
          }
        }
        for (int64_t q = q0; q < q1; q += kTile) {
          const char* rows_of_pool =
              static_cast<const char*>(a.side.pool[j]) + ((job.first(j, segment.slot) + q) * cols + c0) * bytes;
          const int64_t skip = (kTile - 1) * stride + (cols - count) * bytes;
          float* to = sums + (q - q0) * kRows;
          with_type(pool_dtype, [&]<DType kType>() {
            switch (min64(kTile, q1 - q)) {
              case 1: dots_of<kType, 1>(rows, rows_of_pool, stride, skip, x, count, to); break;
              case 2: dots_of<kType, 2>(rows, rows_of_pool, stride, skip, x, count, to); break;
              case 3: dots_of<kType, 3>(rows, rows_of_pool, stride, skip, x, count, to); break;
              default: dots_of<kType, 4>(rows, rows_of_pool, stride, skip, x, count, to); break;
            }
          });
        }
      }
      const float scale = a.scaled ? job.scaling(j, segment.slot) : 1.0f;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t q = q0; q < q1; ++q) {
          store_from_float(a.narrow, (position + i) * job.narrow_ld + job.narrow_at[j] + q, job.dtype,
                           scale * sums[(q - q0) * kRows + i]);
        }
      }
    }

    void range(int64_t begin, int64_t end) {
      int64_t widest = 0;
      for (int64_t j = 0; j < a.job.table.slices; ++j) widest = max64(widest, a.job.table.slice[j].width);
      auto* scratch = static_cast<float*>(
          thread_scratch(static_cast<size_t>(kRows * kColumns + round_up(widest, kTile) * kRows) * sizeof(float)));
      if (scratch == nullptr) {
        __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
        return;
      }
      Share share{begin, end};
      each_tile([&](const Segment& segment, int64_t position, int64_t rows) {
        for (int64_t j = 0; j < a.job.table.slices; ++j) {
          const int64_t rank = a.job.rank(j, segment.slot), cost = cost_of(rows, a.side.cols[j]);
          int64_t q0 = rank, q1 = rank;  // those of the thread are neighbours
          for (int64_t q = 0; q < rank; q += kTile) {
            if (!share.take(cost)) continue;
            q0 = min64(q0, q);
            q1 = min64(rank, q + kTile);
          }
          if (q0 < q1) unit(segment, j, position, rows, q0, q1, scratch, scratch + kRows * kColumns);
        }
        return !share.over();
      });
    }
  };

  static Status shrink(const ShrinkArgs& args) {
    Shrink self{args};
    parallel_ranges(
        self.total(), args.job.threads,
        [](void* context, int64_t begin, int64_t end) { static_cast<Shrink*>(context)->range(begin, end); },
        &self);
    return self.out_of_memory ? Status::kOutOfMemory : Status::kOk;
  }

  // ---- weighed sums of rows -----------------------------------------------------------------------------------

  // sums[i] for kI rows and kVecs vectors (or one, of `lanes`) from column c on.
  template <DType kType, int kI, int kVecs, class Rows, class Load>
  static void weigh(const float* weights, int64_t ld, const Rows& rows, int64_t steps, int64_t at, Load&& load,
                    Vec (&acc)[kI][kVecs]) {
    for (int i = 0; i < kI; ++i) {
      for (int v = 0; v < kVecs; ++v) acc[i][v] = V::zero();
    }
    constexpr int64_t bytes = kType == DType::kFloat32 ? 4 : 2;
    for (int64_t s = 0; s < steps; ++s) {
      const char* here = rows[s] + at * bytes;
      for (int64_t line = 0; line < kVecs * kLanes * bytes; line += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(here) +
                                                         static_cast<uintptr_t>(kAhead / 2 + line)));
      }
      Vec value[kVecs];
      for (int v = 0; v < kVecs; ++v) value[v] = load(here + v * kLanes * bytes);
      for (int i = 0; i < kI; ++i) {
        const Vec weight = V::set1(weights[i * ld + s]);
        for (int v = 0; v < kVecs; ++v) acc[i][v] = V::fma(weight, value[v], acc[i][v]);
      }
    }
  }

  // Columns [c0, c1) of kI sums; give(i, column, vector, lanes) takes each.
  template <DType kType, int kI, class Rows, class Give>
  static void weigh_rows(const float* weights, int64_t ld, const Rows& rows, int64_t steps, int64_t c0, int64_t c1,
                         Give&& give) {
    int64_t c = c0;
    for (; c + V::kVecs * kLanes <= c1; c += V::kVecs * kLanes) {
      Vec acc[kI][V::kVecs];
      weigh<kType>(weights, ld, rows, steps, c, [](const void* p) { return V::template load<kType>(p); }, acc);
      for (int i = 0; i < kI; ++i) {
        for (int v = 0; v < V::kVecs; ++v) give(i, c + v * kLanes, acc[i][v], kLanes);
      }
    }
    for (; c < c1; c += kLanes) {
      Vec acc[kI][1];
      const int64_t lanes = min64(kLanes, c1 - c);
      weigh<kType>(weights, ld, rows, steps, c, [&](const void* p) { return V::load(p, kType, lanes); }, acc);
      for (int i = 0; i < kI; ++i) give(i, c, acc[i][0], lanes);
    }
  }
  template <class Rows, class Give>
  static void weigh_all(int64_t count, const float* weights, int64_t ld, const Rows& rows, int64_t steps,
                        int64_t c0, int64_t c1, DType dtype, Give&& give) {
    for (int64_t i0 = 0; i0 < count; i0 += kTile) {
      const auto shifted = [&](int64_t i, int64_t c, Vec sum, int64_t lanes) { give(i0 + i, c, sum, lanes); };
      const float* from = weights + i0 * ld;
      with_type(dtype, [&]<DType kType>() {
        switch (min64(kTile, count - i0)) {
          case 1: weigh_rows<kType, 1>(from, ld, rows, steps, c0, c1, shifted); break;
          case 2: weigh_rows<kType, 2>(from, ld, rows, steps, c0, c1, shifted); break;
          case 3: weigh_rows<kType, 3>(from, ld, rows, steps, c0, c1, shifted); break;
          default: weigh_rows<kType, 4>(from, ld, rows, steps, c0, c1, shifted); break;
        }
      });
    }
  }

  // A unit's weights and the addresses of the rows they are for.
  struct Scratch {
    float* weights;
    const char** rows;
  };
  static bool take(int64_t weights, int64_t rows, Scratch& scratch) {
    auto* base = static_cast<char*>(thread_scratch(static_cast<size_t>(weights * 4 + (rows + 1) * 8)));
    scratch = {reinterpret_cast<float*>(base + rows * 8), reinterpret_cast<const char**>(base)};
    return base != nullptr;
  }

  // ---- expand -------------------------------------------------------------------------------------------------

  struct Expand {
    const ExpandArgs& a;
    bool out_of_memory = false;

    // Slices [j0, j1) that add to the same columns.
    int64_t targets() const { return a.side.disjoint ? a.job.table.slices : 1; }
    int64_t end_of(int64_t target) const { return a.side.disjoint ? target + 1 : a.job.table.slices; }
    int64_t steps_of(int64_t target, int64_t slot) const {
      int64_t steps = 0;
      for (int64_t j = target; j < end_of(target); ++j) steps += a.job.rank(j, slot);
      return steps;
    }
    static int64_t cost_of(int64_t rows, int64_t steps) { return (rows + 2) * (steps + 2); }

    template <class Body>
    void each_unit(Body&& body) const {
      for (int64_t s = 0; s < a.job.segments; ++s) {
        const Segment segment = a.job.segment(s);
        if (segment.count >= a.many) continue;
        for (int64_t target = 0; target < targets(); ++target) {
          const int64_t steps = steps_of(target, segment.slot);
          if (steps == 0) continue;
          for (int64_t c = 0; c < a.side.cols[target]; c += kBlock) {
            if (!body(segment, target, steps, c, min64(a.side.cols[target], c + kBlock))) return;
          }
        }
      }
    }
    int64_t total() const {
      int64_t sum = 0;
      each_unit([&](const Segment& segment, int64_t, int64_t steps, int64_t, int64_t) {
        sum += cost_of(segment.count, steps);
        return true;
      });
      return sum;
    }

    void unit(const Segment& segment, int64_t target, int64_t steps, int64_t c0, int64_t c1) {
      const SegmentedJob& job = a.job;
      const int64_t most = min64(segment.count, max64(kTile, kWeights / steps / kTile * kTile));
      Scratch scratch;
      if (!take(most * (steps + 1), steps, scratch)) {
        __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
        return;
      }
      const int64_t bytes = pool_bytes(job), cols = a.side.cols[target];
      int64_t step = 0;
      for (int64_t j = target; j < end_of(target); ++j) {
        for (int64_t q = 0; q < job.rank(j, segment.slot); ++q) {
          scratch.rows[step++] =
              static_cast<const char*>(a.side.pool[j]) + (job.first(j, segment.slot) + q) * cols * bytes;
        }
      }
      auto* chosen = reinterpret_cast<int32_t*>(scratch.weights + most * steps);
      for (int64_t i = 0; i < segment.count;) {
        int64_t rows = 0;
        for (; rows < most && i < segment.count; ++i) {
          const int64_t position = segment.begin + i, row = job.row(position);
          if (row < a.row_begin || row >= a.row_end) continue;
          chosen[rows] = static_cast<int32_t>(row - a.row_begin);
          prefetch_target((row - a.row_begin) * a.side.ld + a.side.column[target], c0, c1);
          weights_of(segment, target, position, scratch.weights + rows++ * steps);
        }
        weigh_all(rows, scratch.weights, steps, scratch.rows, steps, c0, c1, job.table.dtype,
                  [&](int64_t row, int64_t c, Vec sum, int64_t lanes) {
                    const int64_t at = chosen[row] * a.side.ld + a.side.column[target] + c;
                    if (a.out == nullptr) {
                      V::store(a.addend + at, DType::kFloat32, sum, lanes);
                      return;
                    }
                    void* to = element_ptr(a.out, at, job.dtype);
                    V::store(to, job.dtype, V::add(V::load(to, job.dtype, lanes), sum), lanes);
                  });
      }
    }

    // What is added to comes from memory like everything else, a row of it for a few of an adapter.
    void prefetch_target(int64_t row, int64_t c0, int64_t c1) const {
      if (a.out == nullptr) return;
      const auto* begin = static_cast<const char*>(element_ptr(a.out, row + c0, a.job.dtype));
      const auto* end = static_cast<const char*>(element_ptr(a.out, row + c1, a.job.dtype));
      for (const char* line = begin; line < end; line += 64) __builtin_prefetch(line, 1);
    }

    void weights_of(const Segment& segment, int64_t target, int64_t position, float* to) const {
      for (int64_t j = target; j < end_of(target); ++j) {
        const float scale = a.scaled ? a.job.scaling(j, segment.slot) : 1.0f;
        const int64_t from = position * a.job.narrow_ld + a.job.narrow_at[j];
        for (int64_t q = 0; q < a.job.rank(j, segment.slot); ++q) {
          *to++ = scale * load_as_float(a.narrow, from + q, a.job.dtype);
        }
      }
    }

    void range(int64_t begin, int64_t end) {
      Share share{begin, end};
      each_unit([&](const Segment& segment, int64_t target, int64_t steps, int64_t c0, int64_t c1) {
        if (share.take(cost_of(segment.count, steps))) unit(segment, target, steps, c0, c1);
        return !share.over();
      });
    }
  };

  static Status expand(const ExpandArgs& args) {
    Expand self{args};
    parallel_ranges(
        self.total(), args.job.threads,
        [](void* context, int64_t begin, int64_t end) { static_cast<Expand*>(context)->range(begin, end); },
        &self);
    return self.out_of_memory ? Status::kOutOfMemory : Status::kOk;
  }

  // ---- outer --------------------------------------------------------------------------------------------------

  struct Outer {
    const OuterArgs& a;
    bool out_of_memory = false;

    static int64_t cost_of(int64_t rows, int64_t rank) { return (rows + 2) * (rank + 2); }

    template <class Body>
    void each_unit(Body&& body) const {
      for (int64_t s = 0; s < a.job.segments; ++s) {
        const Segment segment = a.job.segment(s);
        if (segment.count >= a.many) continue;
        for (int64_t j = 0; j < a.job.table.slices; ++j) {
          if (a.job.rank(j, segment.slot) == 0) continue;
          for (int64_t c = 0; c < a.side.cols[j]; c += kBlock) {
            if (!body(segment, j, c, min64(a.side.cols[j], c + kBlock))) return;
          }
        }
      }
    }
    int64_t total() const {
      int64_t sum = 0;
      each_unit([&](const Segment& segment, int64_t j, int64_t, int64_t) {
        sum += cost_of(segment.count, a.job.rank(j, segment.slot));
        return true;
      });
      return sum;
    }

    // Ranks kTile by kTile, rows of the batch all at once: their sums stay in registers.
    void unit(const Segment& segment, int64_t j, int64_t c0, int64_t c1) {
      const SegmentedJob& job = a.job;
      Scratch scratch;
      if (!take(kTile * segment.count, segment.count, scratch)) {
        __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
        return;
      }
      const int64_t bytes = dtype_bytes(job.dtype), rank = job.rank(j, segment.slot);
      const Vec scale = V::set1(a.scaled ? job.scaling(j, segment.slot) : 1.0f);
      for (int64_t i = 0; i < segment.count; ++i) {
        scratch.rows[i] =
            static_cast<const char*>(a.wide) + (job.row(segment.begin + i) * a.side.ld + a.side.column[j]) * bytes;
      }
      for (int64_t q0 = 0; q0 < rank; q0 += kTile) {
        const int64_t ranks = min64(kTile, rank - q0);
        for (int64_t q = 0; q < ranks; ++q) {
          for (int64_t i = 0; i < segment.count; ++i) {
            scratch.weights[q * segment.count + i] = load_as_float(
                a.narrow, (segment.begin + i) * job.narrow_ld + job.narrow_at[j] + q0 + q, job.dtype);
          }
        }
        weigh_all(ranks, scratch.weights, segment.count, scratch.rows, segment.count, c0, c1, job.dtype,
                  [&](int64_t q, int64_t c, Vec sum, int64_t lanes) {
                    const int64_t at = (job.first(j, segment.slot) + q0 + q) * a.side.cols[j] + c;
                    V::store(element_ptr(a.out[j], at, job.table.dtype), job.table.dtype, V::mul(sum, scale),
                             lanes);
                  });
      }
    }

    void range(int64_t begin, int64_t end) {
      Share share{begin, end};
      each_unit([&](const Segment& segment, int64_t j, int64_t c0, int64_t c1) {
        if (share.take(cost_of(segment.count, a.job.rank(j, segment.slot)))) unit(segment, j, c0, c1);
        return !share.over();
      });
    }
  };

  static Status outer(const OuterArgs& args) {
    Outer self{args};
    parallel_ranges(
        self.total(), args.job.threads,
        [](void* context, int64_t begin, int64_t end) { static_cast<Outer*>(context)->range(begin, end); }, &self);
    return self.out_of_memory ? Status::kOutOfMemory : Status::kOk;
  }
};

}  // namespace
}  // namespace fastlora::cpu
