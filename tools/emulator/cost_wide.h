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
  void begin_launch(WideAccesses& found) { found_ = &found; }

  void begin_block(unsigned threads) {
    threads_.assign(threads, {});
    found_->cycles.push_back(0);
  }

  // A thread, which has executed so many instructions since the last barrier, accesses 128 bits at
  // this place of the code.
  void access(unsigned thread, uint32_t site, double instructions) {
    Thread& t = threads_[thread];
    ++t.accesses;
    Visit* const end = t.visits + t.sites;
    Visit* const visit =
        std::find_if(t.visits, end, [&](const Visit& other) { return other.site == site; });
    if (visit != end) {
      const double mean = (instructions - visit->instructions) / (t.accesses - visit->accesses);
      if (found_->instructions == 0 || mean < found_->instructions) found_->instructions = mean;
    } else if (t.sites == kMostSites) {
      return;
    } else {
      ++t.sites;
    }
    *visit = {site, t.accesses, instructions};
  }

  // Ends the interval between two barriers for the threads [begin, end) of one warp. Returns how
  // often the warp accessed 128 bits.
  double end_interval(unsigned begin, unsigned end) {
    uint32_t most = 0;
    for (unsigned t = begin; t < end; ++t) {
      most = std::max(most, threads_[t].accesses);
      threads_[t] = {};
    }
    found_->count += most;
    return most;
  }

  // One more instruction per access would lengthen the running block's span by so many cycles.
  void add_cycles(double cycles) { found_->cycles.back() += cycles; }

 private:
  static constexpr unsigned kMostSites = 8;  // of a thread that are followed

  struct Visit {
    uint32_t site;
    uint32_t accesses;    // of the thread up to this visit of the site
    double instructions;  // of the thread up to this visit
  };
  struct Thread {
    uint32_t accesses = 0;
    unsigned sites = 0;
    Visit visits[kMostSites];
  };

  WideAccesses* found_ = nullptr;
  std::vector<Thread> threads_;
};

}  // namespace emulator
