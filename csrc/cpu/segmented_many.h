// expand and outer for segments of many rows in bfloat16: blocked products on a level's multiply. Columns go in
// their natural order, kRun of them at a time.
//
//   expand  y rows (A: u)              x  columns  (B: adapter rows)      contraction over ranks
//   outer   adapter rows (A: u transposed)  x  columns  (B: rows of x)    contraction over rows of the batch
#pragma once

#include "gemm_fill.h"
#include "gemm_pack.h"
#include "parallel.h"
#include "segmented_products.h"

namespace fastlora::cpu {
namespace {

template <class L, class V>
struct Many {
  using G = Gemm<L>;
  using T = typename L::T;
  using Vec = typename V::Vec;
  static_assert(G::kPerItem == 2);

  static constexpr int64_t kBlocks = 8;  // of the contraction multiplied at a time
  static constexpr int64_t kRows = 128;  // of C, in expand
  static constexpr int64_t kAhead = 12;  // rows asked for before their turn: a few lines of each are read
  static constexpr int64_t kRunBytes = kBlocks * G::kRunPanels * kTileBytes;

  struct Scratch {
    uint8_t *strips, *panels;
    float* c;
  };
  static bool take(int64_t rows, int64_t runs, Scratch& scratch) {
    const int64_t padded = round_up(rows, G::kStripRows), strips = padded * kBlocks * 64;
    auto* base = static_cast<uint8_t*>(
        thread_scratch(static_cast<size_t>(strips + kRunBytes + padded * runs * G::kRun * 4)));
    scratch = {base, base + strips, reinterpret_cast<float*>(base + strips + kRunBytes)};
    return base != nullptr;
  }

  // Blocks of rows as B panels: row_at(i) is where row i's first column lies, null for a row of zeros; `count`
  // columns of them.
  template <class RowAt>
  static void pack_rows(RowAt&& row_at, DType dtype, int64_t blocks, int64_t count, uint8_t* out) {
    alignas(64) T pair[2][G::kRun];
    uint8_t* to[G::kRunPanels];
    for (int64_t t = 0; t < blocks * 16; ++t) {
      for (int64_t e = 0; e < 2; ++e) {
        const void* from = row_at(2 * t + e);
        if (const void* next = row_at(2 * t + e + kAhead); next != nullptr) {
          for (int64_t line = 0; line < count * dtype_bytes(dtype); line += 64) {
            prefetch(static_cast<const uint8_t*>(next), line);
          }
        }
        if (from == nullptr || count < G::kRun) std::memset(pair[e], 0, sizeof pair[e]);
        if (from != nullptr) L::load_row(from, dtype, count, pair[e]);
      }
      for (int64_t p = 0; p < G::kRunPanels; ++p) {
        const auto place = G::panel_place(p, G::kRunPanels, blocks);
        to[p] = out + place.offset + t / 16 * place.block_stride + t % 16 * 64;
      }
      L::pack_pair_in_order(pair[0], pair[1], to);
    }
  }

  // c (rows, kRun) (+)= strips · panels
  static void multiply(const Scratch& scratch, int64_t rows, int64_t blocks, float* c, bool first) {
    NoFiller none;
    const Visit visit{first ? FromC::kZero : FromC::kLoad, true};
    for (int64_t p = 0, width; p < G::kRunPanels; p += width) {
      width = G::group_width(p, G::kRunPanels);
      for (int64_t i = 0; i < rows; i += G::kStripRows) {
        L::multiply(scratch.strips + i * blocks * 64, scratch.panels + p * blocks * kTileBytes, width, blocks,
                    c + i * G::kRun + p * kPanel, G::kRun, min64(G::kStripRows, rows - i), visit, none);
      }
    }
  }

  template <class Body>
  static void each_lane(int64_t count, Body&& body) {
    for (int64_t c = 0; c < count; c += V::kLanes) body(c, min64(V::kLanes, count - c));
  }

  // ---- expand -------------------------------------------------------------------------------------------------

  struct Expand {
    const ExpandArgs& a;
    bool out_of_memory = false;

    int64_t targets() const { return a.side.disjoint ? a.job.table.slices : 1; }
    int64_t end_of(int64_t target) const { return a.side.disjoint ? target + 1 : a.job.table.slices; }

