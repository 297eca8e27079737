// Rows sorted by adapter slot, and the checks that keep kernels inside what a table and a routing describe.
#include <cstring>

#include "parallel.h"
#include "segmented_job.h"

namespace fastlora {
namespace {

using namespace cpu;

int64_t slot_at(const LoraRouteArgs& a, int64_t i) {
  return a.wide ? static_cast<const int64_t*>(a.slots)[i] : static_cast<const int32_t*>(a.slots)[i];
}

bool valid_entries(const AdapterTable& t) {
  for (int64_t j = 0; j < t.slices; ++j) {
    for (int64_t s = 0; s < t.capacity; ++s) {
      const int64_t first = t.entries[2 * (j * t.capacity + s)], rank = t.entries[2 * (j * t.capacity + s) + 1];
      if (rank == 0) continue;
      if (rank < 0 || rank > t.slice[j].width || first < 0 || first > t.slice[j].rows - rank) return false;
    }
  }
  return true;
}

// Segments cut [0, routed) into pieces in the order of their slots; the number of pieces, or -1.
int64_t count_segments(const Routing& r, int64_t capacity) {
  int64_t slot = -1, at = 0;
  for (int64_t i = 0; i < r.segment_rows; ++i) {
    const int64_t here = r.segments[2 * i], begin = r.segments[2 * i + 1];
    if (here == -1) {
      if (begin < at || begin > r.m || (i == 0 ? begin != 0 : begin == at)) return -1;
      for (int64_t rest = i + 1; rest < r.segment_rows; ++rest) {
        if (r.segments[2 * rest] != -1 || r.segments[2 * rest + 1] != begin) return -1;
      }
      return i;
    }
    if (here <= slot || here >= capacity || (i == 0 ? begin != 0 : begin <= at)) return -1;
    slot = here;
    at = begin;
  }
  return -1;
}

bool is_permutation(const int32_t* order, int64_t m, uint8_t* seen) {
  std::memset(seen, 0, static_cast<size_t>(m));
  for (int64_t p = 0; p < m; ++p) {
    const int64_t row = order[p];
    if (row < 0 || row >= m || seen[row] != 0) return false;
    seen[row] = 1;
  }
  return true;
}

}  // namespace

// A stable counting sort: counts by slot, their running sum, and every row to its place.
Status lora_route(const LoraRouteArgs& a) {
  if (a.m < 0 || a.capacity < 0 || a.m > INT32_MAX || a.capacity > INT32_MAX) return Status::kBadArgument;
  for (int64_t i = 0; i < a.m; ++i) {
    const int64_t slot = slot_at(a, i);
    if (slot < -1 || slot >= a.capacity) return Status::kBadArgument;
  }
  // The place of a slot's next row; the last one is of rows without an adapter.
  auto* next = static_cast<int32_t*>(thread_scratch(static_cast<size_t>(a.capacity + 1) * sizeof(int32_t)));
  if (next == nullptr) return Status::kOutOfMemory;
  std::memset(next, 0, static_cast<size_t>(a.capacity + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < a.m; ++i) {
    const int64_t slot = slot_at(a, i);
    ++next[slot < 0 ? a.capacity : slot];
  }
  int32_t at = 0;
  int64_t segments = 0;
  for (int64_t slot = 0; slot < a.capacity; ++slot) {
    const int32_t count = next[slot];
    if (count > 0) {
      a.segments[2 * segments] = static_cast<int32_t>(slot);
      a.segments[2 * segments + 1] = at;
      ++segments;
    }
    next[slot] = at;
    at += count;
  }
  next[a.capacity] = at;
  for (int64_t rows = min64(a.m, a.capacity) + 1; segments < rows; ++segments) {
    a.segments[2 * segments] = -1;
    a.segments[2 * segments + 1] = at;
  }
  for (int64_t i = 0; i < a.m; ++i) {
    const int64_t slot = slot_at(a, i);
    a.order[next[slot < 0 ? a.capacity : slot]++] = static_cast<int32_t>(i);
  }
  return Status::kOk;
}

Status cpu::make_segmented_job(const AdapterTable& table, const Routing& routing, int64_t m, int64_t k, int64_t n,
                               DType dtype, int32_t threads, SegmentedJob* job) {
  if (m < 0 || k < 0 || n < 0 || m > INT32_MAX || routing.m != m || routing.segment_rows < 1) {
    return Status::kBadArgument;
  }
  if (table.slices < 1 || table.slices > kMaxSlices || table.capacity < 0) return Status::kBadArgument;
  *job = {.table = table,
          .routing = routing,
          .dtype = dtype,
          .threads = threads,
          .k = k,
          .n = n,
          .routed = 0,
          .segments = 0,
          .narrow_ld = 0,
          .narrow_at = {},
          .a = {.pool = {}, .cols = {}, .column = {}, .ld = k, .disjoint = false},
          .b = {.pool = {}, .cols = {}, .column = {}, .ld = n, .disjoint = true}};
  int64_t column = 0;
  for (int64_t j = 0; j < table.slices; ++j) {
    const AdapterSlice& slice = table.slice[j];
    if (slice.rows < 0 || slice.n < 0 || slice.width < 0) return Status::kBadArgument;
    job->a.pool[j] = slice.a;
    job->a.cols[j] = k;
    job->b.pool[j] = slice.b;
    job->b.cols[j] = slice.n;
    job->b.column[j] = column;
    column += slice.n;
    job->narrow_at[j] = job->narrow_ld;
    job->narrow_ld += slice.width;
  }
  if (column != n || !valid_entries(table)) return Status::kBadArgument;
  job->segments = count_segments(routing, table.capacity);
  if (job->segments < 0) return Status::kBadArgument;
  job->routed = routing.segments[2 * job->segments + 1];
  auto* seen = static_cast<uint8_t*>(thread_scratch(static_cast<size_t>(m + 1)));
  if (seen == nullptr) return Status::kOutOfMemory;
  return is_permutation(routing.order, m, seen) ? Status::kOk : Status::kBadArgument;
}

}  // namespace fastlora
