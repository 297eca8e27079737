// How the kernels that share a tile of W and of x among a block of threads bring them into shared memory, in both
// directions: steps of the contraction go through a ring, filled by cp.async.
//
// A stage holds 128 rows of W by 128 columns (64 bytes a row, in the table's gaps) and kColumns * 8 rows of x by
// the 128 steps of the contraction that belong to it: columns of W forward, rows of W for the input gradient.
#pragma once

#include "nf4_routed.cuh"

namespace fastlora::cuda {

inline constexpr int kTileThreads = 256;
inline constexpr int kTileStep = 128;  // rows and columns of W in a stage
inline constexpr int kStageGaps = 64;  // 8 KiB of W

// Where x begins, and behind its ring the factors of the scales and then the scales.
inline constexpr int kXAt = kPairTableBytes;

constexpr int x_stage_bytes(int columns) { return columns * 8 * 2 * kTileStep; }
constexpr int stages(int columns) { return columns >= 8 ? 2 : 4; }
constexpr int scales_at(int columns) { return kXAt + stages(columns) * x_stage_bytes(columns) + 256 * 4; }

template <int kColumns>
inline constexpr int kXStageBytes = x_stage_bytes(kColumns);
template <int kColumns>
inline constexpr int kStages = stages(kColumns);
template <int kColumns>
inline constexpr int kScalesAt = scales_at(kColumns);
template <int kColumns>
inline constexpr int kFactorsAt = kScalesAt<kColumns> - 256 * 4;

// Scales of a row in a stage, as a power of two: one for every 64 columns, or every 32.
FASTLORA_DEVICE int scale_bits(int shift) { return shift == 5 ? 2 : 1; }

// Of a launch; those that are ragged decode their scales where they use them.
inline int tile_shared_bytes(int columns, int shift, bool ragged) {
  return scales_at(columns) + (ragged ? 0 : 2 * (shift == 5 ? 4 : 2) * kTileStep * 4);
}

// ---- W ------------------------------------------------------------------------------------------------------

inline constexpr int kWStageBytes = kStageGaps * kPairPitch;

// Where in a stage the 32 bytes of row `row` lie that hold columns 64 * half and on. Rows read at once must differ
// in bits kSwizzle and kSwizzle + 1 of their number: they lie in different quarters of a gap.
template <int kSwizzle>
FASTLORA_DEVICE int weight_place(int row, int half) {
  return row / 2 * kPairPitch + kGapBytes + ((row % 2 * 2 + half) ^ (row >> kSwizzle & 3)) * 32;
}

// 16 bytes of which `valid` exist, the others zero, by copies as wide as the address allows.
FASTLORA_DEVICE void copy_weights_by(int width, uint8_t* to, const uint8_t* from, int valid FASTLORA_AT) {
  const auto rest = [valid](int begin, int most) {
    return valid <= begin ? 0 : valid - begin < most ? valid - begin : most;
  };
  if (width == 16) {
    copy_async<16>(to, from, rest(0, 16) FASTLORA_HERE);
  } else if (width == 8) {
    for (int i = 0; i < 16; i += 8) copy_async<8>(to + i, from + i, rest(i, 8) FASTLORA_HERE);
  } else if (width == 4) {
    for (int i = 0; i < 16; i += 4) copy_async<4>(to + i, from + i, rest(i, 4) FASTLORA_HERE);
  } else {
    for (int i = 0; i < 16; ++i) {
      store_shared(to + i, i < valid ? load_readonly(from + i FASTLORA_HERE) : uint8_t{0} FASTLORA_HERE);
    }
  }
}

// ---- x ------------------------------------------------------------------------------------------------------

// Where in a stage the 16 bytes of row `row` of x lie that hold steps 64 * half + 8 * vector and on; any 8
// adjacent rows, and any 8 vectors, are in different banks.
template <int kColumns>
FASTLORA_DEVICE int x_place(int row, int half, int vector) {
  return half * kColumns * 1024 + row * 128 + (vector ^ row % 8) * 16;
}

// ---- a thread's share of both -------------------------------------------------------------------------------

// Copies stage after stage of the tile that begins at a row of x and at a row and column of W, whose contraction
// goes along the columns of W (kAlongRows: along its rows). Zeros outside of both. What moves is the same for all
// threads.
template <int kColumns, int kSwizzle, bool kAlongRows, bool kVectors, class Args = ProductArgs>
class TileCopy {
 public:
  FASTLORA_DEVICE TileCopy(const Args& args, int first_x_row, int first_row, int first_column)
      : args_(args),
        w_from_(args.packed + first_row * args.row_bytes + first_column / 2),
        x_from_(static_cast<const uint16_t*>(args.x) + first_x_row * int64_t{x_width()} +
                (kAlongRows ? first_row : first_column)),
        w_rows_(args.n - first_row),
        w_bytes_(static_cast<int>(args.row_bytes) - first_column / 2),
        x_rows_(args.m - first_x_row - x_row()),
        x_steps_(kAlongRows ? args.n - first_row : args.k - first_column),
        w_offset_(w_row() * static_cast<int>(args.row_bytes) + w_byte()),
        x_offset_(x_row() * x_width() + x_step()) {
    FASTLORA_UNROLL
    for (int j = 0; j < kKeptSources; ++j) x_sources_[j] = look_up_source(j);
  }

