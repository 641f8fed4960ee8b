// Fibers are stacks between which one OS thread switches. Each CUDA thread has one from its start
// to its return.
#pragma once

#include <cstddef>
#include <vector>

namespace emulator {

struct Fiber {
  void* context = nullptr;  // where to resume: a stack pointer or a ucontext_t
  char* stack = nullptr;    // lowest address; null until known for the OS thread's own
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's own state
};

// Resumes `to` and returns when `from` is resumed. Both belong to the calling OS thread.
void switch_fiber(Fiber& from, Fiber& to);

// A fiber's entry point must call this first.
void entered_fiber();

// Fibers whose stacks are in one range of addresses, so that two comparisons tell whether memory is
// private to a thread.
class FiberPool {
 public:
  // A fiber that take() returns starts in `entry`, which must never return.
  FiberPool(size_t fibers, size_t stack_size, void (*entry)());

  // Returns a fiber that has not started, or one that was given back and continues where it
  // stopped.
  Fiber* take();

  // Makes the fiber available to take() again. It may still be running, until the next switch.
  void give_back(Fiber* fiber) { free_.push_back(fiber); }

  // Resets all fibers to their entry point and discards the contents of their stacks.
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
