// A weight of 8 MiB lies in 2048 pages of 4 KiB, more than a core keeps addresses of: at a page's end a core that
// streams waits for the next one's. In pages of 2 MiB it lies in five.
#include <cerrno>

#include "fastlora/cpu.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastlora {

int64_t prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes, [[maybe_unused]] bool now) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
#ifdef MADV_COLLAPSE
  constexpr int kCollapse = MADV_COLLAPSE;
#else
  constexpr int kCollapse = 25;  // since Linux 6.1, whatever the headers are of
#endif
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (at + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (at + static_cast<uintptr_t>(bytes > 0 ? bytes : 0)) / kHugePage * kHugePage;
  if (begin >= end) return 0;
  // The caller's errno stays as it is: this is advice, and what refuses it changes nothing.
  const int before = errno;
  int status = madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  if (status == 0 && now) status = madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
  errno = before;
  return status == 0 ? static_cast<int64_t>(end - begin) : 0;
#else
  return 0;
#endif
}

}  // namespace fastlora
