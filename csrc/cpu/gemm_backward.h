// out (m, src.k) = dy·src + v·ext + per_group of each column's group.
#pragma once

#include "gemm_fill.h"
#include "gemm_pack.h"
#include "gemm_plan.h"
#include "parallel.h"

namespace fastlora::cpu {
namespace {

template <class L, class Source, class Beside = NothingBeside>
struct Backward {
  const void* dy;  // (m, n), dtype
  int64_t m, n, k;
  DType dtype;
  Source source;                    // Nf4Weight or DenseRows, (n, k)
  const void* v;                    // (m, r), dtype
  DenseRows ext;                    // (r, k)
  void* out;                        // (m, k), dtype
  const float* addend = nullptr;    // (m, k)
  Beside beside = {};               // where rows of dy and out lie, and what comes on top
  const void* per_group = nullptr;  // (m, groups), dtype, in the order of out's rows
  int64_t groups = 0;
  DenseRows up = {};  // (n, r): if given, v is not read but computed from the same packed dy, and written
  Plan plan = {};
  int64_t runs = 0;
  bool out_of_memory = false;

  using G = Gemm<L>;
  static constexpr bool kQuantized = requires(Source s) { s.packed; };
  static constexpr int64_t kLdc = G::kRun;

  // A thread's buffers, and what they hold.
  struct Scratch {
    uint8_t* packed;     // dy: chunk_blocks of a row block
    uint8_t* packed_v;   // v: rank_chunk of it
    uint8_t* panels[2];  // the set multiplied and the one being filled
    uint8_t* rank_panels;
    float* c;
    float* c_v;  // v of a row block, where it is computed here, and
    uint8_t* v;  // its rows
    int64_t packed_row, packed_chunk, projected_row;
  };

  // Where a thread is: set `b` of run `q` of `count` runs from `unit` on, in a chunk of the contraction.
  struct Place {
    int64_t unit, count, chunk, q, b;
  };

  int64_t c_floats() const { return plan.row_block * kLdc; }
  int64_t row_of(const Place& at) const { return at.unit / runs * plan.row_block; }
  int64_t column_of(const Place& at) const { return (at.unit % runs + at.q) * G::kRun; }
  int64_t item_row_of(const Place& at) const { return (at.chunk * plan.chunk_blocks + at.b) * G::kPerVector; }
  int64_t panels_of(const Place& at) const {
    return kQuantized ? G::kRunPanels : ceil_div(min64(G::kRun, k - column_of(at)), kPanel);
  }
  int64_t chunk_of(const Place& at) const {
    return min64(plan.chunk_blocks, plan.blocks - at.chunk * plan.chunk_blocks);
  }
  int64_t piece_of(const Place& at) const { return min64(L::kPanelBlocks, chunk_of(at) - at.b); }

  Place start(int64_t unit, int64_t end) const {
    return {unit, min64(min64(end - unit, runs - unit % runs), plan.units_per_c), 0, 0, 0};
  }
  bool advance(Place& at, int64_t end) const {
    if (++at.q < at.count) return true;
    at.q = 0;
    at.b += L::kPanelBlocks;
    if (at.b < chunk_of(at)) return true;
    at.b = 0;
    if (++at.chunk < plan.chunks) return true;
    if (at.unit + at.count >= end) return false;
    at = start(at.unit + at.count, end);
    return true;
  }

  // From an item of the set at `at` to where the same columns are needed next: below or, at the end, on top of the
  // next runs.
  int64_t ahead_of(const Place& at) const {
    const int64_t row_bytes = ceil_div(k, 2), rows = L::kPanelBlocks * G::kPerVector;
    return item_row_of(at) + rows < n ? rows * row_bytes : at.count * (G::kRun / 2) - item_row_of(at) * row_bytes;
  }

