// What the blocked GEMM adds beside its product where every row may have an adapter of its own. Rows are packed in
// the order of the routing, so that those of an adapter lie together, and put back in their places when stored.
//
// A row block is cut into pieces, a segment's rows in it by slices. A piece of many rows is multiplied as the base
// is, in a C of its own whose rows (and columns) are then added to the base's: panels and strips may straddle
// adapters, and a NaN stays with its own. A piece of few rows is added when a row is stored, one adapter row after
// the other.
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

template <class L, class V>
struct AdaptersBeside {
  using G = Gemm<L>;
  using T = typename L::T;

  static constexpr bool kAdds = true;
  static constexpr int64_t kFewRows = 8;            // below, a piece is added row by row
  static constexpr int64_t kRankBlocks = 8;         // blocks of ranks multiplied at a time
  static constexpr int64_t kNarrowBytes = 1 << 20;  // of packed u (or v) that are kept for a row block
  static constexpr int64_t kWeights = 1 << 16;      // weights of few rows that are kept

  const SegmentedJob* job = nullptr;
  const Side* side = nullptr;  // what the pieces expand to
  const void* narrow = nullptr;
  bool scaled = false, one_route = false;
  OrderedRows from = {}, to = {};

  struct Piece {
    int64_t slice, lo, hi, rank;  // rows [lo, hi) of the row block
    const char* pool;             // its first row
    float scale;
    int64_t kept;  // where its packed u (bytes) or its weights (floats) are; -1: packed when it is needed
  };
  struct State {
    Piece *many, *few;
    uint8_t *kept, *packed, *factor;
    float *weights, *c;
    int64_t many_count, few_count, cursor;
    int64_t row0 = -1, row_block = 0;
  };

  static int64_t blocks_of(const Piece& piece) { return ceil_div(piece.rank, G::kPerVector); }

  // `narrow_bytes` of a row block's packed u a block of ranks; `factor_bytes` of an adapter's; `c_floats`.
  bool take(State& state, int64_t row_block, int64_t narrow_bytes, int64_t factor_bytes, int64_t c_floats) const {
    const int64_t pieces = round_up(row_block * job->table.slices * static_cast<int64_t>(sizeof(Piece)), 64);
    const int64_t total = kNarrowBytes + narrow_bytes + factor_bytes + c_floats * 4 + kWeights * 4 + 2 * pieces;
    auto* at = static_cast<uint8_t*>(thread_scratch_beside(static_cast<size_t>(total)));
    if (at == nullptr) return false;
    const auto next = [&](int64_t bytes) {
      uint8_t* here = at;
      at += bytes;
      return here;
    };
    state.row_block = row_block;
    state.kept = next(kNarrowBytes);
    state.packed = next(narrow_bytes);
    state.factor = next(factor_bytes);
    state.c = reinterpret_cast<float*>(next(c_floats * 4));
    state.weights = reinterpret_cast<float*>(next(kWeights * 4));
    state.many = reinterpret_cast<Piece*>(next(pieces));
    state.few = reinterpret_cast<Piece*>(next(pieces));
    return true;
  }

  // Cuts a row block; pack(piece, first block, blocks, out) packs u and returns its bytes.
  template <class Bytes, class Pack>
  void cut(State& state, int64_t row0, int64_t rows, Bytes&& bytes_of, Pack&& pack) const {
    state.row0 = row0;
    state.many_count = state.few_count = state.cursor = 0;
    int64_t kept = 0, weights = 0;
    for (int64_t s = 0; s < job->segments; ++s) {
      const Segment segment = job->segment(s);
      const int64_t lo = max64(segment.begin, row0) - row0;
      const int64_t hi = min64(segment.begin + segment.count, row0 + rows) - row0;
      if (lo >= hi) continue;
      for (int64_t j = 0; j < job->table.slices; ++j) {
        const int64_t rank = job->rank(j, segment.slot);
        if (rank == 0) continue;
        Piece piece{.slice = j,
                    .lo = lo,
                    .hi = hi,
                    .rank = rank,
                    .pool = static_cast<const char*>(side->pool[j]) +
                            job->first(j, segment.slot) * side->cols[j] * dtype_bytes(job->table.dtype),
                    .scale = scaled ? job->scaling(j, segment.slot) : 1.0f,
                    .kept = -1};
        if (!one_route && hi - lo < kFewRows && weights + (hi - lo) * rank <= kWeights) {
          piece.kept = weights;
          for (int64_t i = lo; i < hi; ++i) {
            const int64_t at = (row0 + i) * job->narrow_ld + job->narrow_at[j];
            for (int64_t q = 0; q < rank; ++q) {
              state.weights[weights++] = piece.scale * load_as_float(narrow, at + q, job->dtype);
            }
          }
          state.few[state.few_count++] = piece;
          continue;
        }
        const int64_t blocks = blocks_of(piece), bytes = bytes_of(piece) * blocks;
        if (kept + bytes <= kNarrowBytes) {
          piece.kept = kept;
          for (int64_t b = 0; b < blocks; b += kRankBlocks) {
            pack(piece, b, min64(kRankBlocks, blocks - b), state.kept + kept + b * bytes_of(piece));
          }
          kept += bytes;
        }
        state.many[state.many_count++] = piece;
      }
    }
  }

