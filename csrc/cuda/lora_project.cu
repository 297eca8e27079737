// u = x·Aᵀ: the small product before the fused one.
//
// A warp holds 16, 32 or 64 rows of A as left operands and 8 or 32 rows of x as right ones, and takes every eighth
// block of 64 columns of k; the block's warps are added in order. Operands come straight from global memory: lane
// t of a quad takes octets t and t + 4 of such a block of both, in whatever order of k, for both have the same; so
// the quad reads whole sectors. Where one block for a tile of u would read for too long, k is split over several,
// and who uses u adds the parts.
//
// Since all of x passes through here, its widened copy for the dense route (cuda.h) is written on the way.
#include "kernels.cuh"
#include "launch.cuh"
#include "nf4_linear.cuh"

namespace fastlora::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

// kColumns: right operands of 8 rows of x; kTiles: left operands of 16 rows of A.
template <int kColumns, int kTiles>
constexpr int kSharedBytes = kWarps * 16 * kTiles * 8 * kColumns * 4;

// A copy is for many rows of x; what is launched before a few of them have been decoded stays as small as it is.
template <int kColumns>
constexpr bool kWidens = kColumns == 4;

template <DType D, int kColumns, int kTiles>
FASTLORA_KERNEL(kThreads, 1)
lora_project(FASTLORA_PARAMETER ProjectArgs args) {
  constexpr int kXRows = 8 * kColumns, kARows = 16 * kTiles;
  let_next_launch_begin();
  const int x_row = block_index() * kXRows, a_row = block_index_y() * kARows, split = block_index_z();
  const int group = lane_index() / 4, quad = lane_index() % 4;
  const int blocks = (args.k + 63) / 64, share = (blocks + args.splits - 1) / args.splits;
  const int end = (split + 1) * share < blocks ? (split + 1) * share : blocks;

  const Wide& wide = args.wide;
  const bool wanted = kWidens<kColumns> && wide.rows != nullptr;
  const bool widens = wanted && block_index_y() == 0;  // x is there for every 64 rows of A

  float sums[kTiles][kColumns][4] = {};
  for (int block = split * share + warp_index(); block < end; block += kWarps) {
    const int column = 64 * block + 8 * quad;
    const auto octet = [&](const void* base, int row, int rows, int i, DType dtype, bool vectors) {
      const int valid = row < rows ? args.k - column - 32 * i : 0;
      return load_octet<D>(base, static_cast<int64_t>(row) * args.k + column + 32 * i, valid, dtype, vectors,
                           1.0f);
    };
    Words4 x[kColumns][2];
    FASTLORA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      FASTLORA_UNROLL
      for (int i = 0; i < 2; ++i) x[c][i] = octet(args.x, x_row + 8 * c + group, args.m, i, D, args.x_vectors);
    }
    if (widens) {
      FASTLORA_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        FASTLORA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int row = x_row + 8 * c + group, at = column + 32 * i;
          if (row >= args.m || at >= args.k) continue;  // an octet that begins inside has zeros behind k
          store_global(reinterpret_cast<Words4*>(wide.rows + static_cast<int64_t>(row) * wide.size + at), x[c][i]);
        }
      }
    }
    FASTLORA_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      Words4 a[2][2];
      FASTLORA_UNROLL
      for (int h = 0; h < 2; ++h) {
        FASTLORA_UNROLL
        for (int i = 0; i < 2; ++i) {
          a[h][i] = octet(args.a, a_row + 16 * tile + 8 * h + group, args.r, i, args.a_dtype, args.a_vectors);
        }
      }
      FASTLORA_UNROLL
      for (int step = 0; step < 4; ++step) {
        const int i = step / 2, w = step % 2 * 2;
        const uint32_t left[4] = {a[0][i].w[w], a[1][i].w[w], a[0][i].w[w + 1], a[1][i].w[w + 1]};
        FASTLORA_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          const uint32_t right[2] = {x[c][i].w[w], x[c][i].w[w + 1]};
          multiply_tile<D>(sums[tile][c], left, right);
        }
      }
    }
  }

  auto* all = shared_memory<float>(0);  // (warps, rows of x, rows of A)
  FASTLORA_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    FASTLORA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      FASTLORA_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int row = 8 * c + 2 * quad + j % 2, column = 16 * tile + group + j / 2 * 8;
        store_shared(all + (warp_index() * kXRows + row) * kARows + column, sums[tile][c][j]);
      }
    }
  }
  sync_threads();
  for (int i = thread_index(); i < kXRows * kARows; i += kThreads) {
    const int row = x_row + i / kARows, column = a_row + i % kARows;
    if (row >= args.m || column >= args.r) continue;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum = add(sum, load_shared(all + w * kXRows * kARows + i));
    const int64_t index = static_cast<int64_t>(row) * args.r + column;
    if (wanted) {
      Element<D>::store(wide.rows, static_cast<int64_t>(row) * wide.size + wide.rank_at + column, sum);
    }
    if (args.u != nullptr) {
      Element<D>::store(args.u, index, sum);
    } else if (!wanted) {
      store_global(args.parts + static_cast<int64_t>(split) * args.m * args.r + index, sum);
    }
  }
  if (!widens) return;
  const int after = wide.rank_at + wide.r, pads = wide.size - after;
  for (int i = thread_index(); i < kXRows * pads; i += kThreads) {
    const int row = x_row + i / pads, pad = i % pads;
    if (row >= args.m) break;
    Element<D>::store(wide.rows, static_cast<int64_t>(row) * wide.size + after + pad,
                      args.ones && pad == 0 ? 1.0f : 0.0f);
  }
}

