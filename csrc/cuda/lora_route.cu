// Rows sorted by adapter slot, once for all layers of a batch: a stable counting sort on the device, which nothing
// waits for.
//
// One launch. A warp has adjacent rows and walks through them 32 at a time; lanes with one digit of their slots
// find each other by ballots, so that a row's place among them is a count of bits, the same on every run. A pass
// sorts by 8 bits; slots below 255 take one. Blocks hand each other their counts through memory between grid-wide
// barriers; up to kBlockRows rows one block is enough, and its own barriers.
#include "kernels.cuh"
#include "launch.cuh"
#include "nf4_linear.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kDigits = 256;
constexpr int kBlockRows = 1024;                 // that a block has at least, where there are several
constexpr int kTotalsAt = kWarps * kDigits * 4;  // behind (warps, digits) counts, then places
constexpr int kSharedBytes = kTotalsAt + 2 * kWarps * 4;

struct RouteArgs {
  const void* slots;  // (m) int32, or int64
  int32_t* order;     // (m)
  int32_t* other;     // (m), with more than one pass
  int32_t* segments;  // (segment_rows, 2)
  int32_t* counts;    // (blocks, kDigits)
  int32_t* totals;    // (blocks, 2): segments that begin among a block's rows in order, and routed rows
  int m, capacity, segment_rows, passes;
  int share;  // rows of a block, a multiple of kThreads
  bool wide;  // slots are int64
};

struct Route {
  const RouteArgs& args;
  const int warp = warp_index(), lane = lane_index();
  const uint32_t below = (1u << lane) - 1;
  const int first = block_index() * args.share + warp * (args.share / kWarps);  // of the warp's rows
  const int end = first + args.share / kWarps < args.m ? first + args.share / kWarps : args.m;

  // The slot; the capacity stands for none.
  FASTLORA_DEVICE int key_of(int row) const {
    const int64_t slot = args.wide ? load_readonly(static_cast<const int64_t*>(args.slots) + row)
                                   : load_readonly(static_cast<const int32_t*>(args.slots) + row);
    return slot >= 0 && slot < args.capacity ? static_cast<int>(slot) : args.capacity;
  }

  FASTLORA_DEVICE int32_t* count_of(int w, int digit) const {
    return shared_memory<int32_t>((w * kDigits + digit) * 4);
  }

  FASTLORA_DEVICE void meet() const {
    if (block_count() > 1) {
      sync_grid();
    } else {
      sync_threads();
    }
  }

  // Lanes with this lane's digit, of those that have a row.
  FASTLORA_DEVICE uint32_t peers_of(int digit, bool inside) const {
    uint32_t peers = ballot(inside);
    for (int bit = 1; bit < kDigits; bit *= 2) {
      const bool set = (digit & bit) != 0;
      const uint32_t with = ballot(set);
      peers &= set ? with : ~with;
    }
    return peers;
  }

  // What every 32 rows of the warp add to its counts of digits; before it does, take(row, place) sees where they
  // stand.
  template <class Take>
  FASTLORA_DEVICE void walk(const int32_t* from, int pass, Take take) const {
    for (int i = first; i < end; i += 32) {
      const bool inside = i + lane < end;
      int row = inside ? i + lane : 0;
      if (from != nullptr && inside) row = load_global(from + row);
      const int digit = inside ? key_of(row) >> (8 * pass) & (kDigits - 1) : 0;
      const uint32_t peers = peers_of(digit, inside);
      const int before = inside ? load_shared(count_of(warp, digit)) : 0;
      if (inside) take(row, before + count_bits(peers & below));
      sync_warp();
      if (inside && (peers & below) == 0) store_shared(count_of(warp, digit), before + count_bits(peers));
      sync_warp();
    }
  }

  // From counts of the warps' rows to the places where each begins with each digit. Thread t has digit t.
  FASTLORA_DEVICE void place_digits() const {
    const int digit = thread_index();
    int mine = 0;
    for (int w = 0; w < kWarps; ++w) mine += load_shared(count_of(w, digit));
    store_global(args.counts + block_index() * kDigits + digit, mine);
    meet();
    int before = 0, total = 0;
    for (int b = 0; b < block_count(); ++b) {
      const int count = load_global(args.counts + b * kDigits + digit);
      if (b < block_index()) before += count;
      total += count;
    }
    int sum = total;  // of the digits up to this one
    for (int by = 1; by < 32; by *= 2) {
      const auto other = static_cast<int>(shuffle_up(static_cast<uint32_t>(sum), by));
      if (lane >= by) sum += other;
    }
    auto* sums = shared_memory<int32_t>(kTotalsAt);
    if (lane == 31) store_shared(sums + warp, sum);
    sync_threads();
    int place = sum - total + before;
    for (int w = 0; w < warp; ++w) place += load_shared(sums + w);
    for (int w = 0; w < kWarps; ++w) {
      const int count = load_shared(count_of(w, digit));
      store_shared(count_of(w, digit), place);
      place += count;
    }
    sync_threads();
  }

  FASTLORA_DEVICE void sort() const {
    const int32_t* from = nullptr;
    for (int pass = 0; pass < args.passes; ++pass) {
      int32_t* to = (args.passes - pass) % 2 == 1 ? args.order : args.other;
      for (int i = lane; i < kDigits; i += 32) store_shared(count_of(warp, i), 0);
      sync_warp();
      walk(from, pass, [](int, int) {});
      sync_threads();
      place_digits();
      walk(from, pass, [to](int row, int place) { store_global(to + place, row); });
      meet();
      from = to;
    }
  }

