// How long one thread of a block takes: the latency model of the variant `cost`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace emulator {

// Cycles of a GPU. The latencies are those that microbenchmarks published for Hopper, under load.
namespace cycles {
constexpr double kMemory = 900, kL2 = 270, kL1 = 40, kShared = 30;
constexpr double kSharedAtomic = 16;  // of several that are in flight
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
// Loads overlap if the compiler can issue them one after the other before it needs their values. A
// load therefore joins the loads before it, unless it waits for one of them (cost_dataflow.py), or
// is too far from the first of them. Together they take as long as the longest.
class ThreadTime {
 public:
  double instructions() const { return instructions_; }
  double cycles() const { return latency_ + instructions_ * cycles::kPace; }
  void reset() { *this = ThreadTime(); }

  void execute(double instructions) { instructions_ += instructions; }
  void wait(double latency) { latency_ += latency; }

  // A collective of the warp needs the values that were loaded before it.
  void collective() {
    wait(cycles::kCollective);
    loads_ = 0;
  }

  void load(double latency, uint32_t site, const std::vector<uint32_t>& waits) {
    if (loads_ == 0 || !overlaps(site, waits)) {
      loads_ = 0;
      first_at_ = instructions_;
      longest_ = 0;
    }
    sites_[loads_++] = site;
    if (latency <= longest_) return;
    latency_ += latency - longest_;
    longest_ = latency;
  }

 private:
  static constexpr unsigned kMostLoads = 16;    // that overlap
  static constexpr unsigned kUnroll = 4;        // iterations of a loop whose loads overlap
  static constexpr double kMostDistance = 128;  // instructions over which the compiler moves a load

  bool overlaps(uint32_t site, const std::vector<uint32_t>& waits) const {
    if (loads_ == kMostLoads || instructions_ - first_at_ > kMostDistance) return false;
    const uint32_t* const end = sites_ + loads_;
    if (std::count(sites_, end, site) >= kUnroll) return false;
    return std::none_of(waits.begin(), waits.end(),
                        [&](uint32_t other) { return std::find(sites_, end, other) != end; });
  }

  double instructions_ = 0, latency_ = 0;
  // The loads that overlap: how many, where in the code, when the first was issued, the longest.
  unsigned loads_ = 0;
  uint32_t sites_[kMostLoads];
  double first_at_ = 0, longest_ = 0;
};

}  // namespace emulator
