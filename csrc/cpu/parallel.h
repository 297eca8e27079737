// Splits work over the process's one OpenMP pool (the one torch uses). OpenMP lives in parallel.cpp only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlora::cpu {

// Calls body(context, begin, end) on disjoint contiguous ranges that cover [0, count), at most `threads` of
// them. Which thread takes which range must not matter to the result. Serial in a forked child, whose pool
// did not survive the fork.
void parallel_ranges(int64_t count, int32_t threads, void (*body)(void* context, int64_t begin, int64_t end),
                     void* context);

// A 64-byte aligned buffer that belongs to the calling thread and is kept between calls; null when memory is
// out. A second call on the same thread may move it: take what you need once.
void* thread_scratch(size_t bytes);

// A second such buffer, for what has to outlive calls that take the first.
void* thread_scratch_beside(size_t bytes);

// The size of the calling thread's buffers, for tests of their bound.
size_t thread_scratch_bytes();

}  // namespace fastlora::cpu
