#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastlora::emulator {
namespace {

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

void* StackPool::take() {
  if (!free_.empty()) {
    void* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  const size_t guard = page_bytes();
  void* mapped = mmap(nullptr, kBytes + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  if (mprotect(mapped, guard, PROT_NONE) != 0) throw std::bad_alloc();
  all_.push_back(mapped);
  return static_cast<char*>(mapped) + guard;
}

void StackPool::give_back(void* stack) { free_.push_back(stack); }

StackPool::~StackPool() {
  for (void* mapped : all_) munmap(mapped, kBytes + page_bytes());
}

void Fiber::prepare(void (*body)(void*), void* argument) {
  body_ = body;
  argument_ = argument;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack_,
                                StackPool::kBytes);  // a fiber given up in mid-run leaves its frames marked
#endif
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_;
  own_.uc_stack.ss_size = StackPool::kBytes;
  own_.uc_link = nullptr;
  // makecontext hands over ints only.
  const auto address = reinterpret_cast<uintptr_t>(this);
  makecontext(&own_, reinterpret_cast<void (*)()>(&trampoline), 2, static_cast<unsigned>(address >> 32),
              static_cast<unsigned>(address));
}

void Fiber::trampoline(unsigned high, unsigned low) {
  auto* self = reinterpret_cast<Fiber*>((static_cast<uintptr_t>(high) << 32) | low);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &self->caller_stack_, &self->caller_bytes_);
#endif
  self->body_(self->argument_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, self->caller_stack_, self->caller_bytes_);  // this stack is done with
#endif
  setcontext(&self->caller_);
}

void Fiber::enter() {
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack_, StackPool::kBytes);
  swapcontext(&caller_, &own_);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  swapcontext(&caller_, &own_);
#endif
}

void Fiber::leave() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fake_stack_, caller_stack_, caller_bytes_);
  swapcontext(&own_, &caller_);
  __sanitizer_finish_switch_fiber(fake_stack_, &caller_stack_, &caller_bytes_);
#else
  swapcontext(&own_, &caller_);
#endif
}

}  // namespace fastlora::emulator
