// How long one thread of a block takes: the latency model of the variant `cost`.
#pragma once

#include <algorithm>
#include <cstdint>

namespace emulator {

// Cycles of a GPU. The latencies are those that microbenchmarks published for Hopper, under load.
namespace cycles {
constexpr double kMemory = 900, kL2 = 270, kL1 = 40, kShared = 30;
constexpr double kSharedAtomic = 64;
constexpr double kGlobalAtomic = 60;  // its result arrives later, and is seldom waited for
constexpr double kCollective = 24;    // shuffle, vote or reduction of a warp
constexpr double kBarrier = 35;
// Cycles per instruction of a warp that has a scheduler for itself.
constexpr double kPace = 2.6;
}  // namespace cycles

// Instructions that a multiprocessor issues per cycle at best.
constexpr double kIssueRate = 3.2;

// The running time of a thread since the last barrier: its instructions, and the latencies that
// nothing hides.
//
// Loads of one basic block overlap, because the compiler issues them before the first use. So do
// the loads of up to kUnroll iterations of a loop, which the compiler unrolls.
class ThreadTime {
 public:
  double cycles() const { return latency_ + instructions_ * cycles::kPace; }

  void reset() {
    const uint32_t running = basic_block_;
    *this = ThreadTime();
    basic_block_ = running;
  }

  void enter(uint32_t basic_block, double instructions) {
    basic_block_ = basic_block;
    ++entered_;
    instructions_ += instructions;
  }

  void wait(double latency) { latency_ += latency; }
  void load_global(double latency) { load(latency, global_); }
  void load_shared() { load(cycles::kShared, shared_); }
  void atomic_shared() { wait(cycles::kSharedAtomic / kUnroll); }

 private:
  static constexpr unsigned kUnroll = 4;
  static constexpr uint64_t kLongestLoop = 24;  // basic blocks of an iteration that is unrolled
  static constexpr unsigned kRecent = 64;  // entries of a table of basic blocks that loaded

  struct LastLoad {
    uint64_t entered = 0;  // the execution of the basic block that loaded last
    double waited = 0;
  };
  struct Visit {
    uint32_t basic_block = ~0u;
    uint64_t entered = 0;
  };

  void load(double latency, LastLoad& last) {
    if (last.entered != entered_) {
      last.entered = entered_;
      last.waited = 0;
      unrolled_ = repeats();
    }
    if (unrolled_) latency /= kUnroll;
    if (latency <= last.waited) return;
    latency_ += latency - last.waited;
    last.waited = latency;
  }

  // Whether the running basic block also ran a moment ago, as the body of a loop.
  bool repeats() {
    Visit& visit = recent_[basic_block_ % kRecent];
    const bool result =
        visit.basic_block == basic_block_ &&
        (visit.entered == entered_ ? unrolled_ : visit.entered + kLongestLoop >= entered_);
    visit = {basic_block_, entered_};
    return result;
  }

  double instructions_ = 0, latency_ = 0;
  uint32_t basic_block_ = ~0u;
  uint64_t entered_ = 0;  // basic blocks so far
  bool unrolled_ = false;
  LastLoad global_, shared_;
  Visit recent_[kRecent];
};

}  // namespace emulator
