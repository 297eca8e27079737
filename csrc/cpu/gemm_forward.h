// out (m, src.n) = gain·(x·srcᵀ + u·extᵀ + sums·offsetsᵀ) + bias.
#pragma once

#include "gemm_fill.h"
#include "gemm_pack.h"
#include "gemm_plan.h"
#include "parallel.h"

namespace fastlora::cpu {
namespace {

template <class L, class Source, class Beside = NothingBeside>
struct Forward {
  const void* x;  // (m, k), dtype
  int64_t m, k, n;
  DType dtype;
  Source source;  // Nf4Weight or DenseRows, (n, k)
  const void* u;  // (m, r), dtype
  DenseRows ext;  // (n, r)
  const void* bias;
  void* out;                      // (m, n), dtype
  const float* addend = nullptr;  // (m, n)
  const float* gain = nullptr;    // (n)
  Beside beside = {};             // where rows of x and out lie, and what comes on top
  int64_t x_ld = 0, out_ld = 0;   // where they differ from k and n
  DenseRows down = {};          // (r, k): if given, u is not read but computed from the same packed x, and written
  const float* sums = nullptr;  // (m, groups), in the order of x's rows
  DenseRows offsets = {};       // (n, groups)
  Plan plan = {};
  int64_t strips = 0;
  bool out_of_memory = false;

  using G = Gemm<L>;
  static constexpr bool kQuantized = requires(Source s) { s.packed; };

  // A thread's buffers, and what they hold.
  struct Scratch {
    uint8_t* packed;    // x: chunk_blocks of a row block
    uint8_t* packed_u;  // u: rank_chunk of it
    uint8_t* packed_sums;
    uint8_t* strips[2];  // the one multiplied and the one being filled
    uint8_t* rank_strip;
    float* c;
    float* absmax;  // of one strip and chunk
    float* c_u;     // uᵀ of a row block, where it is computed here, and
    uint8_t* u;     // its rows
    int64_t packed_row, packed_chunk, projected_row;
    int64_t absmax_strip, absmax_chunk;
  };

  // Where a thread is: piece `b` of strip `s` of `count` strips from `unit` on, in a chunk of the contraction.
  struct Place {
    int64_t unit, count, chunk, s, b;
  };

  int64_t c_floats() const { return G::kStripRows * plan.row_block; }
  int64_t row_of(const Place& at) const { return at.unit / strips * plan.row_block; }
  int64_t strip_of(const Place& at) const { return at.unit % strips + at.s; }
  int64_t strip_rows(const Place& at) const { return min64(G::kStripRows, n - strip_of(at) * G::kStripRows); }
  int64_t chunk_of(const Place& at) const {
    return min64(plan.chunk_blocks, plan.blocks - at.chunk * plan.chunk_blocks);
  }
  int64_t piece_of(const Place& at) const { return min64(L::kStripBlocks, chunk_of(at) - at.b); }

  Place start(int64_t unit, int64_t end) const {
    return {unit, min64(min64(end - unit, strips - unit % strips), plan.units_per_c), 0, 0, 0};
  }
  bool advance(Place& at, int64_t end) const {
    at.b += L::kStripBlocks;
    if (at.b < chunk_of(at)) return true;
    at.b = 0;
    if (++at.s < at.count) return true;
    at.s = 0;
    if (++at.chunk < plan.chunks) return true;
    if (at.unit + at.count >= end) return false;
    at = start(at.unit + at.count, end);
    return true;
  }

  // Scales of whole rows that lie at a row's distance can be decoded in one go.
  bool rows_at_once() const
    requires kQuantized
  {
    return L::kOverlap && plan.chunks == 1 && k % G::kRun == 0 && source.blocksize == 64;
  }

  int64_t absmax_stride() const {
    if constexpr (kQuantized) {
      if (rows_at_once()) return k / source.blocksize;
      return (plan.chunk_blocks * G::kPerVector >> Fill<L>::scale_shift(source)) + 2 + kAbsmaxSlack;
    } else {
      return 0;
    }
  }