  FASTLORA_DEVICE void next(int stage FASTLORA_AT) {
    auto* to = shared_memory<uint8_t>(stage * kWStageBytes + weight_place<kSwizzle>(w_row(), w_byte() / 32) +
                                      w_byte() % 32);
    FASTLORA_UNROLL
    for (int j = 0; j < 2; ++j) {  // 64 rows on are 32 gaps on
      const uint8_t* from = w_from_ + (j == 0 ? 0 : 64 * args_.row_bytes) + w_offset_;
      const int valid = w_row() + 64 * j < w_rows_ ? w_bytes_ - w_byte() : 0;
      if constexpr (kVectors) {
        copy_async<16>(to + j * 32 * kPairPitch, from, valid > 0 ? 16 : 0 FASTLORA_HERE);
      } else {
        copy_weights_by(args_.weight_vector, to + j * 32 * kPairPitch, from, valid FASTLORA_HERE);
      }
    }
    if (kColumns > 1 || thread_index() < 128) {
      auto* x_to = shared_memory<uint8_t>(kXAt + stage * kXStageBytes<kColumns> +
                                          x_place<kColumns>(x_row(), x_step() / 64, x_step() / 8 % 8));
      const uint16_t* from = x_from_ + x_offset_;
      FASTLORA_UNROLL
      for (int j = 0; j < (kColumns + 1) / 2; ++j) {
        int valid = 16 * j < x_rows_ ? x_steps_ - x_step() : 0;
        if constexpr (kIsRouted<Args>) {
          const int row = kKeptSources > 0 ? x_sources_[kKeptSources > 0 ? j : 0] : look_up_source(j);
          if (row < 0) valid = 0;
          from = static_cast<const uint16_t*>(args_.x) + (row < 0 ? 1 : row + 1) * int64_t{x_width()} - x_steps_ +
                 x_step();  // not from x_from_, which would take registers
        }
        if (kVectors || args_.x_vectors) {
          copy_async<16>(x_to + j * 2048, from, valid > 0 ? 16 : 0 FASTLORA_HERE);
        } else {
          store_shared(reinterpret_cast<Words4*>(x_to + j * 2048),
                       load_halves(from, valid, false FASTLORA_HERE) FASTLORA_HERE);
        }
        from += 16 * int64_t{x_width()};
      }
    }
    if constexpr (kAlongRows) {
      w_from_ += kTileStep * args_.row_bytes;
      w_rows_ -= kTileStep;
    } else {
      w_from_ += kTileStep / 2;
      w_bytes_ -= kTileStep / 2;
    }
    x_from_ += kTileStep;
    x_steps_ -= kTileStep;
  }

 private:
  static FASTLORA_DEVICE int w_row() { return thread_index() / 4; }
  static FASTLORA_DEVICE int w_byte() { return thread_index() % 4 * 16; }
  static FASTLORA_DEVICE int x_row() { return thread_index() / 16; }
  static FASTLORA_DEVICE int x_step() { return thread_index() % 16 * 8; }
  FASTLORA_DEVICE int x_width() const { return kAlongRows ? args_.n : args_.k; }

  // Where rows are gathered: those that the thread copies, -1 for none. Kept where there are registers for them.
  static constexpr int kKeptSources = kIsRouted<Args> && kVectors && kColumns != 4 ? (kColumns + 1) / 2 : 0;
  FASTLORA_DEVICE int look_up_source(int j) const {
    if constexpr (kIsRouted<Args>) {
      if (16 * j < x_rows_) return row_at(args_.segments, args_.m - x_rows_ + 16 * j);
    }
    return -1;
  }
  int x_sources_[kKeptSources > 0 ? kKeptSources : 1];

