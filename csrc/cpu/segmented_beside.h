// What the blocked GEMM adds beside its product where every row may have an adapter of its own. Rows are packed in
// the order of the routing, so that those of an adapter lie together, and put back in their places when stored.
//
// A row block is cut into pieces, a segment's rows in it by slices. Whole tiles of rows are multiplied into the
// base's C; the rest of a segment in a C of its own whose rows are then added, so that nothing of an adapter, a
// NaN least of all, meets the rows of another. A few rows are cheaper to add one adapter row after the other, for
// some hundred columns at a time, when a row of y is stored.
#pragma once

#include "gemm_pack.h"
#include "parallel.h"
#include "segmented_products.h"

namespace fastlora::cpu {
namespace {

struct OrderedRows {
  const int32_t* order = nullptr;
  int64_t operator()(int64_t position) const { return order[position]; }
};

struct Piece {
  int64_t slice, lo, hi, rank;  // rows [lo, hi) of the row block
  const char* pool;             // its first row
  float scale;
  bool direct;   // into the base's C
  int64_t kept;  // where its packed u (bytes) or its weights (floats) are; -1: packed when it is needed
};

template <class L, class V>
struct AdaptersBeside {
  using G = Gemm<L>;

  static constexpr bool kAdds = true;
  static constexpr int64_t kFewRows = 12;           // below, rows are added one by one
  static constexpr int64_t kRankBlocks = 8;         // blocks of ranks multiplied at a time
  static constexpr int64_t kNarrowBytes = 1 << 20;  // of packed u (or v) that are kept for a row block
  static constexpr int64_t kWeights = 1 << 16;      // weights of few rows that are kept

  const SegmentedJob* job = nullptr;
  const Side* side = nullptr;  // what the pieces expand to
  const void* narrow = nullptr;
  bool scaled = false, one_route = false;
  OrderedRows from = {}, to = {};

  struct State {
    Piece *many, *few;
    uint8_t *kept, *packed, *factor, *has_few;
    float *weights, *c, *sums;  // sums: of few rows, a row block by `columns`
    int64_t many_count, few_count;
    int64_t row0 = -1, row_block = 0;
    int64_t first = -1, columns = 0;  // the columns of y that `sums` holds, and how many at most
    const char* factor_pool = nullptr;
    int64_t factor_at = -1;
  };

  static int64_t blocks_of(const Piece& piece) { return ceil_div(piece.rank, G::kPerVector); }

  // `narrow_bytes` of a row block's packed u for kRankBlocks blocks of ranks, `factor_bytes` of an adapter's.
  bool take(State& state, int64_t row_block, int64_t narrow_bytes, int64_t factor_bytes, int64_t c_floats,
            int64_t columns) const {
    const int64_t pieces = round_up(2 * row_block * job->table.slices * static_cast<int64_t>(sizeof(Piece)), 64);
    const int64_t flags = round_up(row_block, 64);
    const int64_t total = kNarrowBytes + narrow_bytes + factor_bytes + c_floats * 4 + kWeights * 4 +
                          row_block * columns * 4 + 2 * pieces + flags;
    auto* at = static_cast<uint8_t*>(thread_scratch_beside(static_cast<size_t>(total)));
    if (at == nullptr) return false;
    const auto next = [&](int64_t bytes) {
      uint8_t* here = at;
      at += bytes;
      return here;
    };
    state.row_block = row_block;
    state.columns = columns;
    state.kept = next(kNarrowBytes);
    state.packed = next(narrow_bytes);
    state.factor = next(factor_bytes);
    state.c = reinterpret_cast<float*>(next(c_floats * 4));
    state.weights = reinterpret_cast<float*>(next(kWeights * 4));
    state.sums = reinterpret_cast<float*>(next(row_block * columns * 4));
    state.many = reinterpret_cast<Piece*>(next(pieces));
    state.few = reinterpret_cast<Piece*>(next(pieces));
    state.has_few = next(flags);
    return true;
  }

