// What a launch would cost a GPU, counted by the variant `cost` (cost_tracer.cpp).
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace emulator {

// Sums over the emulated blocks, which are fewer than the grid's if blocks are sampled.
struct Cost {
  double warp_instructions = 0;
  double intervals = 0;        // between barriers
  std::vector<double> spans;   // of each block, in cycles
  double one_warp_cycles = 0;  // of the spans, those in which a single warp of several was busy
  double global_atomics = 0, shared_atomics = 0;
  double hottest_atomics = 0;  // on the address of global memory that has the most
  // Warp instructions by basic block, which is named by its offset in the library.
  std::map<uint64_t, double> profile;
};

}  // namespace emulator
