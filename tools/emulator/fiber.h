// Fibers: stacks that one OS thread switches between, one for each CUDA thread that has started.
#pragma once

#include <cstddef>
#include <vector>

namespace emulator {

struct Fiber {
  void* context = nullptr;  // where to resume: a stack pointer, or a ucontext_t
  char* stack = nullptr;    // lowest address; null for the OS thread's own until it is known
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Resumes `to`; returns when somebody resumes `from`.  Both belong to the calling OS thread.
void switch_fiber(Fiber& from, Fiber& to);

// Must be the first thing a fiber's entry point does.
void entered_fiber();

// Fibers with stacks in one range of addresses, so that private memory is told from the rest by two
// comparisons.
class FiberPool {
 public:
  // Every fiber that take() returns starts with `entry`, which must never return.
  FiberPool(size_t fibers, size_t stack_size, void (*entry)());

  // One that has not started, or was given back and goes on where it was.
  Fiber* take();

  // It may be running still.
  void give_back(Fiber* fiber) { free_.push_back(fiber); }

  // All start anew; what was on their stacks is forgotten.
  void abandon_all();

  bool contains(const void* p) const {
    return static_cast<const char*>(p) >= begin_ && static_cast<const char*>(p) < end_;
  }

 private:
  void prepare(size_t i);

  std::vector<Fiber> fibers_;
  std::vector<Fiber*> free_;
  char *begin_, *end_;
  size_t slot_size_;
  void (*entry_)();
};

}  // namespace emulator