  // Cuts a row block whose tiles have `unit` rows; bytes_of(piece) of its packed u a block of ranks, and
  // pack(piece, first block, blocks, out) packs it.
  template <class Bytes, class Pack>
  void cut(State& state, int64_t row0, int64_t rows, int64_t unit, Bytes&& bytes_of, Pack&& pack) const {
    state.row0 = row0;
    state.first = state.factor_at = -1;
    state.many_count = state.few_count = 0;
    std::memset(state.has_few, 0, static_cast<size_t>(rows));
    int64_t kept = 0, weights = 0;
    const auto add_many = [&](Piece piece) {
      const int64_t blocks = blocks_of(piece), bytes = bytes_of(piece);
      if (kept + bytes * blocks <= kNarrowBytes) {
        piece.kept = kept;
        for (int64_t b = 0; b < blocks; b += kRankBlocks) {
          pack(piece, b, min64(kRankBlocks, blocks - b), state.kept + kept + b * bytes);
        }
        kept += bytes * blocks;
      }
      state.many[state.many_count++] = piece;
    };
    const auto add_some = [&](Piece piece) {
      const int64_t count = piece.hi - piece.lo;
      if (one_route || count >= kFewRows || weights + count * piece.rank > kWeights) return add_many(piece);
      piece.kept = weights;
      for (int64_t i = piece.lo; i < piece.hi; ++i) {
        const int64_t at = (row0 + i) * job->narrow_ld + job->narrow_at[piece.slice];
        for (int64_t q = 0; q < piece.rank; ++q) {
          state.weights[weights++] = piece.scale * load_as_float(narrow, at + q, job->dtype);
        }
        state.has_few[i] = 1;
      }
      state.few[state.few_count++] = piece;
    };
    for (int64_t s = 0; s < job->segments; ++s) {
      const Segment segment = job->segment(s);
      const int64_t lo = max64(segment.begin, row0) - row0;
      const int64_t hi = min64(segment.begin + segment.count, row0 + rows) - row0;
      if (lo >= hi) continue;
      const int64_t whole = one_route ? 0 : (hi - lo) / unit * unit;
      for (int64_t j = 0; j < job->table.slices; ++j) {
        const int64_t rank = job->rank(j, segment.slot);
        if (rank == 0) continue;
        Piece piece{.slice = j,
                    .lo = lo,
                    .hi = lo + whole,
                    .rank = rank,
                    .pool = static_cast<const char*>(side->pool[j]) +
                            job->first(j, segment.slot) * side->cols[j] * dtype_bytes(job->table.dtype),
                    .scale = scaled ? job->scaling(j, segment.slot) : 1.0f,
                    .direct = true,
                    .kept = -1};
        if (whole > 0) add_many(piece);
        piece.lo = lo + whole;
        piece.hi = hi;
        piece.direct = false;
        if (piece.lo < piece.hi) add_some(piece);
      }
    }
  }

  struct AdapterRows {
    const char* first;
    int64_t stride;
    const char* operator[](int64_t q) const { return first + q * stride; }
  };

  // The sums of few rows for columns [first, first + columns).
  void fill_sums(State& state, int64_t first) const {
    state.first = first;
    const int64_t last = min64(first + state.columns, side->ld);
    for (int64_t i = 0; i < state.row_block; ++i) {
      if (state.has_few[i] == 0) continue;
      std::memset(state.sums + i * state.columns, 0, static_cast<size_t>(last - first) * sizeof(float));
    }
    for (int64_t f = 0; f < state.few_count; ++f) {
      const Piece& piece = state.few[f];
      const int64_t column = side->column[piece.slice], cols = side->cols[piece.slice];
      const int64_t begin = max64(first, column), end = min64(last, column + cols);
      if (begin >= end) continue;
      float* to = state.sums + piece.lo * state.columns + column - first;
      Segmented<V>::weigh_all(
          piece.hi - piece.lo, state.weights + piece.kept, piece.rank,
          AdapterRows{piece.pool, cols * dtype_bytes(job->table.dtype)}, piece.rank, begin - column, end - column,
          job->table.dtype, [&](int64_t i, int64_t c, typename V::Vec sum, int64_t lanes) {
            float* at = to + i * state.columns + c;
            V::store(at, DType::kFloat32, V::add(V::load(at, DType::kFloat32, lanes), sum), lanes);
          });
    }
  }

  // Before rows are stored: columns [first, first + count) of y.
  void start_store(State& state, int64_t first, int64_t count) const {
    if (state.few_count == 0) return;
    if (state.first >= 0 && first >= state.first && first + count <= state.first + state.columns) return;
    fill_sums(state, first);
  }
  void add_row(State& state, int64_t i, int64_t first, int64_t count, float* line) const {
    if (state.few_count == 0 || state.has_few[i] == 0) return;
    add_floats(state.sums + i * state.columns + first - state.first, count, line);
  }

  static void add_floats(const float* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes) {
      V::store_floats(to + i, V::add(V::load_floats(to + i), V::load_floats(from + i)));
    }
    for (; i < count; ++i) to[i] += from[i];
  }

  const void* narrow_of(const Piece& piece) const {
    return element_ptr(narrow, job->narrow_at[piece.slice], job->dtype);
  }