  // Adds the pieces of few rows to row i of the row block, columns [first, first + count).
  void add_few(State& state, int64_t i, int64_t first, int64_t count, float* line) const {
    if (i == 0) state.cursor = 0;
    while (state.cursor < state.few_count && state.few[state.cursor].hi <= i) ++state.cursor;
    for (int64_t f = state.cursor; f < state.few_count && state.few[f].lo <= i; ++f) {
      const Piece& piece = state.few[f];
      const int64_t column = side->column[piece.slice], cols = side->cols[piece.slice];
      const int64_t begin = max64(first, column), end = min64(first + count, column + cols);
      if (begin >= end) continue;
      const AdapterRows rows{piece.pool, cols * dtype_bytes(job->table.dtype)};
      const float* weights = state.weights + piece.kept + (i - piece.lo) * piece.rank;
      with_type(job->table.dtype, [&]<DType kType>() {
        Segmented<V>::template weigh_rows<kType, 1>(
            weights, piece.rank, rows, piece.rank, begin - column, end - column,
            [&](int64_t, int64_t c, typename V::Vec sum, int64_t lanes) {
              float* at = line + (column + c - first);
              V::store(at, DType::kFloat32, V::add(V::load(at, DType::kFloat32, lanes), sum), lanes);
            });
      });
    }
  }

  struct AdapterRows {
    const char* first;
    int64_t stride;
    const char* operator[](int64_t q) const { return first + q * stride; }
  };

  static void add_floats(const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += V::kLanes) {
      const int64_t lanes = min64(V::kLanes, count - i);
      V::store(to + i, DType::kFloat32,
               V::add(V::load(to + i, DType::kFloat32, lanes), V::load(from + i, DType::kFloat32, lanes)), lanes);
    }
  }

  const void* narrow_of(const Piece& piece) const {
    return element_ptr(narrow, job->narrow_at[piece.slice], job->dtype);
  }
};

// Forward: C is yᵀ, a strip of columns of y by the rows of a row block.
template <class L, class V>
struct AdaptersForward : AdaptersBeside<L, V> {
  using Base = AdaptersBeside<L, V>;
  using G = Gemm<L>;
  using T = typename L::T;
  using Base::job, Base::side, Base::kRankBlocks;
  using typename Base::Piece;
  using typename Base::State;

  static int64_t first_panel(const Piece& piece) { return piece.lo / kPanel; }
  static int64_t panels_of(const Piece& piece) { return ceil_div(piece.hi, kPanel) - first_panel(piece); }

  bool take(State& state, int64_t row_block) const {
    return Base::take(state, row_block, row_block / kPanel * kTileBytes * kRankBlocks,
                      kRankBlocks * G::kStripBlockBytes, G::kStripRows * row_block);
  }

  void pack(const State& state, const Piece& piece, int64_t block, int64_t blocks, uint8_t* out) const {
    const int64_t first = state.row0 + first_panel(piece) * kPanel, begin = state.row0 + piece.lo;
    Pack<L>::pack_panels(this->narrow_of(piece), job->dtype, job->narrow_ld, first, state.row0 + piece.hi - first,
                         block * G::kPerVector, piece.rank, blocks, false, out,
                         [begin](int64_t row) { return row >= begin ? row : -1; });
  }

  void start(State& state, int64_t row0, int64_t rows) const {
    if (state.row0 == row0) return;
    Base::cut(
        state, row0, rows, [](const Piece& piece) { return panels_of(piece) * kTileBytes; },
        [&](const Piece& piece, int64_t block, int64_t blocks, uint8_t* out) {
          pack(state, piece, block, blocks, out);
        });
  }

