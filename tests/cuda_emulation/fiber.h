// Fibers: stacks of their own within one thread of the operating system, which give way to each other only when asked.
#pragma once

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "sanitizers.h"

#if !defined(__x86_64__) || defined(CUDA_EMULATION_UCONTEXT)
#include <ucontext.h>
#ifndef CUDA_EMULATION_UCONTEXT
#define CUDA_EMULATION_UCONTEXT  // an order of magnitude slower, but everywhere
#endif
#endif

namespace cuda_emulation {

struct Stack {
  char* begin = nullptr;
  size_t bytes = 0;
};

// Stacks are kept for the next launch: mapping one takes longer than running a small block.
class StackPool {
 public:
  Stack take() {
    if (free_.empty()) return map();
    const Stack stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give_back(Stack stack) { free_.push_back(stack); }

 private:
  static constexpr size_t kBytes = 128 << 10, kGuard = 4 << 10;

  static Stack map() {
    void* p =
        mmap(nullptr, kGuard + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE) != 0) throw std::runtime_error("no memory for another stack");
    return {static_cast<char*>(p) + kGuard, kBytes};
  }

  std::vector<Stack> free_;
};

inline StackPool stack_pool;

#ifndef CUDA_EMULATION_UCONTEXT
// Saves the registers that a function has to keep on the stack, and the stack in *from; goes on where `to` was saved.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (!owns_stack_) return;
#ifdef __SANITIZE_THREAD__
    __tsan_destroy_fiber(sanitizer_thread_);
#endif
    stack_pool.give_back(stack_);
  }

  // Stands for the stack that the caller runs on.
  void adopt_caller() {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    void* begin = nullptr;
    pthread_attr_getstack(&attributes, &begin, &stack_.bytes);
    stack_.begin = static_cast<char*>(begin);
    pthread_attr_destroy(&attributes);
#ifdef __SANITIZE_THREAD__
    sanitizer_thread_ = __tsan_get_current_fiber();
#endif
  }

  // The first switch to this fiber calls `entry`, which begins with arrived() and never returns.
  void prepare(void (*entry)()) {
    stack_ = stack_pool.take();
    owns_stack_ = true;
    sanitizers::permit(stack_.begin, stack_.bytes);
#ifdef __SANITIZE_THREAD__
    sanitizer_thread_ = __tsan_create_fiber(0);
#endif
#ifdef CUDA_EMULATION_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.begin;
    context_.uc_stack.ss_size = stack_.bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    constexpr int kSavedRegisters = 6;
    void** top = reinterpret_cast<void**>(stack_.begin + stack_.bytes - 64);  // a multiple of 16
    *--top = nullptr;  // entry() has no caller, and finds the stack as if it had been called
    *--top = reinterpret_cast<void*>(entry);
    top -= kSavedRegisters;
    std::memset(top, 0, kSavedRegisters * sizeof(void*));
    saved_ = top;
#endif
  }

  // Goes on with `next`; returns when somebody switches back. `last`: nobody ever will. (Not instrumented: half of it
  // belongs to one fiber, half to the other.)
  __attribute__((no_sanitize("thread"), noinline)) void switch_to(Fiber& next, [[maybe_unused]] bool last = false) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, next.stack_.begin, next.stack_.bytes);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(next.sanitizer_thread_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef CUDA_EMULATION_UCONTEXT
    swapcontext(&context_, &next.context_);
#else
    switch_stack(&saved_, next.saved_);
#endif
    arrived();
  }

  __attribute__((no_sanitize("thread"))) void arrived() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  Stack stack_;
  bool owns_stack_ = false;
#ifdef CUDA_EMULATION_UCONTEXT
  ucontext_t context_;
#else
  void* saved_ = nullptr;
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack_ = nullptr;
#endif
#ifdef __SANITIZE_THREAD__
  void* sanitizer_thread_ = nullptr;
#endif
};

}  // namespace cuda_emulation