  // Whether the piece's factor for the place `at` is there already: pieces of one segment follow each other.
  static bool has_factor(State& state, const Piece& piece, int64_t at) {
    const bool there = state.factor_pool == piece.pool && state.factor_at == at && blocks_of(piece) <= kRankBlocks;
    state.factor_pool = piece.pool;
    state.factor_at = at;
    return there;
  }
};

// Forward: C is yᵀ, a strip of columns of y by the rows of a row block.
template <class L, class V>
struct AdaptersForward : AdaptersBeside<L, V> {
  using Base = AdaptersBeside<L, V>;
  using G = Gemm<L>;
  using T = typename L::T;
  using Base::job, Base::side, Base::kRankBlocks;
  using typename Base::State;

  static int64_t panels_of(const Piece& piece) { return ceil_div(piece.hi - piece.lo, kPanel); }

  bool take(State& state, int64_t row_block) const {
    return Base::take(state, row_block, row_block / kPanel * kTileBytes * kRankBlocks,
                      kRankBlocks * G::kStripBlockBytes, G::kStripRows * row_block, 16 * G::kStripRows);
  }

  void pack(const State& state, const Piece& piece, int64_t block, int64_t blocks, uint8_t* out) const {
    Pack<L>::pack_panels(this->narrow_of(piece), job->dtype, job->narrow_ld, state.row0 + piece.lo,
                         piece.hi - piece.lo, block * G::kPerVector, piece.rank, blocks, false, out);
  }

  void start(State& state, int64_t row0, int64_t rows) const {
    if (state.row0 == row0) return;
    Base::cut(
        state, row0, rows, kPanel, [](const Piece& piece) { return panels_of(piece) * kTileBytes; },
        [&](const Piece& piece, int64_t block, int64_t blocks, uint8_t* out) {
          pack(state, piece, block, blocks, out);
        });
  }

  // Columns [first, first + count) of the pool, blocks [block, block + blocks) of ranks, as rows from `lo` on of
  // an A strip; zeros in its other rows.
  void factor_of(const Piece& piece, int64_t first, int64_t lo, int64_t count, int64_t block, int64_t blocks,
                 uint8_t* strip) const {
    const int64_t cols = side->cols[piece.slice], bytes = dtype_bytes(job->table.dtype);
    alignas(64) T ranks[G::kPerVector][G::kStripRows];
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t e = 0; e < G::kPerVector; ++e) {
        const int64_t q = (block + b) * G::kPerVector + e;
        if (q >= piece.rank || count < G::kStripRows) std::memset(ranks[e], 0, sizeof ranks[e]);
        if (q >= piece.rank) continue;
        const void* from = piece.pool + (q * cols + first) * bytes;
        if (piece.scale == 1.0f) {
          L::load_row(from, job->table.dtype, count, ranks[e] + lo);
        } else {
          L::load_scaled_row(from, job->table.dtype, count, piece.scale, ranks[e] + lo);
        }
      }
      uint8_t* out = strip + b * G::kStripBlockBytes;
      if constexpr (requires { L::transpose_ranks(ranks, out); }) {
        L::transpose_ranks(ranks, out);
      } else {
        for (int64_t i = 0; i < G::kStripRows; ++i) {
          for (int64_t e = 0; e < G::kPerVector; ++e) reinterpret_cast<T*>(out + i * 64)[e] = ranks[e][i];
        }
      }
    }
  }

  void extend(State& state, int64_t n0, int64_t count, float* c, int64_t ldc) const {
    NoFiller none;
    for (int64_t f = 0; f < state.many_count; ++f) {
      const Piece& piece = state.many[f];
      const int64_t column = side->column[piece.slice];
      const int64_t begin = max64(n0, column), end = min64(n0 + count, column + side->cols[piece.slice]);
      if (begin >= end) continue;
      const int64_t panels = panels_of(piece), all = Base::blocks_of(piece);
      float* to = piece.direct ? c + piece.lo : state.c;
      const int64_t ld = piece.direct ? ldc : state.row_block;
      for (int64_t b = 0; b < all; b += kRankBlocks) {
        const int64_t now = min64(kRankBlocks, all - b);
        if (!Base::has_factor(state, piece, n0)) {
          factor_of(piece, begin - column, begin - n0, end - begin, b, now, state.factor);
        }
        const uint8_t* packed = state.packed;
        if (piece.kept >= 0) {
          packed = state.kept + piece.kept + b * panels * kTileBytes;
        } else {
          pack(state, piece, b, now, state.packed);
        }
        const Visit visit{piece.direct || b > 0 ? FromC::kLoad : FromC::kZero, true};
        for (int64_t p = 0, width; p < panels; p += width) {
          width = G::group_width(p, panels);
          L::multiply(state.factor, packed + p * now * kTileBytes, width, now, to + p * kPanel, ld, count, visit,
                      none);
        }
      }
      if (piece.direct) continue;
      for (int64_t i = begin - n0; i < end - n0; ++i) {
        Base::add_floats(state.c + i * ld, piece.hi - piece.lo, c + i * ldc + piece.lo);
      }
    }
    this->start_store(state, n0, count);
  }
};

