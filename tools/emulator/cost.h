// What a launch would cost a GPU, counted by the variant `cost` (cost_tracer.cpp).
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace emulator {

// The 128-bit loads from global memory, or the stores, and the loop that executes them.
struct WideAccesses {
  static constexpr unsigned kMost = 8;  // accesses in an iteration

  double count = 0;  // executions by warps
  // By the number n of accesses in an iteration: the instructions per access of the shortest
  // iteration, 0 if there is none. An iteration is what a thread executes between two executions of
  // the same access that are at least n accesses apart. It is also what a thread executes between
  // two barriers, if that has n accesses. A kernel with a hot loop has no such interval elsewhere.
  double shortest[kMost + 1] = {0};
  // For each block, how many cycles one more instruction per access would add to its span.
  std::vector<double> cycles;
};

// Sums over the emulated blocks, which are fewer than the grid's if blocks are sampled.
struct Cost {
  double warp_instructions = 0;
  double intervals = 0;        // between barriers
  std::vector<double> spans;   // of each block, in cycles
  double one_warp_cycles = 0;  // of the spans, those in which a single warp of several was busy
  double global_atomics = 0, shared_atomics = 0;
  double hottest_atomics = 0;  // on the address of global memory that has the most
  WideAccesses wide_loads, wide_stores;
  // Warp instructions by basic block, which is named by its offset in the library.
  std::map<uint64_t, double> profile;
};

}  // namespace emulator