  // Columns [first, first + count) of the pool, blocks [block, block + blocks) of ranks, as rows [lo, lo + count)
  // of an A strip; zeros in its other rows.
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
          for (int64_t e = 0; e < G::kPerVector; ++e) {
            reinterpret_cast<T*>(out + i * 64)[e] = ranks[e][i];
          }
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
      for (int64_t b = 0; b < all; b += kRankBlocks) {
        const int64_t now = min64(kRankBlocks, all - b);
        factor_of(piece, begin - column, begin - n0, end - begin, b, now, state.factor);
        const uint8_t* packed = state.packed;
        if (piece.kept >= 0) {
          packed = state.kept + piece.kept + b * panels * kTileBytes;
        } else {
          pack(state, piece, b, now, state.packed);
        }
        for (int64_t p = 0, width; p < panels; p += width) {
          width = G::group_width(p, panels);
          L::multiply(state.factor, packed + p * now * kTileBytes, width, now, state.c + p * kPanel,
                      state.row_block, count, {b == 0 ? FromC::kZero : FromC::kLoad, true}, none);
        }
      }
      const int64_t left = first_panel(piece) * kPanel;
      for (int64_t i = begin - n0; i < end - n0; ++i) {
        Base::add_floats(state.c + i * state.row_block + piece.lo - left, piece.hi - piece.lo,
                         c + i * ldc + piece.lo);
      }
    }
  }

  void add_row(State& state, int64_t i, int64_t n0, int64_t count, float* line) const {
    Base::add_few(state, i, n0, count, line);
  }
};

// Backward: C is dx, rows of a row block by a run of columns in the order of the look-up.
template <class L, class V>
struct AdaptersBackward : AdaptersBeside<L, V> {
  using Base = AdaptersBeside<L, V>;
  using G = Gemm<L>;
  using T = typename L::T;
  using Base::job, Base::side, Base::kRankBlocks;
  using typename Base::Piece;
  using typename Base::State;

  static int64_t first_strip(const Piece& piece) { return piece.lo / G::kStripRows; }
  static int64_t strips_of(const Piece& piece) { return ceil_div(piece.hi, G::kStripRows) - first_strip(piece); }

  bool take(State& state, int64_t row_block) const {
    return Base::take(state, row_block, row_block / G::kStripRows * G::kStripBlockBytes * kRankBlocks,
                      kRankBlocks * G::kRunPanels * kTileBytes, row_block * G::kRun);
  }

  void pack(const State& state, const Piece& piece, int64_t block, int64_t blocks, uint8_t* out) const {
    const int64_t first = state.row0 + first_strip(piece) * G::kStripRows, begin = state.row0 + piece.lo;
    Pack<L>::pack_strips(this->narrow_of(piece), job->dtype, job->narrow_ld, first, state.row0 + piece.hi - first,
                         block * G::kPerVector, piece.rank, blocks, out,
                         [begin](int64_t row) { return row >= begin ? row : -1; });
  }

  void start(State& state, int64_t row0, int64_t rows) const {
    if (state.row0 == row0) return;
    Base::cut(
        state, row0, rows, [](const Piece& piece) { return strips_of(piece) * G::kStripBlockBytes; },
        [&](const Piece& piece, int64_t block, int64_t blocks, uint8_t* out) {
          pack(state, piece, block, blocks, out);
        });
  }

  // Rows [row0, ...) of the adapter as B panels of the run's columns.
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

  void extend(State& state, int64_t k0, int64_t, float* c, int64_t ldc) const {
    NoFiller none;
    for (int64_t f = 0; f < state.many_count; ++f) {
      const Piece& piece = state.many[f];
      const int64_t strips = strips_of(piece), all = Base::blocks_of(piece),
                    top = first_strip(piece) * G::kStripRows;
      for (int64_t b = 0; b < all; b += kRankBlocks) {
        const int64_t now = min64(kRankBlocks, all - b);
        factor_of(piece, k0, b, now, state.factor);
        const uint8_t* packed = state.packed;
        if (piece.kept >= 0) {
          packed = state.kept + piece.kept + b * strips * G::kStripBlockBytes;
        } else {
          pack(state, piece, b, now, state.packed);
        }
        for (int64_t p = 0, width; p < G::kRunPanels; p += width) {
          width = G::group_width(p, G::kRunPanels);
          for (int64_t s = 0; s < strips; ++s) {
            L::multiply(packed + s * now * G::kStripBlockBytes, state.factor + p * now * kTileBytes, width, now,
                        state.c + s * G::kStripRows * G::kRun + p * kPanel, G::kRun,
                        min64(G::kStripRows, piece.hi - top - s * G::kStripRows),
                        {b == 0 ? FromC::kZero : FromC::kLoad, true}, none);
          }
        }
      }
      for (int64_t i = piece.lo; i < piece.hi; ++i) {
        Base::add_floats(state.c + (i - top) * G::kRun, G::kRun, c + i * ldc);
      }
    }
  }

  void add_row(State& state, int64_t i, int64_t k0, int64_t count, float* line) const {
    Base::add_few(state, i, k0, count, line);
  }
};

}  // namespace
}  // namespace fastlora::cpu