// Backward: C is dx, rows of a row block by a run of columns in the order of the look-up.
template <class L, class V>
struct AdaptersBackward : AdaptersBeside<L, V> {
  using Base = AdaptersBeside<L, V>;
  using G = Gemm<L>;
  using T = typename L::T;
  using Base::job, Base::side, Base::kRankBlocks;
  using typename Base::State;

  static int64_t strips_of(const Piece& piece) { return ceil_div(piece.hi - piece.lo, G::kStripRows); }

  bool take(State& state, int64_t row_block) const {
    return Base::take(state, row_block, row_block / G::kStripRows * G::kStripBlockBytes * kRankBlocks,
                      kRankBlocks * G::kRunPanels * kTileBytes, row_block * G::kRun, 4 * G::kRun);
  }

  void pack(const State& state, const Piece& piece, int64_t block, int64_t blocks, uint8_t* out) const {
    Pack<L>::pack_strips(this->narrow_of(piece), job->dtype, job->narrow_ld, state.row0 + piece.lo,
                         piece.hi - piece.lo, block * G::kPerVector, piece.rank, blocks, out);
  }

  void start(State& state, int64_t row0, int64_t rows) const {
    if (state.row0 == row0) return;
    Base::cut(
        state, row0, rows, G::kStripRows,
        [](const Piece& piece) { return strips_of(piece) * G::kStripBlockBytes; },
        [&](const Piece& piece, int64_t block, int64_t blocks, uint8_t* out) {
          pack(state, piece, block, blocks, out);
        });
  }

  // Blocks [block, block + blocks) of the adapter's rows as B panels of the run's columns.
  void factor_of(const Piece& piece, int64_t k0, int64_t block, int64_t blocks, uint8_t* out) const {
    const DenseRows rows{piece.pool, job->table.dtype, piece.rank, side->cols[piece.slice], piece.scale};
    if constexpr (requires(T* even, uint8_t* const* to) { L::pack_pair(even, even, to); }) {
      alignas(64) T pair[2][G::kRun];
      uint8_t* to[G::kRunPanels];
      for (int64_t t = 0; t < blocks * 16; ++t) {
        for (int64_t e = 0; e < 2; ++e) {
          const int64_t q = block * G::kPerVector + 2 * t + e;
          if (q < piece.rank) {
            Pack<L>::load_dense(rows, q, k0, G::kRun, pair[e]);
          } else {
            std::memset(pair[e], 0, sizeof pair[e]);
          }
        }
        for (int64_t p = 0; p < G::kRunPanels; ++p) {
          const auto place = G::panel_place(p, G::kRunPanels, blocks);
          to[p] = out + place.offset + t / 16 * place.block_stride + t % 16 * 64;
        }
        L::pack_pair(pair[0], pair[1], to);
      }
    } else {
      Pack<L>::panels_of(rows, block * G::kPerVector, blocks, k0, true, G::kRunPanels, out);
    }
  }

  void extend(State& state, int64_t k0, int64_t count, float* c, int64_t ldc) const {
    NoFiller none;
    for (int64_t f = 0; f < state.many_count; ++f) {
      const Piece& piece = state.many[f];
      const int64_t strips = strips_of(piece), all = Base::blocks_of(piece);
      float* to = piece.direct ? c + piece.lo * ldc : state.c;
      const int64_t ld = piece.direct ? ldc : G::kRun;
      for (int64_t b = 0; b < all; b += kRankBlocks) {
        const int64_t now = min64(kRankBlocks, all - b);
        if (!Base::has_factor(state, piece, k0)) factor_of(piece, k0, b, now, state.factor);
        const uint8_t* packed = state.packed;
        if (piece.kept >= 0) {
          packed = state.kept + piece.kept + b * strips * G::kStripBlockBytes;
        } else {
          pack(state, piece, b, now, state.packed);
        }
        const Visit visit{piece.direct || b > 0 ? FromC::kLoad : FromC::kZero, true};
        for (int64_t p = 0, width; p < G::kRunPanels; p += width) {
          width = G::group_width(p, G::kRunPanels);
          for (int64_t s = 0; s < strips; ++s) {
            L::multiply(packed + s * now * G::kStripBlockBytes, state.factor + p * now * kTileBytes, width, now,
                        to + s * G::kStripRows * ld + p * kPanel, ld,
                        min64(G::kStripRows, piece.hi - piece.lo - s * G::kStripRows), visit, none);
          }
        }
      }
      if (piece.direct) continue;
      for (int64_t i = 0; i < piece.hi - piece.lo; ++i) {
        Base::add_floats(state.c + i * ld, G::kRun, c + (piece.lo + i) * ldc);
      }
    }
    this->start_store(state, k0, count);
  }
};

}  // namespace
}  // namespace fastlora::cpu