  void decode_scales(const Place& at, Scratch& scratch) const
    requires kQuantized
  {
    const int64_t strip = strip_of(at);
    if (k == 0 || (scratch.absmax_strip == strip && scratch.absmax_chunk == at.chunk)) return;
    scratch.absmax_strip = strip;
    scratch.absmax_chunk = at.chunk;
    if (rows_at_once()) {
      const int64_t stride = absmax_stride();
      L::decode_absmax(source.scales, nf4_dynamic_map(), strip * G::kStripRows * stride, strip_rows(at) * stride,
                       scratch.absmax);
      return;
    }
    const int64_t k0 = at.chunk * plan.chunk_blocks * G::kPerVector;
    const int64_t k1 = min64(k, k0 + chunk_of(at) * G::kPerVector);
    for (int64_t i = 0; i < strip_rows(at); ++i) {
      Fill<L>::decode_scales(source, strip * G::kStripRows + i, k0, k1, absmax_stride(),
                             scratch.absmax + i * absmax_stride());
    }
  }

  // The whole piece of W at `at` into `strip`.
  void fill(const Place& at, Scratch& scratch, uint8_t* strip) const {
    const int64_t first = at.chunk * plan.chunk_blocks, row0 = strip_of(at) * G::kStripRows;
    const int64_t k0 = (first + at.b) * G::kPerVector;
    if constexpr (kQuantized) {
      decode_scales(at, scratch);
      Fill<L>::strip_of(source, scratch.absmax, absmax_stride(), row0, strip_rows(at), k0, piece_of(at), strip,
                        first * G::kPerVector);
    } else {
      Pack<L>::strip_of(source, row0, strip_rows(at), k0, piece_of(at), true, strip);
    }
  }

  // C[rows][16 * panels] (+)= strip · panels over `blocks` blocks; the panels hold `all_blocks` each.
  template <class Filler>
  static void multiply(const uint8_t* strip, int64_t rows, const uint8_t* base, int64_t panels, int64_t all_blocks,
                       int64_t block0, int64_t blocks, float* c, int64_t ldc, Visit visit, Filler& filler) {
    int64_t p = 0;
    if constexpr (requires { &L::template visits<false, Filler>; }) {
      if (rows > 16 && panels >= 2) {
        p = panels / 2 * 2;
        L::template visits<false>(strip, base + block0 * 2 * kTileBytes, all_blocks * 2 * kTileBytes, p / 2,
                                  blocks, c, 2 * kPanel, ldc, visit, filler);
      }
    }
    for (int64_t width; p < panels; p += width) {
      width = G::group_width(p, panels);
      L::multiply(strip, base + p * all_blocks * kTileBytes + block0 * width * kTileBytes, width, blocks,
                  c + p * kPanel, ldc, rows, visit, filler);
    }
  }

  // Calls body(filler) with one that prepares `next`, if a level can do that by steps, and completes `next`.
  template <class Body>
  void overlap(const Place& at, const Place* next, Scratch& scratch, uint8_t* strip, Body&& body) const {
    if constexpr (kQuantized && L::kOverlap) {
      const auto by_steps = [&]<Alignment kAlign>() {
        decode_scales(*next, scratch);
        const int64_t first = next->chunk * plan.chunk_blocks;
        const int64_t points =
            L::points(ceil_div(min64(plan.row_block, m - row_of(at)), kPanel), strip_rows(at), piece_of(at));
        Filler filler(Fill<L>::template strip_step<kAlign>(
                          source, scratch.absmax, absmax_stride(), strip_of(*next) * G::kStripRows,
                          (first + next->b) * G::kPerVector, piece_of(*next), strip, first * G::kPerVector),
                      strip_rows(*next) * (piece_of(*next) / G::kVectors), points);
        body(filler);
        filler.finish();
      };
      if (next != nullptr && (next->chunk * plan.chunk_blocks + next->b + piece_of(*next)) * G::kPerVector <= k) {
        const Alignment alignment = alignment_of(source);
        if (alignment == Alignment::kHalves) return by_steps.template operator()<Alignment::kHalves>();
        if (alignment == Alignment::kWords) return by_steps.template operator()<Alignment::kWords>();
      }
    }
    NoFiller none;
    body(none);
    if (next != nullptr) fill(*next, scratch, strip);
  }

