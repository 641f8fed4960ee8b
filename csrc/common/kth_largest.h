// The k-th largest of a block's keys, by a radix search: eight passes over the keys, each of which
// finds one more byte.  Deterministic: integer atomics only count.
#pragma once

#include "cuda.h"

namespace retinanet {

// A block's shared memory.
struct RadixSearch {
  static constexpr int kBins = 256;
  static constexpr int kThreads = kBins;  // each thread owns one bin of the histogram

  int histogram[kBins];
  int warps[kThreads / kWarp];
  // The bin that holds the key searched for, and how many keys lie in bins above it.
  int bin, above;
};

// The k-th largest of the keys that for_keys(f) visits (all threads together, each key once); 1 <=
// k <= their number. Keys compare as signed integers.
template <typename ForKeys>
__device__ __forceinline__ int64_t kth_largest(RadixSearch& search, unsigned k,
                                               const ForKeys& for_keys) {
  const uint64_t flip = uint64_t(1) << 63;
  uint64_t prefix = 0, fixed = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    search.histogram[threadIdx.x] = 0;
    __syncthreads();
    for_keys([&](int64_t key) {
      const uint64_t bits = uint64_t(key) ^ flip;
      if ((bits & fixed) == prefix)
        atomicAdd(&search.histogram[int(bits >> shift & (RadixSearch::kBins - 1))], 1u);
    });
    __syncthreads();
    // Inclusive sum over bins from the top; thread t stands for bin RadixSearch::kBins - 1 - t.
    const int bin = RadixSearch::kBins - 1 - int(threadIdx.x), lane = threadIdx.x % kWarp,
              warp = threadIdx.x / kWarp;
    const unsigned mine = search.histogram[bin];
    unsigned sum = mine;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const unsigned other = __shfl_up_sync(kFullMask, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (lane == kWarp - 1) search.warps[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += search.warps[w];
    if (sum >= k && sum - mine < k) {
      search.bin = unsigned(bin);
      search.above = sum - mine;
    }
    __syncthreads();
    prefix |= uint64_t(search.bin) << shift;
    fixed |= uint64_t(RadixSearch::kBins - 1) << shift;
    k -= search.above;
  }
  return int64_t(prefix ^ flip);
}

}  // namespace retinanet
