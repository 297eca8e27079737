// Products of a warpgroup: issued by all of its threads together, done when each of them has waited.
#include <algorithm>
#include <bit>
#include <cmath>

#include "intrinsics.h"
#include "machine.h"
#include "product.h"

namespace fastlora::emulator {
namespace {

constexpr uint32_t kPoison = 0x7fc0dead;  // a NaN

struct Seat {
  Half kind;
  int columns;
  float* d;
  const uint32_t* a;
  const void* b;
  int step;
};

double value_of(Half kind, uint32_t pair, int which) {
  const auto h = static_cast<uint16_t>(pair >> 16 * which);
  return static_cast<double>(kind == Half::kBFloat16 ? bf16_to_float(h) : fp16_to_float(h));
}

const Seat& seat_of(const Thread& thread) { return *static_cast<const Seat*>(thread.meeting.payload); }

// What all that issue a product must have in common, and each must have done.
void check_issue(const std::vector<Thread*>& threads, Where at) {
  const Seat& first = seat_of(*threads.front());
  for (const Thread* thread : threads) {
    const Seat& seat = seat_of(*thread);
    const std::string who = "thread " + std::to_string(thread->index);
    if (seat.b != first.b || seat.step != first.step || seat.kind != first.kind || seat.columns != first.columns) {
      fault(at, "multiplies by another tile than " + who + " of its warpgroup");
    }
    if (thread->products.groups_committed != threads.front()->products.groups_committed) {
      fault(at, "multiplies where " + who + " of its warpgroup has committed another number of groups");
    }
    if (!thread->products.fenced) {
      fault(at, "multiplies where " + who + " has called no fence_warpgroup since its last wait, or at all");
    }
  }
}

// For every thread of the block, the last of its moments that all of `readers` have seen; and the last one such
// that they have seen a proxy fence after what it wrote then.
void moments_seen(const Block& block, const std::vector<Thread*>& readers, std::vector<Moment>& seen,
                  std::vector<Moment>& fenced) {
  std::vector<const Moment*> distinct;
  for (const Thread* reader : readers) {
    const Moment* moments = reader->clock.seen().get();
    if (std::find(distinct.begin(), distinct.end(), moments) == distinct.end()) distinct.push_back(moments);
  }
  for (const auto& thread : block.threads) {
    const auto t = static_cast<size_t>(thread->index);
    seen[t] = distinct.front()[t];
    for (const Moment* moments : distinct) seen[t] = std::min(seen[t], moments[t]);
    const std::vector<Moment>& fences = thread->proxy_fences;
    const auto after = std::lower_bound(fences.begin(), fences.end(), seen[t]);
    fenced[t] = after == fences.begin() ? 0 : *std::prev(after);
  }
}

void check_untouched(const Products::Sum& sum, Where at) {
  for (size_t i = 0; i < sum.values.size(); ++i) {
    if (std::bit_cast<uint32_t>(sum.registers[i]) != kPoison) {
      fault(at, "finds an accumulator written while a product into it was under way");
    }
  }
}

// The thread's sum in these registers, begun if there is none under way.
Products::Sum& sum_at(Thread& thread, float* registers, size_t count, Where at) {
  for (Products::Sum& sum : thread.products.sums) {
    const float *end = registers + count, *its_end = sum.registers + sum.values.size();
    if (end <= sum.registers || its_end <= registers) continue;
    if (sum.registers != registers || sum.values.size() != count) {
      fault(at, "multiplies into registers of a product of another shape that is under way");
    }
    check_untouched(sum, at);
    return sum;
  }
  Products::Sum& sum =
      thread.products.sums.emplace_back(Products::Sum{registers, 0, {registers, registers + count}});
  std::fill_n(registers, count, std::bit_cast<float>(kPoison));
  return sum;
}

// B as 16 rows of `columns`.
void read_tile(const Seat& seat, double* b) {
  const auto* tile = static_cast<const uint8_t*>(seat.b);
  for (int column = 0; column < seat.columns; ++column) {
    for (int k = 0; k < 16; ++k) {
      const int chunk = (2 * seat.step + k / 8) ^ (column % 8);
      uint16_t h;
      std::memcpy(&h, tile + 128 * column + 16 * chunk + 2 * (k % 8), 2);
      b[k * seat.columns + column] = value_of(seat.kind, h, 0);
    }
  }
}

// One warp's 16 rows. A lane's registers are laid out over them as multiply_tile's, again for every eight columns.
void multiply_rows(const std::vector<Thread*>& threads, int warp, const double* b, Where at) {
  alignas(16) double a[16 * 16], d[16 * 256];
  const int columns = seat_of(*threads.front()).columns;
  const auto count = static_cast<size_t>(columns / 2);
  const auto place = [columns](int lane, int i) {
    return (lane / 4 + i / 2 % 2 * 8) * columns + i / 4 * 8 + lane % 4 * 2 + i % 2;
  };
  for (int lane = 0; lane < 32; ++lane) {
    Thread& thread = *threads[static_cast<size_t>(warp * 32 + lane)];
    const Seat& seat = seat_of(thread);
    for (int i = 0; i < 8; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, k = lane % 4 * 2 + i % 2 + i / 4 * 8;
      a[row * 16 + k] = value_of(seat.kind, seat.a[i / 2], i % 2);
    }
    const Products::Sum& sum = sum_at(thread, seat.d, count, at);
    for (int i = 0; i < columns / 2; ++i)
      d[place(lane, i)] = static_cast<double>(sum.values[static_cast<size_t>(i)]);
  }
  add_product(d, a, b, 16, columns);
  for (int lane = 0; lane < 32; ++lane) {
    Thread& thread = *threads[static_cast<size_t>(warp * 32 + lane)];
    Products::Sum& sum = sum_at(thread, seat_of(thread).d, count, at);
    sum.group = thread.products.groups_committed;
    for (int i = 0; i < columns / 2; ++i)
      sum.values[static_cast<size_t>(i)] = static_cast<float>(d[place(lane, i)]);
  }
}

void issue(Block& block, const std::vector<Thread*>& threads, Where at) {
  check_issue(threads, at);
  const Seat& seat = seat_of(*threads.front());
  std::vector<Moment> seen(block.threads.size()), fenced(block.threads.size());
  moments_seen(block, threads, seen, fenced);
  const int read = block.shared.begin_tile_read({seat.b, seat.columns, seat.step, threads.front()->index},
                                                seen.data(), fenced.data(), at);
  for (Thread* thread : threads) {
    thread->products.reads.push_back({read, thread->products.groups_committed, at});
  }
  alignas(16) double b[16 * 256];
  read_tile(seat, b);
  for (int warp = 0; warp < 4; ++warp) multiply_rows(threads, warp, b, at);
}

}  // namespace

void multiply_warpgroup(Half kind, int columns, float* d, const uint32_t* a, const void* b, int step, Where at) {
  if (reinterpret_cast<uintptr_t>(b) % 1024 != 0 || step < 0 || step > 3) {
    fault(at, "multiplies by a tile that begins at no multiple of 1024, or by step " + std::to_string(step) +
                  " of 0 to 3");
  }
  Seat seat{kind, columns, d, a, b, step};
  current().block.meet_warpgroup("wgmma", at, &seat, issue);
}

void fence_warpgroup(Where) { current().products.fenced = true; }

void commit_warpgroup(Where) { ++current().products.groups_committed; }

void wait_warpgroup(int pending, Where at) {
  Thread& t = current();
  Products& products = t.products;
  products.fenced = false;
  const int64_t done = products.groups_committed - pending;  // groups below this number
  std::erase_if(products.sums, [&](const Products::Sum& sum) {
    if (sum.group >= done) return false;
    check_untouched(sum, at);
    std::copy(sum.values.begin(), sum.values.end(), sum.registers);
    return true;
  });
  std::erase_if(products.reads, [&](const Products::Read& read) {
    if (read.group >= done) return false;
    t.block.shared.end_tile_read(read.number, t.actor());
    return true;
  });
}

void fence_async_proxy(Where) {
  Thread& t = current();
  t.proxy_fences.push_back(t.clock.now());
  t.clock.tick();  // what it writes from now on is not fenced
}

void set_registers(Where at) { current().block.meet_warpgroup("setmaxnreg", at, nullptr, nullptr); }

}  // namespace fastlora::emulator
