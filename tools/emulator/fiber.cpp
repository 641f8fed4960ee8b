// Compiled without -fsanitize=thread in every variant.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#define USE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulator {
namespace {

// The fiber that the last switch left.
Fiber* left = nullptr;

#ifdef USE_UCONTEXT

// swapcontext also switches the signal mask, with a system call: slow, but portable.
void swap(Fiber& from, Fiber& to) {
  ucontext_t context;
  from.context = &context;
  if (swapcontext(&context, static_cast<ucontext_t*>(to.context)) != 0)
    throw std::runtime_error("swapcontext failed");
}

#else

// Saves the registers that a function call preserves, swaps stacks and returns into the other one.
extern "C" void emulator_swap_stacks(void** save, void* load);
asm(R"(
.text
.type emulator_swap_stacks,@function
emulator_swap_stacks:
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
.size emulator_swap_stacks,.-emulator_swap_stacks
)");

void swap(Fiber& from, Fiber& to) { emulator_swap_stacks(&from.context, to.context); }

#endif

// Tells AddressSanitizer which stack is now in use, and learns the bounds of the one just left: of
// the OS thread's own this is the only source.
void finish_switch([[maybe_unused]] void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(fake_stack, &stack, &size);
  left->stack = static_cast<char*>(const_cast<void*>(stack));
  left->stack_size = size;
#endif
}

}  // namespace

void switch_fiber(Fiber& from, Fiber& to) {
  left = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_size);
#endif
  swap(from, to);
  finish_switch(from.fake_stack);
}

void entered_fiber() { finish_switch(nullptr); }

FiberPool::FiberPool(size_t fibers, size_t stack_size, void (*entry)())
    : fibers_(fibers), entry_(entry) {
  const size_t guard = size_t(sysconf(_SC_PAGESIZE));
  slot_size_ = stack_size + guard;
  void* memory = mmap(nullptr, fibers * slot_size_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the fibers' stacks");
  begin_ = static_cast<char*>(memory);
  end_ = begin_ + fibers * slot_size_;
  for (size_t i = 0; i < fibers; ++i) {
    char* slot = begin_ + i * slot_size_;
    mprotect(slot, guard, PROT_NONE);  // an overflow faults
    fibers_[i].stack = slot + guard;
    fibers_[i].stack_size = stack_size;
  }
  abandon_all();
}

void FiberPool::prepare(size_t i) {
  Fiber& fiber = fibers_[i];
  fiber.fake_stack = nullptr;
  // Stacks start at different offsets, or their tops would all fall into one set of the cache.
  char* top = fiber.stack + fiber.stack_size - (i % 29) * 320;
#ifdef USE_UCONTEXT
  top -= (sizeof(ucontext_t) + 63) / 64 * 64;
  ucontext_t* context = reinterpret_cast<ucontext_t*>(top);
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack;
  context->uc_stack.ss_size = size_t(top - fiber.stack);
  context->uc_link = nullptr;
  makecontext(context, entry_, 0);
  fiber.context = context;
#else
  // What emulator_swap_stacks pops: six registers and the address to return to; above it a null
  // return address, where stack walks end.  At a function's entry the stack is 8 off a multiple of
  // 16.
  void** frame = reinterpret_cast<void**>(top) - 8;
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(entry_);
  fiber.context = frame;
#endif
}

Fiber* FiberPool::take() {
  if (free_.empty()) throw std::runtime_error("more threads at once than fibers");
  Fiber* fiber = free_.back();
  free_.pop_back();
  return fiber;
}

void FiberPool::abandon_all() {
  free_.clear();
  for (size_t i = fibers_.size(); i-- > 0;) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fibers_[i].stack, fibers_[i].stack_size);
#endif
    prepare(i);
    free_.push_back(&fibers_[i]);
  }
}

}  // namespace emulator
