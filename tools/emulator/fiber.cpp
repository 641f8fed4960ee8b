// The fibers. Compiled without -fsanitize=thread in every variant.
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

// Portable but slow, because swapcontext also switches the signal mask, by a system call.
void swap(Fiber& from, Fiber& to) {
  ucontext_t context;
  from.context = &context;
  if (swapcontext(&context, static_cast<ucontext_t*>(to.context)) != 0)
    throw std::runtime_error("swapcontext failed");
}

#else

// Saves the registers that a call preserves, switches stacks, and returns on the other stack.
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

// Tells AddressSanitizer that the switch is complete, and records the bounds of the stack that the
// switch left. There is no other source for the bounds of the OS thread's own stack.
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
  if (memory == MAP_FAILED)
    throw std::runtime_error("mmap failed: no memory for the stacks of the fibers");
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
  // Stacks start at different offsets, so that their tops do not all map to one set of the cache.
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
  // The frame that emulator_swap_stacks pops: six registers and the return address. Above it, a
  // null return address ends stack walks. At a function's entry, the stack pointer is 8 off a
  // multiple of 16.
  void** frame = reinterpret_cast<void**>(top) - 8;
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(entry_);
  fiber.context = frame;
#endif
}

Fiber* FiberPool::take() {
  if (free_.empty()) throw std::runtime_error("more threads are active than there are fibers");
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
