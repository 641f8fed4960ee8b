// How blocks of one launch hand data to each other, for the race detector (tracer.cpp).
//
//     block A                          block B
//     write data
//     __syncthreads()                  old = atomicAdd(ticket, 1)
//     __threadfence()          ---->   __threadfence()
//     atomicAdd(ticket, 1)             __syncthreads()
//                                      read data
//
// An access of A is ordered before an access of B if a thread of A executes a fence and then an
// atomic operation on some address, a thread of B executes an atomic operation on this address
// later and then a fence, and program order or barriers order A's access before A's fence and B's
// fence before B's access. The orders of several such pairs of blocks add up. These are the release
// and acquire patterns of the PTX memory model, where any atomic operations may lie between those
// of A and B. A fence of another thread does not count: a barrier does not carry it along.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace emulator {

// A position in the execution of one thread.
struct Position {
  uint32_t block = 0, block_barriers = 0, warp_barriers = 0;
  uint32_t fences = 0;  // fences of the thread before this position
  uint16_t thread = 0;  // within the block

  bool same_thread(const Position& other) const {
    return block == other.block && thread == other.thread;
  }
};

// Whether barriers order two positions of one block.
inline bool barrier_between(const Position& earlier, const Position& later) {
  if (earlier.block_barriers < later.block_barriers) return true;
  return earlier.thread / 32 == later.thread / 32 && earlier.warp_barriers < later.warp_barriers;
}

class Handovers {
 public:
  void begin_launch() {
    releases_.clear();
    acquires_.clear();
    begin_block(0);
  }

  // An atomic operation on global memory.
  void atomic(const Position& at, uintptr_t address) {
    if (at.block != block_) begin_block(at.block);
    const auto known = releases_.find(address);
    if (known != releases_.end())
      pending_[at.thread].push_back({address, known->second.fences.size()});
    if (at.fences == 0) return;
    Releases& releases = releases_[address];
    releases.first.try_emplace(at.block, releases.fences.size());
    releases.fences.push_back(last_fence_[at.thread]);
  }

  // A fence. `at` is the position after it.
  void fence(const Position& at) {
    if (at.block != block_) begin_block(at.block);
    last_fence_[at.thread] = at;
    for (const Pending& pending : pending_[at.thread])
      acquires_[at.block].push_back({at, pending.address, pending.count});
    pending_[at.thread].clear();
  }

  // Whether handovers order two positions, of two blocks or of one.
  bool ordered(const Position& earlier, const Position& later) const {
    std::set<std::tuple<uint32_t, uint16_t, uint32_t>> visited;
    std::vector<Position> targets = {later};
    while (!targets.empty()) {
      const Position target = targets.back();
      targets.pop_back();
      const auto acquires = acquires_.find(target.block);
      if (acquires == acquires_.end()) continue;
      for (const Acquire& acquire : acquires->second) {
        if (!after_fence(acquire.fence, target)) continue;
        const Releases& releases = releases_.at(acquire.address);
        // The releases of a block lie side by side, because blocks run one after another.
        const auto first = releases.first.find(earlier.block);
        if (first != releases.first.end()) {
          for (size_t i = first->second; i < acquire.count; ++i) {
            if (releases.fences[i].block != earlier.block) break;
            if (before_fence(earlier, releases.fences[i])) return true;
          }
        }
        // What happened before the fences of other blocks is ordered as well.
        for (size_t i = 0; i < acquire.count; ++i) {
          const Position& fence = releases.fences[i];
          if (fence.block == earlier.block) continue;
          if (acquires_.count(fence.block) == 0) continue;
          if (visited.insert({fence.block, fence.thread, fence.fences}).second)
            targets.push_back(fence);
        }
      }
    }
    return false;
  }

 private:
  // The fences that precede the atomic operations on one address, in the order of the operations.
  struct Releases {
    std::vector<Position> fences;
    std::unordered_map<uint32_t, size_t> first;  // each block's first element of `fences`
  };
  // An atomic operation that no fence of its thread has followed yet. It observes the first `count`
  // releases of its address.
  struct Pending {
    uintptr_t address;
    size_t count;
  };
  struct Acquire {
    Position fence;
    uintptr_t address;
    size_t count;
  };

  static bool before_fence(const Position& access, const Position& fence) {
    return access.same_thread(fence) ? access.fences < fence.fences
                                     : barrier_between(access, fence);
  }
  static bool after_fence(const Position& fence, const Position& access) {
    return access.same_thread(fence) ? access.fences >= fence.fences
                                     : barrier_between(fence, access);
  }

  void begin_block(uint32_t block) {
    block_ = block;
    pending_.assign(kMaxThreads, {});
    last_fence_.assign(kMaxThreads, {});
  }

  static constexpr size_t kMaxThreads = 1024;
  std::unordered_map<uintptr_t, Releases> releases_;             // by address
  std::unordered_map<uint32_t, std::vector<Acquire>> acquires_;  // by block
  uint32_t block_ = 0;
  std::vector<std::vector<Pending>> pending_;  // by thread of block_
  std::vector<Position> last_fence_;           // by thread of block_
};

}  // namespace emulator