  // Rows in order, 32 at a time: which of them begin a segment, which are routed.
  template <class Take>
  FASTLORA_DEVICE void walk_sorted(Take take) const {
    for (int i = first; i < end; i += 32) {
      const int at = i + lane;
      const bool inside = at < end;
      const int key = inside ? key_of(load_global(args.order + at)) : args.capacity;
      auto last = static_cast<int>(shuffle_up(static_cast<uint32_t>(key), 1));
      if (lane == 0) last = at == 0 ? -1 : key_of(load_global(args.order + at - 1));
      const bool routed = key < args.capacity;
      take(at, key, ballot(routed && key != last), ballot(routed));
    }
  }

  FASTLORA_DEVICE void write_segments() const {
    int begun = 0, routed = 0;
    walk_sorted([&](int, int, uint32_t begins, uint32_t routes) {
      begun += count_bits(begins);
      routed += count_bits(routes);
    });
    auto* sums = shared_memory<int32_t>(kTotalsAt);
    if (lane == 0) {
      store_shared(sums + 2 * warp, begun);
      store_shared(sums + 2 * warp + 1, routed);
    }
    sync_threads();
    int at = 0;
    if (thread_index() < 2) {
      int mine = 0;
      for (int w = 0; w < kWarps; ++w) mine += load_shared(sums + 2 * w + thread_index());
      store_global(args.totals + 2 * block_index() + thread_index(), mine);
    }
    for (int w = 0; w < warp; ++w) at += load_shared(sums + 2 * w);
    meet();
    int all = 0;
    routed = 0;
    for (int b = 0; b < block_count(); ++b) {
      const int count = load_global(args.totals + 2 * b);
      if (b < block_index()) at += count;
      all += count;
      routed += load_global(args.totals + 2 * b + 1);
    }
    walk_sorted([&](int position, int key, uint32_t begins, uint32_t) {
      if ((begins >> lane & 1) != 0) store_segment(at + count_bits(begins & below), key, position);
      at += count_bits(begins);
    });
    for (int i = all + block_index() * kThreads + thread_index(); i < args.segment_rows;
         i += block_count() * kThreads) {
      store_segment(i, -1, routed);
    }
  }

  FASTLORA_DEVICE void store_segment(int index, int slot, int position) const {
    store_global(args.segments + 2 * index, slot);
    store_global(args.segments + 2 * index + 1, position);
  }
};

FASTLORA_KERNEL(kThreads, 1)
lora_route(FASTLORA_PARAMETER RouteArgs args) {
  const Route route{args};
  route.sort();
  route.write_segments();
}

int64_t most_blocks(int64_t m) { return m <= kBlockRows ? 1 : ceil_div(m, kBlockRows); }
int passes_of(int64_t capacity) {
  int passes = 1;
  while (passes < 4 && capacity >> (8 * passes) != 0) ++passes;
  return passes;
}

Status launch_route(const LoraRouteCudaArgs& a) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const LoraRouteArgs& c = a.call;
  if (c.m < 0 || c.m > kMost || c.capacity < 0 || c.capacity > kMost) return Status::kBadArgument;
  int64_t blocks = most_blocks(c.m);
  if (blocks > 1) {
    const int resident = resident_blocks(lora_route, kThreads, kSharedBytes);
    if (resident == 0) return Status::kDeviceError;
    blocks = blocks < resident ? blocks : resident;
  }
  const int64_t share = c.m == 0 ? kThreads : ceil_div(ceil_div(c.m, blocks), kThreads) * kThreads;
  if (c.m > 0) blocks = ceil_div(c.m, share);
  auto* counts = static_cast<int32_t*>(a.scratch);
  auto* totals = counts + most_blocks(c.m) * kDigits;
  const RouteArgs args{.slots = c.slots,
                       .order = c.order,
                       .other = totals + most_blocks(c.m) * 2,
                       .segments = c.segments,
                       .counts = counts,
                       .totals = totals,
                       .m = static_cast<int>(c.m),
                       .capacity = static_cast<int>(c.capacity),
                       .segment_rows = static_cast<int>((c.m < c.capacity ? c.m : c.capacity) + 1),
                       .passes = passes_of(c.capacity),
                       .share = static_cast<int>(share),
                       .wide = c.wide};
  const LaunchShape shape{.blocks = static_cast<int>(blocks),
                          .threads = kThreads,
                          .shared_bytes = kSharedBytes,
                          .cooperative = blocks > 1};
  return FASTLORA_LAUNCH(lora_route, shape, args, a.stream);
}

}  // namespace
}  // namespace fastlora::cuda

namespace fastlora {

int64_t lora_route_cuda_scratch(const LoraRouteCudaArgs& a) {
  const int64_t others = cuda::passes_of(a.call.capacity) > 1 ? 4 * a.call.m : 0;
  return cuda::most_blocks(a.call.m) * 4 * (cuda::kDigits + 2) + others;
}

Status lora_route_cuda(const LoraRouteCudaArgs& a) { return cuda::launch_route(a); }

}  // namespace fastlora
