// The k-th largest of a block's keys, by a radix search from the most significant digit down.
//
// Each pass over the keys counts, in a histogram, the next digit of the keys that agree with all
// digits fixed so far. The bin that holds the k-th largest key fixes this digit:
//
//     pass 0    ?? ?? ?? ?? ?? ?? ?? ??    counts digit 0 of all keys
//     pass 1    c4 ?? ?? ?? ?? ?? ?? ??    counts digit 1 of the keys that begin with c4
//     pass 2    c4 1f ?? ?? ?? ?? ?? ??    counts digit 2 of the keys that begin with c4 1f
//     ...
//
// The search ends early when all keys of that bin are wanted.
//
// Deterministic: the atomics are integer counts, whose sum does not depend on their order.
#pragma once

#include <bit>

#include "cuda.h"

namespace retinanet {

// A bin of a histogram, in the order from the highest bin down.
struct RankedBin {
  int bin;
  unsigned above;    // keys in the bins above it
  unsigned through;  // keys in these bins and in the bin itself
};

// The shared memory of a search among the bins of a histogram, one per block.
template <int kThreads>
struct BinSearch {
  unsigned warps[kThreads / kWarp];  // keys in each warp's bins
  RankedBin found;
};

// Returns the bin that holds the k-th largest key, in every thread; the lowest bin if there are
// fewer than k >= 1 keys. Each thread passes the counts of kSize bins, from the highest down. Bins
// of lower threads are higher. All threads of the block must call this function.
template <int kThreads, int kSize>
__device__ __forceinline__ RankedBin bin_of_rank(BinSearch<kThreads>& search,
                                                 const unsigned (&counts)[kSize], unsigned k) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  unsigned mine = 0;
#pragma unroll
  for (int j = 0; j < kSize; ++j) mine += counts[j];
  // Sum the counts over the threads up to this one, inclusively: first within each warp ...
  unsigned through = mine;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const unsigned other = __shfl_up_sync(kFullMask, through, offset);
    if (lane >= offset) through += other;
  }
  // ... then over the warps before it.
  if (lane == kWarp - 1) search.warps[warp] = through;
  __syncthreads();
  const unsigned before = warp_sum(lane < warp ? search.warps[lane] : 0u);
  unsigned above = __shfl_sync(kFullMask, before, 0) + through - mine;
  // Find the bin of the k-th largest key. The condition holds for exactly one bin.
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const int from_top = int(threadIdx.x) * kSize + j;
    const bool lowest = from_top == kThreads * kSize - 1;
    const unsigned next = above + counts[j];
    if (above < k && (next >= k || lowest))
      search.found = {kThreads * kSize - 1 - from_top, above, next};
    above = next;
  }
  __syncthreads();
  return search.found;
}

// The shared memory of a radix search, one per block. Each thread owns one bin of the histogram.
template <int kBlock>
struct BlockRadixSearch {
  static constexpr int kThreads = kBlock, kBins = kBlock;

  unsigned histogram[kBins];
  BinSearch<kThreads> bins;
};

using RadixSearch = BlockRadixSearch<256>;

// Returns a bound that at least k, and at most `most`, of the keys reach, in every thread. More
// keys than `most` reach it only if some of them are equal. If there are fewer than k keys, all
// reach the bound. `Key` is an unsigned type, and keys have at most `bits` significant bits. The
// threads together visit each of the keys that for_keys(f) passes to f once. 1 <= k <= most. All
// threads of the block must call this function.
template <typename Key, int kThreads, typename ForKeys>
__device__ __forceinline__ Key bound_of_largest(BlockRadixSearch<kThreads>& search, int bits,
                                                unsigned k, unsigned most,
                                                const ForKeys& for_keys) {
  constexpr int kBins = kThreads, kDigit = std::bit_width(unsigned(kBins)) - 1;
  static_assert(kBins == 1 << kDigit, "a digit must have a bin for each of its values");
  Key prefix = 0, fixed = 0;  // the digits known so far, and a mask of them
  for (int shift = bits > kDigit ? bits - kDigit : 0;;
       shift = shift > kDigit ? shift - kDigit : 0) {
    search.histogram[threadIdx.x] = 0;
    __syncthreads();
    // Count the next digit of the keys that share the prefix. A thread adds a run of equal digits
    // at once, so that many equal keys do not all wait for the same bin.
    int digit = 0;
    unsigned run = 0;
    for_keys([&](Key key) {
      if ((key & fixed) != prefix) return;
      const int next = int(key >> shift) & (kBins - 1);
      if (next != digit) {
        if (run > 0) atomicAdd(&search.histogram[digit], run);
        digit = next;
        run = 0;
      }
      ++run;
    });
    if (run > 0) atomicAdd(&search.histogram[digit], run);
    __syncthreads();
    // Fix the digit to that of the k-th largest key. From here on, k is the rank among the keys
    // that share it.
    const unsigned counts[1] = {search.histogram[kBins - 1 - threadIdx.x]};
    const RankedBin found = bin_of_rank(search.bins, counts, k);
    prefix |= Key(found.bin) << shift;
    fixed |= Key(kBins - 1) << shift;
    if (shift == 0 || found.through <= most) return prefix;
    k -= found.above;
    most -= found.above;
  }
}

// Returns a bound that exactly the k largest of the keys reach, in every thread. The keys are
// unique, and compare as signed integers. 1 <= k <= number of keys. Otherwise as
// `bound_of_largest`.
template <typename ForKeys>
__device__ __forceinline__ int64_t kth_largest(RadixSearch& search, unsigned k,
                                               const ForKeys& for_keys) {
  // With the sign bit flipped, signed keys order as unsigned ones.
  const uint64_t flip = uint64_t(1) << 63;
  const uint64_t bound = bound_of_largest<uint64_t>(search, 64, k, k, [&](auto&& visit) {
    for_keys([&](int64_t key) { visit(uint64_t(key) ^ flip); });
  });
  return int64_t(bound ^ flip);
}

}  // namespace retinanet