  void fill(const Place& at, uint8_t* panels) const {
    if constexpr (kQuantized) {
      Fill<L>::panels_of(source, nf4_dynamic_map(), item_row_of(at), piece_of(at), column_of(at), panels);
    } else {
      Pack<L>::panels_of(source, item_row_of(at), piece_of(at), column_of(at), false, panels_of(at), panels);
    }
  }

  // Panels outside, strips inside: a group of panels stays in L1 while the strips of dy stream from L2.
  template <class Filler>
  static void multiply(const uint8_t* packed, int64_t all_blocks, int64_t block0, int64_t blocks, int64_t rows,
                       const uint8_t* panel, int64_t panels, float* c, Visit visit, Filler& filler) {
    for (int64_t p = 0, width; p < panels; p += width) {
      width = G::group_width(p, panels);
      int64_t i = 0;
      if constexpr (requires { &L::template visits<true, Filler>; }) {
        const int64_t full = (rows + 15) / G::kStripRows;
        if (width == 2 && full > 0) {
          i = full * G::kStripRows;
          L::template visits<true>(packed + block0 * G::kStripBlockBytes, panel + p * blocks * kTileBytes,
                                   all_blocks * G::kStripBlockBytes, full, blocks, c + p * kPanel,
                                   G::kStripRows * kLdc, kLdc, visit, filler);
        }
      }
      for (; i < rows; i += G::kStripRows) {
        L::multiply(packed + (i / G::kStripRows * all_blocks + block0) * G::kStripBlockBytes,
                    panel + p * blocks * kTileBytes, width, blocks, c + i * kLdc + p * kPanel, kLdc,
                    min64(G::kStripRows, rows - i), visit, filler);
      }
    }
  }

  // Calls body(filler) with one that prepares `next`, if a level can do that by steps, and completes `next`.
  template <class Body>
  void overlap(const Place& at, const Place* next, uint8_t* panels, Body&& body) const {
    if constexpr (kQuantized && L::kOverlap) {
      const auto by_steps = [&]<Alignment kAlign>() {
        const int64_t rows = min64(plan.row_block, m - row_of(at));
        int64_t points = 0;
        for (int64_t i = 0; i < rows; i += G::kStripRows) {
          points += L::points(G::kRunPanels, min64(G::kStripRows, rows - i), piece_of(at));
        }
        Filler filler(
            Fill<L>::template panel_step<kAlign>(source, nf4_dynamic_map(), item_row_of(*next), piece_of(*next),
                                                 column_of(*next), panels, ahead_of(*next)),
            piece_of(*next) * 16, points);
        body(filler);
        filler.finish();
      };
      if (next != nullptr && item_row_of(*next) + piece_of(*next) * G::kPerVector <= n &&
          column_of(*next) + G::kRun <= k) {
        const Alignment alignment = alignment_of(source);
        if (alignment == Alignment::kHalves) return by_steps.template operator()<Alignment::kHalves>();
        if (alignment == Alignment::kWords) return by_steps.template operator()<Alignment::kWords>();
      }
    }
    NoFiller none;
    body(none);
    if (next != nullptr) fill(*next, panels);
  }

  void pack(const Place& at, Scratch& scratch) const {
    const int64_t row0 = row_of(at), rows = min64(plan.row_block, m - row0);
    if (row0 != scratch.packed_row && up.data == nullptr && plan.rank_blocks > 0 &&
        plan.rank_chunk == plan.rank_blocks) {
      Pack<L>::pack_strips(v, dtype, ext.n, row0, rows, 0, ext.n, plan.rank_blocks, scratch.packed_v);
    }
    if (row0 != scratch.packed_row || at.chunk != scratch.packed_chunk) {
      Pack<L>::pack_strips(dy, dtype, n, row0, rows, at.chunk * plan.chunk_blocks * G::kPerVector, n, chunk_of(at),
                           scratch.packed, beside.from);
      scratch.packed_row = row0;
      scratch.packed_chunk = at.chunk;
      if (up.data != nullptr && scratch.projected_row != row0) project(at, scratch);
    }
  }