  void pack(const Place& at, Scratch& scratch) const {
    const int64_t row0 = row_of(at), rows = min64(plan.row_block, m - row0);
    if (row0 != scratch.packed_row && down.data == nullptr && plan.rank_blocks > 0 &&
        plan.rank_chunk == plan.rank_blocks) {
      Pack<L>::pack_panels(u, dtype, ext.k, row0, rows, 0, ext.k, plan.rank_blocks, false, scratch.packed_u);
    }
    if (row0 != scratch.packed_row && plan.group_blocks > 0 && plan.group_chunk == plan.group_blocks) {
      pack_sums(row0, rows, 0, plan.group_blocks, scratch);
    }
    if (row0 != scratch.packed_row || at.chunk != scratch.packed_chunk) {
      Pack<L>::pack_panels(x, dtype, x_ld > 0 ? x_ld : k, row0, rows, at.chunk * plan.chunk_blocks * G::kPerVector,
                           k, chunk_of(at), true, scratch.packed, beside.from);
      scratch.packed_row = row0;
      scratch.packed_chunk = at.chunk;
      if (down.data != nullptr && scratch.projected_row != row0) project(at, scratch);
    }
  }

  void pack_sums(int64_t row0, int64_t rows, int64_t q, int64_t blocks, Scratch& scratch) const {
    Pack<L>::pack_panels(sums, DType::kFloat32, offsets.k, row0, rows, q * G::kPerVector, offsets.k, blocks, false,
                         scratch.packed_sums, beside.from);
  }

  // This chunk's part of u = x·downᵀ of the row block. Every thread that has a part of the block computes all of
  // its u, for that is quicker than to wait for another; one of them writes it.
  void project(const Place& at, Scratch& scratch) const {
    const int64_t row0 = row_of(at), rows = min64(plan.row_block, m - row0), panels = ceil_div(rows, kPanel);
    const bool last = at.chunk + 1 == plan.chunks;
    NoFiller none;
    for (int64_t q = 0; q < down.n; q += G::kStripRows) {
      const int64_t count = min64(G::kStripRows, down.n - q);
      float* c = scratch.c_u + q * plan.row_block;
      for (int64_t b = 0; b < chunk_of(at); b += L::kStripBlocks) {
        const int64_t now = min64(L::kStripBlocks, chunk_of(at) - b);
        Pack<L>::strip_of(down, q, count, (at.chunk * plan.chunk_blocks + b) * G::kPerVector, now, true,
                          scratch.rank_strip);
        const Visit visit{.from = at.chunk == 0 && b == 0 ? FromC::kZero : FromC::kLoad, .store = true};
        multiply(scratch.rank_strip, count, scratch.packed, panels, chunk_of(at), b, now, c, plan.row_block, visit,
                 none);
      }
      if (last) {
        transpose_rows(c, rows, [&](int64_t row, float* values) {
          L::store_row(values, count, dtype, element_ptr(scratch.u, row * down.n + q, dtype));
        });
      }
    }
    if (!last) return;
    scratch.projected_row = row0;
    Pack<L>::pack_panels(scratch.u, dtype, down.n, 0, rows, 0, down.n, plan.rank_blocks, false, scratch.packed_u);
    if (at.unit % strips == 0) {
      std::memcpy(const_cast<void*>(element_ptr(u, row0 * down.n, dtype)), scratch.u,
                  static_cast<size_t>(rows * down.n * dtype_bytes(dtype)));
    }
  }