    template <class Body>
    void each_unit(Body&& body) const {
      for (int64_t s = 0; s < a.job.segments; ++s) {
        const Segment segment = a.job.segment(s);
        if (segment.count < a.many) continue;
        for (int64_t target = 0; target < targets(); ++target) {
          int64_t rank = 0;
          for (int64_t j = target; j < end_of(target); ++j) rank += a.job.rank(j, segment.slot);
          if (rank == 0) continue;
          for (int64_t i = 0; i < segment.count; i += kRows) {
            const int64_t rows = min64(kRows, segment.count - i), cost = (rows + 16) * (rank + 16);
            for (int64_t c = 0; c < a.side.cols[target]; c += G::kRun) {
              if (!body(segment, target, segment.begin + i, rows, c, cost)) return;
            }
          }
        }
      }
    }

    void unit(const Segment& segment, int64_t target, int64_t position, int64_t rows, int64_t c0,
              const Scratch& scratch) const {
      const SegmentedJob& job = a.job;
      const int64_t cols = a.side.cols[target], count = min64(G::kRun, cols - c0);
      const int64_t bytes = dtype_bytes(job.table.dtype);
      bool first = true;
      for (int64_t j = target; j < end_of(target); ++j) {
        const int64_t rank = job.rank(j, segment.slot), all = ceil_div(rank, G::kPerVector);
        for (int64_t b = 0; b < all; b += kBlocks) {
          const int64_t now = min64(kBlocks, all - b), q0 = b * G::kPerVector;
          const char* pool =
              static_cast<const char*>(a.side.pool[j]) + ((job.first(j, segment.slot) + q0) * cols + c0) * bytes;
          pack_rows([&](int64_t q) -> const void* { return q0 + q < rank ? pool + q * cols * bytes : nullptr; },
                    job.table.dtype, now, count, scratch.panels);
          Pack<L>::pack_strips(element_ptr(a.narrow, job.narrow_at[j], job.dtype), job.dtype, job.narrow_ld,
                               position, rows, q0, rank, now, scratch.strips);
          multiply(scratch, rows, now, scratch.c, first);
          first = false;
        }
      }
      const Vec scale = V::set1(a.scaled ? job.scaling(target, segment.slot) : 1.0f);
      for (int64_t i = 0; i < rows; ++i) {
        void* to = element_ptr(a.out, job.row(position + i) * a.side.ld + a.side.column[target] + c0, job.dtype);
        const float* sums = scratch.c + i * G::kRun;
        each_lane(count, [&](int64_t c, int64_t lanes) {
          void* at = element_ptr(to, c, job.dtype);
          V::store(at, job.dtype, V::fma(scale, V::load_floats(sums + c), V::load(at, job.dtype, lanes)), lanes);
        });
      }
    }

    void range(int64_t begin, int64_t end) {
      Scratch scratch;
      if (!take(kRows, 1, scratch)) {
        __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
        return;
      }
      L::begin();
      Share share{begin, end};
      each_unit(
          [&](const Segment& segment, int64_t target, int64_t position, int64_t rows, int64_t c, int64_t cost) {
            if (share.take(cost)) unit(segment, target, position, rows, c, scratch);
            return !share.over();
          });
      L::end();
    }
  };

  // ---- outer --------------------------------------------------------------------------------------------------

  struct Outer {
    const OuterArgs& a;
    bool out_of_memory = false;

    static constexpr int64_t kRanks = 64;  // rows of C
    static constexpr int64_t kRuns = 4;    // of a unit: they share the packing of u

    template <class Body>
    void each_unit(Body&& body) const {
      for (int64_t s = 0; s < a.job.segments; ++s) {
        const Segment segment = a.job.segment(s);
        if (segment.count < a.many) continue;
        for (int64_t j = 0; j < a.job.table.slices; ++j) {
          const int64_t rank = a.job.rank(j, segment.slot);
          for (int64_t q = 0; q < rank; q += kRanks) {
            const int64_t ranks = min64(kRanks, rank - q), cost = (segment.count + 16) * (ranks + 32);
            for (int64_t c = 0; c < a.side.cols[j]; c += kRuns * G::kRun) {
              if (!body(segment, j, q, ranks, c, cost)) return;
            }
          }
        }
      }
    }