  // This chunk's part of v = dy·up of the row block, by every thread that has a part of the block; one writes it.
  void project(const Place& at, Scratch& scratch) const {
    const int64_t row0 = row_of(at), rows = min64(plan.row_block, m - row0), panels = ceil_div(up.k, kPanel);
    NoFiller none;
    for (int64_t b = 0; b < chunk_of(at); b += L::kPanelBlocks) {
      const int64_t now = min64(L::kPanelBlocks, chunk_of(at) - b);
      Pack<L>::panels_of(up, (at.chunk * plan.chunk_blocks + b) * G::kPerVector, now, 0, false, panels,
                         scratch.rank_panels);
      const Visit visit{.from = at.chunk == 0 && b == 0 ? FromC::kZero : FromC::kLoad, .store = true};
      multiply(scratch.packed, chunk_of(at), b, now, rows, scratch.rank_panels, panels, scratch.c_v, visit, none);
    }
    if (at.chunk + 1 < plan.chunks) return;
    scratch.projected_row = row0;
    for (int64_t i = 0; i < rows; ++i) {
      L::store_row(scratch.c_v + i * kLdc, up.k, dtype, element_ptr(scratch.v, i * up.k, dtype));
    }
    Pack<L>::pack_strips(scratch.v, dtype, up.k, 0, rows, 0, up.k, plan.rank_blocks, scratch.packed_v);
    if (at.unit % runs == 0) {
      std::memcpy(const_cast<void*>(element_ptr(v, row0 * up.k, dtype)), scratch.v,
                  static_cast<size_t>(rows * up.k * dtype_bytes(dtype)));
    }
  }

  // The low-rank term of a finished run: lora_a is one more set of panels against packed v.
  void extend(const Place& at, Scratch& scratch, float* c) const {
    const int64_t row0 = row_of(at), rows = min64(plan.row_block, m - row0), panels = panels_of(at);
    NoFiller none;
    for (int64_t r = 0; r < plan.rank_blocks; r += plan.rank_chunk) {
      const int64_t here = min64(plan.rank_chunk, plan.rank_blocks - r);
      if (plan.rank_chunk != plan.rank_blocks) {  // a rank in the thousands: v is packed again for every run
        Pack<L>::pack_strips(v, dtype, ext.n, row0, rows, r * G::kPerVector, ext.n, here, scratch.packed_v);
      }
      for (int64_t b = 0; b < here; b += L::kPanelBlocks) {
        const int64_t now = min64(L::kPanelBlocks, here - b);
        Pack<L>::panels_of(ext, (r + b) * G::kPerVector, now, column_of(at), kQuantized, panels,
                           scratch.rank_panels);
        multiply(scratch.packed_v, here, b, now, rows, scratch.rank_panels, panels, c, {FromC::kLoad, true}, none);
      }
    }
  }

  void store(const Place& at, const float* c, typename Beside::State& state) const {
    const int64_t row0 = row_of(at), rows = min64(plan.row_block, m - row0);
    const int64_t k0 = column_of(at), count = min64(G::kRun, k - k0);
    alignas(64) float line[G::kRun];
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = c + i * kLdc;
      if constexpr (kQuantized) {
        L::restore_columns(from, line);
        from = line;
      }
      const int64_t at_out = beside.to(row0 + i) * k + k0;
      if constexpr (Beside::kAdds) beside.add_row(state, i, k0, count, line);
      if (addend != nullptr) {
        for (int64_t j = 0; j < count; ++j) line[j] = from[j] + addend[at_out + j];
        from = line;
      }
      if (groups > 0) {
        add_group_values(from, per_group, dtype, beside.to(row0 + i) * groups, k / groups, k0, count, line);
        from = line;
      }
      L::store_row(from, count, dtype, element_ptr(out, at_out, dtype));
    }
  }

