// The schedule chooses the order in which blocks and threads run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr unsigned kMaxThreads = 1024;

inline uint64_t random_number() {  // xorshift
  uint64_t& x = settings.random_state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

// The threads that can run, at most kMaxThreads, in a ring buffer.
class ReadyQueue {
 public:
  void clear() { size_ = 0; }
  void push(Thread* thread) { at(size_++) = thread; }

  // Removes the thread that the schedule chooses. Returns null if there is none.
  Thread* pop() {
    if (size_ == 0) return nullptr;
    if (settings.order == Order::kLifo) return at(--size_);
    if (settings.order == Order::kRandom) std::swap(at(0), at(random_number() % size_));
    Thread* thread = at(0);
    first_ = (first_ + 1) % kMaxThreads;
    --size_;
    return thread;
  }

 private:
  Thread*& at(size_t i) { return ring_[(first_ + i) % kMaxThreads]; }

  Thread* ring_[kMaxThreads];
  size_t first_ = 0, size_ = 0;
};

// The order of the blocks in the current schedule.
inline std::vector<uint32_t> block_order(size_t blocks) {
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (settings.order == Order::kLifo) std::reverse(order.begin(), order.end());
  if (settings.order == Order::kRandom)
    for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  return order;
}

}  // namespace emulator