template <DType D, int kColumns, int kTiles>
Status launch_as(const ProjectArgs& args, void* stream) {
  const LaunchShape shape{.blocks = static_cast<int>(ceil_div(args.m, 8 * kColumns)),
                          .blocks_y = static_cast<int>(ceil_div(args.r, 16 * kTiles)),
                          .blocks_z = args.splits,
                          .threads = kThreads,
                          .shared_bytes = kSharedBytes<kColumns, kTiles>};
  return FASTLORA_LAUNCH((lora_project<D, kColumns, kTiles>), shape, args, stream);
}

template <DType D, int kColumns>
Status launch_columns(const ProjectArgs& args, void* stream) {
  if (args.r <= 16) return launch_as<D, kColumns, 1>(args, stream);
  if (args.r <= 32) return launch_as<D, kColumns, 2>(args, stream);
  return launch_as<D, kColumns, 4>(args, stream);
}

template <DType D>
Status launch_dtype(const ProjectArgs& args, void* stream) {
  return args.m <= 8 && args.wide.rows == nullptr ? launch_columns<D, 1>(args, stream)
                                                  : launch_columns<D, 4>(args, stream);
}

}  // namespace

Status launch_lora_project(const ProjectArgs& args, DType dtype, void* stream) {
  return dtype == DType::kBFloat16 ? launch_dtype<DType::kBFloat16>(args, stream)
                                   : launch_dtype<DType::kFloat16>(args, stream);
}

}  // namespace fastlora::cuda

namespace fastlora {

Status lora_project_cuda(const LoraProjectCudaArgs& a) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (a.dtype == DType::kFloat32 || a.m < 1 || a.k < 1 || a.r < 1 || a.m > kMost || a.k > kMost || a.r > kMost ||
      (a.u == nullptr && a.wide == nullptr) || !cuda::aligned(a.wide, 16)) {
    return Status::kBadArgument;
  }
  const cuda::ProjectArgs args{.x = a.x,
                               .a = a.a,
                               .u = a.u,
                               .parts = nullptr,
                               .wide = cuda::wide_of(a.wide, a.k, a.r, a.ones),
                               .m = static_cast<int>(a.m),
                               .k = static_cast<int>(a.k),
                               .r = static_cast<int>(a.r),
                               .splits = 1,
                               .ones = a.ones,
                               .a_dtype = a.a_dtype,
                               .x_vectors = cuda::whole_vectors(a.x, 2 * a.k),
                               .a_vectors = cuda::whole_vectors(a.a, cuda::bytes_of(a.a_dtype) * a.k)};
  return cuda::launch_lora_project(args, a.dtype, a.stream);
}

}  // namespace fastlora