  // The low-rank terms of a finished strip: s·B is one more strip against packed u, offsets against packed sums.
  void extend(const Place& at, Scratch& scratch, float* c, bool resident) const {
    const int64_t row0 = row_of(at), rows = min64(plan.row_block, m - row0);
    extend_by(ext, plan.rank_blocks, plan.rank_chunk, scratch.packed_u, at, scratch, c, resident,
              plan.group_blocks == 0, [&](int64_t q, int64_t blocks) {
                Pack<L>::pack_panels(u, dtype, ext.k, row0, rows, q * G::kPerVector, ext.k, blocks, false,
                                     scratch.packed_u);
              });
    extend_by(offsets, plan.group_blocks, plan.group_chunk, scratch.packed_sums, at, scratch, c, resident, true,
              [&](int64_t q, int64_t blocks) { pack_sums(row0, rows, q, blocks, scratch); });
  }

  template <class Packer>
  void extend_by(const DenseRows& term, int64_t blocks, int64_t chunk, const uint8_t* packed, const Place& at,
                 Scratch& scratch, float* c, bool resident, bool last_term, Packer&& pack_again) const {
    const int64_t panels = ceil_div(min64(plan.row_block, m - row_of(at)), kPanel);
    NoFiller none;
    for (int64_t q = 0; q < blocks; q += chunk) {
      const int64_t here = min64(chunk, blocks - q);
      if (chunk != blocks) pack_again(q, here);  // a rank in the thousands: for every strip
      for (int64_t b = 0; b < here; b += L::kStripBlocks) {
        const int64_t now = min64(L::kStripBlocks, here - b);
        Pack<L>::strip_of(term, strip_of(at) * G::kStripRows, strip_rows(at), (q + b) * G::kPerVector, now, false,
                          scratch.rank_strip);
        const bool last = last_term && q + b + now == blocks;
        multiply(scratch.rank_strip, strip_rows(at), packed, panels, here, b, now, c, plan.row_block,
                 {resident ? FromC::kKeep : FromC::kLoad, !resident || last}, none);
      }
    }
  }

  // Gives take(row, values) one strip's columns of every row of the result, from C.
  template <class Take>
  void transpose_rows(const float* c, int64_t rows, Take&& take) const {
    alignas(64) float block[kPanel][G::kStripRows];
    for (int64_t p = 0; p * kPanel < rows; ++p) {
      L::transpose_strip(c + p * kPanel, plan.row_block, block);
      for (int64_t j = 0; j < min64(kPanel, rows - p * kPanel); ++j) take(p * kPanel + j, block[j]);
    }
  }

  void store(const Place& at, const float* c, typename Beside::State& state) const {
    const int64_t row0 = row_of(at), rows = min64(plan.row_block, m - row0);
    const int64_t n0 = strip_of(at) * G::kStripRows, count = strip_rows(at);
    float offset[G::kStripRows] = {};
    if (bias != nullptr) {
      for (int64_t i = 0; i < count; ++i) offset[i] = load_as_float(bias, n0 + i, dtype);
    }
    const int64_t ld = out_ld > 0 ? out_ld : n;
    transpose_rows(c, rows, [&](int64_t row, float* values) {
      const int64_t at_out = beside.to(row0 + row) * ld + n0;
      if (gain != nullptr) {
        for (int64_t i = 0; i < count; ++i) values[i] *= gain[n0 + i];
      }
      if (bias != nullptr) {
        for (int64_t i = 0; i < G::kStripRows; ++i) values[i] += offset[i];
      }
      if constexpr (Beside::kAdds) beside.add_row(state, row, n0, count, values);
      if (addend != nullptr) {
        for (int64_t i = 0; i < count; ++i) values[i] += addend[at_out + i];
      }
      L::store_row(values, count, dtype, element_ptr(out, at_out, dtype));
    });
  }

