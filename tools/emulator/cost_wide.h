// Counts the 128-bit loads (or stores) of global memory of a launch, and finds the shortest
// iteration of the loop that executes them, for the variant `cost`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cost.h"

namespace emulator {

class WideCounter {
 public:
  void begin_launch(WideAccesses& result) { result_ = &result; }

  void begin_block(unsigned threads) {
    threads_.assign(threads, {});
    result_->cycles.push_back(0);
  }

  // A thread, which has executed so many instructions since the last barrier, accesses 128 bits at
  // this place of the code.
  void access(unsigned thread, uint32_t site, double instructions) {
    Thread& t = threads_[thread];
    ++t.accesses;
    Visits* const end = t.sites + t.num_sites;
    Visits* const at =
        std::find_if(t.sites, end, [&](const Visits& other) { return other.site == site; });
    if (at == end) {
      if (t.num_sites == kMostSites) return;
      ++t.num_sites;
      at->site = site;
      at->count = 0;
    }
    Visits& visits = *at;
    for (unsigned k = 0; k < std::min(visits.count, kMost); ++k) {
      const Visit& earlier = visits.last[(visits.count - 1 - k) % kMost];
      const uint32_t accesses = t.accesses - earlier.accesses;
      for (unsigned n = 1; n <= std::min(accesses, kMost); ++n)
        record(n, (instructions - earlier.instructions) / accesses);
    }
    visits.last[visits.count++ % kMost] = {t.accesses, instructions};
  }

  // Ends the interval between two barriers for thread `thread`, which has executed so many
  // instructions in it. Returns how often it accessed 128 bits.
  uint32_t end_interval(unsigned thread, double instructions) {
    Thread& t = threads_[thread];
    const uint32_t accesses = t.accesses;
    if (accesses > 0 && accesses <= kMost) record(accesses, instructions / accesses);
    t.accesses = t.num_sites = 0;
    return accesses;
  }

  // A warp accessed 128 bits so often.
  void count(double accesses) { result_->count += accesses; }

  // One more instruction per access would lengthen the running block's span by so many cycles.
  void add_cycles(double cycles) { result_->cycles.back() += cycles; }

 private:
  static constexpr unsigned kMostSites = 8;  // of a thread that are followed
  static constexpr unsigned kMost = WideAccesses::kMost;

  struct Visit {
    uint32_t accesses;    // of the thread up to this visit of the site
    double instructions;  // of the thread up to this visit
  };
  // The visits of one place of the code.
  struct Visits {
    uint32_t site;
    unsigned count;
    Visit last[kMost];
  };
  struct Thread {
    uint32_t accesses = 0;
    unsigned num_sites = 0;
    Visits sites[kMostSites];
  };

  // There is an iteration of n accesses with so many instructions per access.
  void record(unsigned n, double per_access) {
    double& shortest = result_->shortest[n];
    if (shortest == 0 || per_access < shortest) shortest = per_access;
  }

  WideAccesses* result_ = nullptr;
  std::vector<Thread> threads_;
};

}  // namespace emulator