    // Ranks [q0, q0 + ranks) of u, `blocks` blocks of rows from `position` on (`left` of them there), transposed.
    void pack_ranks(int64_t j, int64_t q0, int64_t ranks, int64_t position, int64_t left, int64_t blocks,
                    uint8_t* strips) const {
      const SegmentedJob& job = a.job;
      alignas(64) T rows[G::kPerVector][G::kStripRows];
      for (int64_t q = 0; q < ranks; q += G::kStripRows) {
        const int64_t count = min64(G::kStripRows, ranks - q);
        for (int64_t b = 0; b < blocks; ++b) {
          for (int64_t e = 0; e < G::kPerVector; ++e) {
            const int64_t i = b * G::kPerVector + e;
            if (i >= left || count < G::kStripRows) std::memset(rows[e], 0, sizeof rows[e]);
            if (i >= left) continue;
            L::load_row(
                element_ptr(a.narrow, (position + i) * job.narrow_ld + job.narrow_at[j] + q0 + q, job.dtype),
                job.dtype, count, rows[e]);
          }
          L::transpose_ranks(rows, strips + (q * blocks + b * G::kStripRows) * 64);
        }
      }
    }

    void unit(const Segment& segment, int64_t j, int64_t q0, int64_t ranks, int64_t c0,
              const Scratch& scratch) const {
      const SegmentedJob& job = a.job;
      const int64_t cols = a.side.cols[j], runs = min64(kRuns, ceil_div(cols - c0, G::kRun));
      const int64_t bytes = dtype_bytes(job.dtype), all = ceil_div(segment.count, G::kPerVector);
      const int64_t c_floats = round_up(ranks, G::kStripRows) * G::kRun;
      for (int64_t b = 0; b < all; b += kBlocks) {
        const int64_t now = min64(kBlocks, all - b), i0 = b * G::kPerVector, left = segment.count - i0;
        pack_ranks(j, q0, ranks, segment.begin + i0, left, now, scratch.strips);
        for (int64_t run = 0; run < runs; ++run) {
          const int64_t c = c0 + run * G::kRun;
          const char* wide = static_cast<const char*>(a.wide) + (a.side.column[j] + c) * bytes;
          pack_rows(
              [&](int64_t i) -> const void* {
                return i < left ? wide + job.row(segment.begin + i0 + i) * a.side.ld * bytes : nullptr;
              },
              job.dtype, now, min64(G::kRun, cols - c), scratch.panels);
          multiply(scratch, ranks, now, scratch.c + run * c_floats, b == 0);
        }
      }
      const Vec scale = V::set1(a.scaled ? job.scaling(j, segment.slot) : 1.0f);
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t c = c0 + run * G::kRun;
        for (int64_t q = 0; q < ranks; ++q) {
          const float* sums = scratch.c + run * c_floats + q * G::kRun;
          void* to = element_ptr(a.out[j], (job.first(j, segment.slot) + q0 + q) * cols + c, job.table.dtype);
          each_lane(min64(G::kRun, cols - c), [&](int64_t at, int64_t lanes) {
            V::store(element_ptr(to, at, job.table.dtype), job.table.dtype,
                     V::mul(scale, V::load_floats(sums + at)), lanes);
          });
        }
      }
    }

    void range(int64_t begin, int64_t end) {
      Scratch scratch;
      if (!take(kRanks, kRuns, scratch)) {
        __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
        return;
      }
      L::begin();
      Share share{begin, end};
      each_unit([&](const Segment& segment, int64_t j, int64_t q, int64_t ranks, int64_t c, int64_t cost) {
        if (share.take(cost)) unit(segment, j, q, ranks, c, scratch);
        return !share.over();
      });
      L::end();
    }
  };

  template <class Work, class Args>
  static Status run(const Args& args) {
    Work self{args};
    int64_t total = 0;
    self.each_unit([&](const Segment&, int64_t, int64_t, int64_t, int64_t, int64_t cost) {
      total += cost;
      return true;
    });
    parallel_ranges(
        total, args.job.threads,
        [](void* context, int64_t begin, int64_t end) { static_cast<Work*>(context)->range(begin, end); }, &self);
    return self.out_of_memory ? Status::kOutOfMemory : Status::kOk;
  }
};

}  // namespace
}  // namespace fastlora::cpu