  bool take_scratch(Scratch& scratch) const {
    const int64_t packed = plan.row_block * plan.chunk_blocks * 64, rank = plan.row_block * plan.rank_chunk * 64;
    const int64_t panels = L::kPanelBlocks * G::kRunPanels * kTileBytes, all_c = plan.units_per_c * c_floats() * 4;
    const int64_t c_v = up.data == nullptr ? 0 : c_floats() * 4, rows_v = plan.row_block * up.k * 4;
    auto* base = static_cast<uint8_t*>(
        thread_scratch(static_cast<size_t>(packed + rank + 3 * panels + all_c + c_v + rows_v)));
    if (base == nullptr) return false;
    uint8_t* after = base + 3 * panels + packed + rank;
    scratch = {.packed = base + 3 * panels,
               .packed_v = base + 3 * panels + packed,
               .panels = {base, base + panels},
               .rank_panels = base + 2 * panels,
               .c = reinterpret_cast<float*>(after),
               .c_v = reinterpret_cast<float*>(after + all_c),
               .v = after + all_c + c_v,
               .packed_row = -1,
               .packed_chunk = -1,
               .projected_row = -1};
    return true;
  }

  void run_units(int64_t begin, int64_t end) {
    if (begin >= end) return;
    Scratch scratch;
    if (!take_scratch(scratch)) {
      __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
      return;
    }
    typename Beside::State state;
    if constexpr (Beside::kAdds) {
      if (!beside.take(state, plan.row_block)) {
        __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
        return;
      }
    }
    L::begin();
    Place at = start(begin, end);
    fill(at, scratch.panels[0]);
    int turn = 0;
    for (bool more = true; more;) {
      Place next = at;
      more = advance(next, end);
      pack(at, scratch);
      const int64_t rows = min64(plan.row_block, m - row_of(at));
      const Visit visit{.from = at.b == 0 && at.chunk == 0 ? FromC::kZero : FromC::kLoad, .store = true};
      float* c = scratch.c + at.q * c_floats();
      overlap(at, more ? &next : nullptr, scratch.panels[turn ^ 1], [&](auto& filler) {
        multiply(scratch.packed, chunk_of(at), at.b, piece_of(at), rows, scratch.panels[turn], panels_of(at), c,
                 visit, filler);
      });
      if (at.b + L::kPanelBlocks >= chunk_of(at) && at.chunk + 1 == plan.chunks) {
        extend(at, scratch, c);
        if constexpr (Beside::kAdds) {
          const int64_t row0 = row_of(at);
          beside.start(state, row0, min64(plan.row_block, m - row0));
          beside.extend(state, column_of(at), min64(G::kRun, k - column_of(at)), c, kLdc);
        }
        store(at, c, state);
      }
      turn ^= 1;
      at = next;
    }
    L::end();
  }

  Status run(int32_t threads) {
    runs = ceil_div(k, G::kRun);
    if constexpr (kQuantized && requires { L::kRunsTogether; }) {
      plan = make_plan<L>(m, n, 1, ext.n, 0, L::kBackwardRows, G::kStripRows, G::kRun * 4, L::kBackwardBytes);
      plan.units_per_c = max64(plan.units_per_c, L::kRunsTogether);
    } else {
      plan = make_plan<L>(m, n, 1, ext.n, 0, L::kBackwardRows, G::kStripRows, G::kRun * 4);
    }
    out_of_memory = false;
    parallel_ranges(
        total_cost(m, plan.row_block, runs), threads,
        [](void* context, int64_t begin, int64_t end) {
          auto& self = *static_cast<Backward*>(context);
          self.run_units(unit_at(begin, self.m, self.plan.row_block, self.runs),
                         unit_at(end, self.m, self.plan.row_block, self.runs));
        },
        this);
    return out_of_memory ? Status::kOutOfMemory : Status::kOk;
  }
};

}  // namespace
}  // namespace fastlora::cpu