  const Args& args_;
  const uint8_t* w_from_;                    // of the tile's next stage
  const uint16_t* x_from_;                   // likewise
  int w_rows_, w_bytes_, x_rows_, x_steps_;  // left; x_rows_ from the thread's own on
  const int w_offset_, x_offset_;            // the thread's own
};

// ---- scales -------------------------------------------------------------------------------------------------

// The scales of a stage, where no scale block straddles rows of W: fetched a stage ahead, then stored decoded as
// (scales a row, 128 rows), in two buffers by turns: float32, or with kSplit as split_scale has them. Those
// outside of W are finite.
template <DType D, int kColumns, bool kSplit>
class StageScales {
 public:
  template <class Args>
  explicit FASTLORA_DEVICE StageScales(const Args& args) : reader_(args.scales) {}

  FASTLORA_DEVICE void fetch(const ProductArgs& args, int row, int column FASTLORA_AT) {
    const int bits = scale_bits(args.shift), row_blocks = args.k >> args.shift;
    FASTLORA_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int i = thread_index() + kTileThreads * j;
      if (j > 0 && bits == 1) break;
      const int r = row + (i >> bits), c = column + (i & ((1 << bits) - 1)) * (kTileStep >> bits);
      raw_[j] = r < args.n && c < args.k ? reader_.fetch(r * row_blocks + (c >> args.shift) FASTLORA_HERE)
                                         : RawScale{0.0f, 0};
    }
  }

  FASTLORA_DEVICE void store(const ProductArgs& args, int turn, float stretch FASTLORA_AT) const {
    const int bits = scale_bits(args.shift);
    FASTLORA_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int i = thread_index() + kTileThreads * j;
      if (j > 0 && bits == 1) break;
      const float scale =
          reader_.decode(raw_[j], shared_memory<float>(kFactorsAt<kColumns>), stretch FASTLORA_HERE);
      store_shared(of(args, turn) + (i & ((1 << bits) - 1)) * kTileStep + (i >> bits),
                   kSplit ? split_scale<D>(scale) : bits_of(scale) FASTLORA_HERE);
    }
  }

  static FASTLORA_DEVICE uint32_t* of(const ProductArgs& args, int turn) {
    return shared_memory<uint32_t>(kScalesAt<kColumns>) + (turn % 2 << scale_bits(args.shift)) * kTileStep;
  }

  FASTLORA_DEVICE const ScaleReader& reader() const { return reader_; }

 private:
  ScaleReader reader_;
  RawScale raw_[2];
};

// The scales of a few adjacent weights of one row, where scale blocks may straddle rows: at most two.
template <DType D>
struct RunScales {
  PairScale first, second;
  int boundary;  // weights of the first

  // `count` weights from (row, column) on.
  FASTLORA_DEVICE RunScales(const ProductArgs& args, const ScaleReader& reader, const float* factors,
                            float stretch, int row, int column, int count FASTLORA_AT) {
    boundary = count;
    first = second = {0, 0};
    if (row >= args.n || column >= args.k) return;
    const int64_t flat = static_cast<int64_t>(row) * args.k + column, block = flat >> args.shift;
    const int64_t left = ((block + 1) << args.shift) - flat;
    first = scale_of(reader, block, factors, stretch FASTLORA_HERE);
    if (left >= count || left >= args.k - column) return;
    boundary = static_cast<int>(left);
    second = scale_of(reader, block + 1, factors, stretch FASTLORA_HERE);
  }

  static FASTLORA_DEVICE PairScale scale_of(const ScaleReader& reader, int64_t block, const float* factors,
                                            float stretch FASTLORA_AT) {
    return pair_scale(
        split_scale<D>(reader.decode(reader.fetch(block FASTLORA_HERE), factors, stretch FASTLORA_HERE)));
  }

  // For weights 2 * pair and the next.
  FASTLORA_DEVICE PairScale of_pair(int pair) const {
    if (2 * pair + 1 < boundary) return first;
    if (2 * pair >= boundary) return second;
    return {byte_permute(first.high, second.high, 0x5410), byte_permute(first.low, second.low, 0x5410)};
  }
};

}  // namespace fastlora::cuda
