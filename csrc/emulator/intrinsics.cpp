#include "intrinsics.h"

#include "machine.h"
#include "product.h"

namespace fastlora::emulator {
namespace {

constexpr uint32_t kAll = 0xffffffffu;

struct ShuffleSeat {
  uint32_t value;
  int source;
  uint32_t result;
};

struct MatrixSeat {
  const uint8_t* row;
  uint32_t* out;
  int count;
  bool transposed;
  Where at;
};

struct TileSeat {
  Half kind;
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

void check_aligned(const void* p, int bytes, Where at) {
  if ((reinterpret_cast<uintptr_t>(p) & static_cast<uintptr_t>(bytes - 1)) != 0) {
    fault(at, "accesses " + std::to_string(bytes) + " bytes at an address that is no multiple of " +
                  std::to_string(bytes));
  }
}

void count(Access access, const void* p, int bytes, Where at) {
  Thread& t = current();
  t.block.warps[static_cast<size_t>(t.warp())].instructions.add(t.block.grid.counters, access, at, t.lane(),
                                                                reinterpret_cast<uintptr_t>(p), bytes);
}

uint16_t half_at(const uint32_t* registers, int index) {
  return static_cast<uint16_t>(registers[index / 2] >> (16 * (index % 2)));
}

double value_of(Half kind, uint16_t h) {
  return static_cast<double>(kind == Half::kBFloat16 ? bf16_to_float(h) : fp16_to_float(h));
}

void load_matrices(void* const (&payloads)[32], uint32_t) {
  const auto& first = *static_cast<const MatrixSeat*>(payloads[0]);
  uint16_t matrix[4][8][8];
  for (int m = 0; m < first.count; ++m) {
    for (int r = 0; r < 8; ++r) {
      std::memcpy(matrix[m][r], static_cast<const MatrixSeat*>(payloads[m * 8 + r])->row, 16);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& seat = *static_cast<MatrixSeat*>(payloads[lane]);
    for (int m = 0; m < first.count; ++m) {
      const int major = lane / 4, minor = lane % 4 * 2;
      const uint16_t low = seat.transposed ? matrix[m][minor][major] : matrix[m][major][minor];
      const uint16_t high = seat.transposed ? matrix[m][minor + 1][major] : matrix[m][major][minor + 1];
      seat.out[m] = low | (static_cast<uint32_t>(high) << 16);
    }
  }
}

void multiply_tiles(void* const (&payloads)[32], uint32_t) {
  alignas(16) double a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& seat = *static_cast<const TileSeat*>(payloads[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      a[group + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] = value_of(seat.kind, half_at(seat.a, i));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) b[pair + i % 2 + i / 2 * 8][group] = value_of(seat.kind, half_at(seat.b, i));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) d[group + i / 2 * 8][pair + i % 2] = static_cast<double>(seat.d[i]);
  }
  add_product(d[0], a[0], b[0], 16, 8);
  for (int lane = 0; lane < 32; ++lane) {
    auto& seat = *static_cast<TileSeat*>(payloads[lane]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      seat.d[i] = static_cast<float>(d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    }
  }
}

MemoryBarrier& barrier_at(uint64_t* barrier, Where at) {
  Block& block = current().block;
  const int64_t offset = reinterpret_cast<uint8_t*>(barrier) - block.shared.base();
  const auto found = block.memory_barriers.find(offset);
  if (found == block.memory_barriers.end()) fault(at, "uses an mbarrier that was not initialised");
  return found->second;
}

}  // namespace

int thread_index() { return current().index; }
int thread_count() { return current().block.grid.shape.threads; }
int block_index(int axis) { return current().block.index[axis]; }
int block_count(int axis) { return current().block.grid.shape.grid[axis]; }
void* shared_memory() { return current().block.shared.base(); }

void sync_threads(Where at) { current().block.meet_block("a block barrier", 0, thread_count(), at); }
void sync_named(int barrier, int threads, Where at) {
  if (barrier < 1 || barrier > 15 || threads % 32 != 0) {
    fault(at, "expects a named barrier 1..15 of whole warps, got barrier " + std::to_string(barrier) + " of " +
                  std::to_string(threads) + " threads");
  }
  current().block.meet_block("a named barrier", barrier, threads, at);
}
void sync_warp(uint32_t lanes, Where at) {
  current().block.meet_warp("a warp barrier", lanes, at, nullptr, nullptr, true);
}
void sync_grid(Where at) { current().block.meet_grid(at); }

uint32_t shuffle(Shuffle kind, uint32_t value, int operand, uint32_t lanes, Where at) {
  const int lane = current().lane();
  int source = lane;
  switch (kind) {
    case Shuffle::kIndex: source = operand & 31; break;
    case Shuffle::kXor: source = lane ^ operand; break;
    case Shuffle::kUp: source = lane - operand < 0 ? lane : lane - operand; break;
    case Shuffle::kDown: source = lane + operand > 31 ? lane : lane + operand; break;
  }
  if (source < 0 || source > 31) source = lane;
  if ((lanes >> source & 1) == 0)
    fault(at, "shuffles from lane " + std::to_string(source) + ", which its mask lacks");
  ShuffleSeat seat{value, source, 0};
  current().block.meet_warp(
      "a shuffle", lanes, at, &seat,
      [](void* const(&payloads)[32], uint32_t present) {
        for (int i = 0; i < 32; ++i) {
          if ((present >> i & 1) == 0) continue;
          auto& mine = *static_cast<ShuffleSeat*>(payloads[i]);
          mine.result = static_cast<const ShuffleSeat*>(payloads[mine.source])->value;
        }
      },
      false);
  return seat.result;
}

uint32_t ballot(bool vote, uint32_t lanes, Where at) {
  uint32_t seat = vote ? 1 : 0;
  current().block.meet_warp(
      "a vote", lanes, at, &seat,
      [](void* const(&payloads)[32], uint32_t present) {
        uint32_t votes = 0;
        for (int i = 0; i < 32; ++i) {
          if ((present >> i & 1) != 0) votes |= *static_cast<const uint32_t*>(payloads[i]) << i;
        }
        for (int i = 0; i < 32; ++i) {
          if ((present >> i & 1) != 0) *static_cast<uint32_t*>(payloads[i]) = votes;
        }
      },
      false);
  return seat;
}

void touch_global(const void* p, int bytes, bool write, Where at) {
  check_aligned(p, bytes, at);
  Thread& t = current();
  GlobalMemory& global = t.block.grid.global;
  if (write) {
    global.write(p, bytes, t.actor(), at);
  } else {
    global.read(p, bytes, t.actor(), at);
  }
  count(write ? Access::kGlobalStore : Access::kGlobalLoad, p, bytes, at);
}

void touch_shared(const void* p, int bytes, bool write, Where at) {
  check_aligned(p, bytes, at);
  Thread& t = current();
  if (write) {
    t.block.shared.write(p, bytes, t.actor(), at);
  } else {
    t.block.shared.read(p, bytes, t.actor(), at);
  }
  count(write ? Access::kSharedStore : Access::kSharedLoad, p, bytes, at);
}

void touch_atomic(const void* p, int bytes, Where at) {
  check_aligned(p, bytes, at);
  Thread& t = current();
  if (t.block.shared.contains(p)) {
    t.block.shared.atomic(p, bytes, t.actor(), at);
  } else {
    t.block.grid.global.atomic(p, bytes, t.actor(), at);
  }
}

void copy_async(void* to, const void* from, int bytes, int valid, Where at) {
  if ((bytes != 4 && bytes != 8 && bytes != 16) || valid < 0 || valid > bytes) {
    fault(at, "copies " + std::to_string(valid) + " of " + std::to_string(bytes) + " bytes; expected 4, 8 or 16");
  }
  check_aligned(to, bytes, at);
  Thread& t = current();
  AsyncCopy copy{static_cast<uint8_t*>(to), {}, bytes, t.groups_committed, at};
  if (valid > 0) {
    check_aligned(from, bytes, at);
    t.block.grid.global.read(from, valid, t.actor(), at);
    std::memcpy(copy.data, from, static_cast<size_t>(valid));
    count(Access::kGlobalLoad, from, bytes, at);
  }
  count(Access::kSharedStore, to, bytes, at);
  t.block.shared.begin_copy(to, bytes, t.actor(), at);
  t.copies.push_back(copy);
}

void copy_async_commit(Where) { ++current().groups_committed; }

void copy_async_wait(int pending, Where at) {
  Thread& t = current();
  const int64_t landed = t.groups_committed - pending;  // groups below this number
  std::erase_if(t.copies, [&](const AsyncCopy& copy) {
    if (copy.group >= landed) return false;
    t.block.shared.land_copy(copy.to, copy.bytes, t.actor(), at);
    std::memcpy(copy.to, copy.data, static_cast<size_t>(copy.bytes));
    return true;
  });
}

void load_matrix(uint32_t* out, int matrices, bool transposed, const void* row, Where at) {
  Thread& t = current();
  if (t.lane() < matrices * 8) {
    check_aligned(row, 16, at);
    t.block.shared.read(row, 16, t.actor(), at);
  }
  MatrixSeat seat{static_cast<const uint8_t*>(row), out, matrices, transposed, at};
  t.block.meet_warp(
      "ldmatrix", kAll, at, &seat,
      [](void* const(&payloads)[32], uint32_t lanes) {
        const auto& first = *static_cast<const MatrixSeat*>(payloads[0]);
        for (int m = 0; m < first.count; ++m) {
          std::array<uint64_t, 8> rows;
          for (size_t r = 0; r < 8; ++r) {
            rows[r] = reinterpret_cast<uintptr_t>(
                static_cast<const MatrixSeat*>(payloads[static_cast<size_t>(m) * 8 + r])->row);
          }
          current().block.grid.counters.add_matrix(first.at, rows);
        }
        load_matrices(payloads, lanes);
      },
      false);
}

void multiply_tile(Half kind, float* d, const uint32_t* a, const uint32_t* b, Where at) {
  TileSeat seat{kind, d, a, b};
  current().block.meet_warp("mma", kAll, at, &seat, multiply_tiles, false);
}

void memory_barrier_init(uint64_t* barrier, int count, Where at) {
  check_aligned(barrier, 8, at);
  Thread& t = current();
  t.block.shared.write(barrier, 8, t.actor(), at);
  t.block.memory_barriers.insert_or_assign(
      reinterpret_cast<uint8_t*>(barrier) - t.block.shared.base(),
      MemoryBarrier{.expected = count, .pending = count, .arrived = Gathering(thread_count())});
}

void memory_barrier_arrive(uint64_t* barrier, Where at) {
  Thread& t = current();
  MemoryBarrier& b = barrier_at(barrier, at);
  t.block.shared.atomic(barrier, 8, t.actor(), at);
  t.block.arrive_memory(b);
}

void memory_barrier_wait(uint64_t* barrier, int parity, Where at) {
  current().block.wait_memory(barrier_at(barrier, at), parity, at);
}

void wait_for_previous_launch(Where) {
  Thread& t = current();
  t.previous_over = true;
  t.block.launch_waits.emplace_back(t.index, t.clock.now());
}

}  // namespace fastlora::emulator