  bool take_scratch(Scratch& scratch) const {
    const int64_t packed = plan.row_block * plan.chunk_blocks * 64, rank = plan.row_block * plan.rank_chunk * 64;
    const int64_t group = plan.row_block * plan.group_chunk * 64;
    const int64_t strip = L::kStripBlocks * G::kStripBlockBytes, all_c = plan.units_per_c * c_floats() * 4;
    const int64_t absmax = round_up((G::kStripRows * absmax_stride() + kAbsmaxSlack) * 4, 64);
    const int64_t c_u = round_up(down.n, G::kStripRows) * plan.row_block * 4, rows_u = plan.row_block * down.n * 4;
    auto* base = static_cast<uint8_t*>(
        thread_scratch(static_cast<size_t>(packed + rank + group + 3 * strip + all_c + absmax + c_u + rows_u)));
    if (base == nullptr) return false;
    uint8_t* after = base + 3 * strip + packed + rank + group;
    scratch = {.packed = base + 3 * strip,
               .packed_u = base + 3 * strip + packed,
               .packed_sums = base + 3 * strip + packed + rank,
               .strips = {base, base + strip},
               .rank_strip = base + 2 * strip,
               .c = reinterpret_cast<float*>(after),
               .absmax = reinterpret_cast<float*>(after + all_c),
               .c_u = reinterpret_cast<float*>(after + all_c + absmax),
               .u = after + all_c + absmax + c_u,
               .packed_row = -1,
               .packed_chunk = -1,
               .projected_row = -1,
               .absmax_strip = -1,
               .absmax_chunk = -1};
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
    fill(at, scratch, scratch.strips[0]);
    int turn = 0;
    for (bool more = true; more;) {
      Place next = at;
      more = advance(next, end);
      pack(at, scratch);
      const int64_t panels = ceil_div(min64(plan.row_block, m - row_of(at)), kPanel);
      const bool resident = L::kResidentC && panels <= G::kGroup;
      const bool first = at.b == 0, last = at.b + L::kStripBlocks >= chunk_of(at);
      const bool done = last && at.chunk + 1 == plan.chunks;
      const Visit visit{.from = resident && !first       ? FromC::kKeep
                                : first && at.chunk == 0 ? FromC::kZero
                                                         : FromC::kLoad,
                        .store = !resident || (last && !(done && plan.rank_blocks + plan.group_blocks > 0))};
      float* c = scratch.c + at.s * c_floats();
      overlap(at, more ? &next : nullptr, scratch, scratch.strips[turn ^ 1], [&](auto& filler) {
        multiply(scratch.strips[turn], strip_rows(at), scratch.packed, panels, chunk_of(at), at.b, piece_of(at), c,
                 plan.row_block, visit, filler);
      });
      if (done) {
        extend(at, scratch, c, resident);
        if constexpr (Beside::kAdds) {
          const int64_t row0 = row_of(at);
          beside.start(state, row0, min64(plan.row_block, m - row0));
          beside.extend(state, strip_of(at) * G::kStripRows, strip_rows(at), c, plan.row_block);
        }
        store(at, c, state);
      }
      turn ^= 1;
      at = next;
    }
    L::end();
  }

  Status run(int32_t threads) {
    strips = ceil_div(n, G::kStripRows);
    plan = make_plan<L>(m, k, G::kVectors, ext.k, offsets.k, L::kForwardRows, kPanel, G::kStripRows * 4);
    out_of_memory = false;
    parallel_ranges(
        total_cost(m, plan.row_block, strips), threads,
        [](void* context, int64_t begin, int64_t end) {
          auto& self = *static_cast<Forward*>(context);
          self.run_units(unit_at(begin, self.m, self.plan.row_block, self.strips),
                         unit_at(end, self.m, self.plan.row_block, self.strips));
        },
        this);
    return out_of_memory ? Status::kOutOfMemory : Status::kOk;
  }
};

}  // namespace
}  // namespace fastlora::cpu
