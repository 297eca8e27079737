#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
// Puts what a function must keep on this stack, the stack's pointer into *left, and takes up the stack at `next`.
extern "C" void fastlora_switch_stack(void** left, void* next);
asm(R"(
  .pushsection .text
  .globl fastlora_switch_stack
  .hidden fastlora_switch_stack
  .type fastlora_switch_stack, @function
fastlora_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fastlora_switch_stack, .-fastlora_switch_stack
  .popsection
)");
#endif

namespace fastlora::emulator {
namespace {

thread_local Fiber* t_entered = nullptr;  // a stack's first function takes no argument

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

#ifdef __x86_64__

void prepare_context(Context& context, void* stack, void (*first)()) {
  auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack) + StackPool::kBytes);
  std::fill(top - 8, top, uintptr_t{0});  // six registers; the place to return to; who called that: nobody
  top[-2] = reinterpret_cast<uintptr_t>(first);
  context = top - 8;
}

void switch_context(Context& left, Context& next) { fastlora_switch_stack(&left, next); }

#else

void prepare_context(Context& context, void* stack, void (*first)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = StackPool::kBytes;
  context.uc_link = nullptr;
  makecontext(&context, first, 0);
}

void switch_context(Context& left, Context& next) { swapcontext(&left, &next); }

#endif

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
  // A fiber given up in mid-run leaves its frames marked.
  __asan_unpoison_memory_region(stack_, StackPool::kBytes);
#endif
  prepare_context(own_, stack_, &trampoline);
}

void Fiber::trampoline() {
  Fiber* self = t_entered;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &self->caller_stack_, &self->caller_bytes_);
#endif
  self->body_(self->argument_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, self->caller_stack_, self->caller_bytes_);  // this stack is done with
#endif
  switch_context(self->own_, self->caller_);
}

void Fiber::enter() {
  t_entered = this;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack_, StackPool::kBytes);
  switch_context(caller_, own_);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  switch_context(caller_, own_);
#endif
}

void Fiber::leave() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fake_stack_, caller_stack_, caller_bytes_);
  switch_context(own_, caller_);
  __sanitizer_finish_switch_fiber(fake_stack_, &caller_stack_, &caller_bytes_);
#else
  switch_context(own_, caller_);
#endif
}

}  // namespace fastlora::emulator
