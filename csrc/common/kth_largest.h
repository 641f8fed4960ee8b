// The k-th largest of a block's keys, by a radix search from the most significant byte down.
//
// Each of eight passes over the keys counts, in a histogram of 256 bins, the next byte of the keys
// that agree with all bytes fixed so far. The bin that holds the k-th largest key fixes this byte:
//
//     pass 0    ?? ?? ?? ?? ?? ?? ?? ??    counts byte 0 of all keys
//     pass 1    c4 ?? ?? ?? ?? ?? ?? ??    counts byte 1 of the keys that begin with c4
//     pass 2    c4 1f ?? ?? ?? ?? ?? ??    counts byte 2 of the keys that begin with c4 1f
//     ...
//
// Deterministic: the atomics are integer counts, whose sum does not depend on their order.
#pragma once

#include "cuda.h"

namespace retinanet {

// The search's shared memory, one per block.
struct RadixSearch {
  static constexpr int kBins = 256;
  static constexpr int kThreads = kBins;  // each thread owns one bin of the histogram

  int histogram[kBins];
  int warps[kThreads / kWarp];  // keys in each warp's bins
  int bin;                      // the bin that holds the k-th largest key
  int above;                    // keys in the bins above that one
};

// Returns the k-th largest of the keys that for_keys(f) visits, in every thread. The threads
// together visit each key once, and 1 <= k <= number of keys. Keys compare as signed integers. All
// threads of the block must call this function.
template <typename ForKeys>
__device__ __forceinline__ int64_t kth_largest(RadixSearch& search, unsigned k,
                                               const ForKeys& for_keys) {
  // With the sign bit flipped, signed keys order as unsigned ones.
  const uint64_t flip = uint64_t(1) << 63;
  uint64_t prefix = 0, fixed = 0;  // the bytes known so far, and a mask of them
  for (int shift = 56; shift >= 0; shift -= 8) {
    // Count the next byte of the keys that share the prefix.
    search.histogram[threadIdx.x] = 0;
    __syncthreads();
    for_keys([&](int64_t key) {
      const uint64_t bits = uint64_t(key) ^ flip;
      if ((bits & fixed) == prefix)
        atomicAdd(&search.histogram[int(bits >> shift & (RadixSearch::kBins - 1))], 1u);
    });
    __syncthreads();
    // Sum the bins from the top down to this thread's own, inclusively. Thread t owns bin
    // kBins - 1 - t, so this is a prefix sum over threads, first within each warp ...
    const int bin = RadixSearch::kBins - 1 - int(threadIdx.x), lane = threadIdx.x % kWarp,
              warp = threadIdx.x / kWarp;
    const unsigned mine = search.histogram[bin];
    unsigned sum = mine;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const unsigned other = __shfl_up_sync(kFullMask, sum, offset);
      if (lane >= offset) sum += other;
    }
    // ... then over the warps before it.
    if (lane == kWarp - 1) search.warps[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += search.warps[w];
    // Find the bin of the k-th largest key. The condition holds in exactly one thread.
    if (sum >= k && sum - mine < k) {
      search.bin = unsigned(bin);
      search.above = sum - mine;
    }
    __syncthreads();
    // Fix this byte. From here on, k is the rank among the keys that share it.
    prefix |= uint64_t(search.bin) << shift;
    fixed |= uint64_t(RadixSearch::kBins - 1) << shift;
    k -= search.above;
  }
  return int64_t(prefix ^ flip);
}

}  // namespace retinanet
