// A thread of the emulated device: a stack of its own on the one real thread, left and entered at will.
#pragma once

#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cstddef>
#include <vector>

namespace fastlora::emulator {

// Stacks are mapped once, each with an unreadable page below it, and used again by later blocks.
class StackPool {
 public:
  ~StackPool();
  void* take();
  void give_back(void* stack);
  static constexpr size_t kBytes = 256 << 10;

 private:
  std::vector<void*> free_;
  std::vector<void*> all_;
};

// Where a stack was left. swapcontext asks the kernel for the signal mask, which costs most of a microsecond, so
// that where the registers are known the switch is our own.
#ifdef __x86_64__
using Context = void*;  // the stack pointer; the registers lie above it
#else
using Context = ucontext_t;
#endif

class Fiber {
 public:
  explicit Fiber(StackPool& pool) : pool_(pool), stack_(pool.take()) {}
  ~Fiber() { pool_.give_back(stack_); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Have the next enter() call body(argument) from its start.
  void prepare(void (*body)(void*), void* argument);
  // From the scheduler: run the fiber until it leaves or its body returns.
  void enter();
  // From inside: back to whoever entered.
  void leave();

 private:
  static void trampoline();

  StackPool& pool_;
  void* stack_;
  Context own_{}, caller_{};
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  // AddressSanitizer is told of every switch.
  void* fake_stack_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_bytes_ = 0;
};

}  // namespace fastlora::emulator
