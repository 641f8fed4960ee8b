// The best of a block's keys: a search from the most significant bits down, 11 bits at a time.
//
// Each pass over the keys counts the next 11 bits of those that agree with all bits fixed so far:
//
//     bits 63 .. 53    bits 52 .. 42    ...
//     ???????????      ???????????              pass 0 counts all keys, in 2,048 bins
//     10111110011      ???????????              pass 1 counts the keys that begin with 10111110011
//     ...
//
// The search ends as soon as a bin's lower edge leaves a suitable number of keys above it, which
// takes one or two passes for the logits of a detector. Deterministic: the atomics are integer
// counts, whose sum does not depend on their order.
#pragma once

#include "common/cuda.h"
#include "detect.h"

namespace retinanet {

// The search's shared memory, one per block of kThreads threads.
template <int kThreads>
struct BestKeysSearch {
  static constexpr int kBits = 11, kBins = 1 << kBits;
  static constexpr int kOwn = kBins / kThreads;  // bins that one thread sums

  unsigned counts[kBins];
  unsigned warps[kThreads / kWarp];  // keys in each warp's bins
  int bin;                           // what find_bin has found
  unsigned above;
};

// The shift of the bits that pass `pass` counts.
HOST_DEVICE int bin_shift(int pass) {
  const int shift = 64 - 11 * (pass + 1);
  return shift > 0 ? shift : 0;
}
constexpr int kBinPasses = 6;

// The bits of a key, which order as unsigned numbers.
HOST_DEVICE uint64_t sortable_bits(int64_t key) { return uint64_t(key) ^ uint64_t(1) << 63; }
HOST_DEVICE int64_t sortable_key(uint64_t bits) { return int64_t(bits ^ uint64_t(1) << 63); }

// The bin that holds the key of a rank, -1 if there are not so many keys.
struct FoundBin {
  int bin;
  unsigned above, count;  // keys in the bins above it, and in those and itself
};

// Finds the bin of search.counts that holds the key of rank `rank` from the top, which is 1 for the
// best key, if `above` keys are above all bins. All threads must call this function, after a
// barrier.
template <int kThreads>
__device__ __forceinline__ FoundBin find_bin(BestKeysSearch<kThreads>& search, unsigned above,
                                             unsigned rank) {
  using Search = BestKeysSearch<kThreads>;
  // Sum the bins from the top down. Thread t owns kOwn neighbouring bins, the t-th from the top.
  // This is a prefix sum over threads, first within each warp ...
  if (threadIdx.x == 0) search.bin = -1;
  const int top = Search::kBins - 1 - int(threadIdx.x) * Search::kOwn;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  unsigned mine = 0;
#pragma unroll
  for (int j = 0; j < Search::kOwn; ++j) mine += search.counts[top - j];
  unsigned sum = mine;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const unsigned other = __shfl_up_sync(kFullMask, sum, offset);
    if (lane >= offset) sum += other;
  }
  // ... then over the warps before it.
  if (lane == kWarp - 1) search.warps[warp] = sum;
  __syncthreads();
  unsigned before = above + sum - mine;
  for (int w = 0; w < warp; ++w) before += search.warps[w];
  // The bin belongs to exactly one thread.
  if (before < rank && before + mine >= rank) {
    int bin = top;
    while (before + search.counts[bin] < rank) before += search.counts[bin--];
    search.bin = bin;
    search.above = before;
  }
  __syncthreads();
  if (search.bin < 0) return {-1, 0, 0};
  return {search.bin, search.above, search.above + search.counts[search.bin]};
}

// The best keys of a set: those that are not below `least`.
struct BestKeys {
  int64_t least;
  int count;
};

// Returns in every thread the best keys, at least `fewest` and at most `most` of them. The threads
// together visit each key once in for_keys(f). Keys compare as signed integers, and
// 1 <= fewest <= most. If equal keys leave no choice, there are more than `most`. If there are
// fewer than `fewest` keys, the result is {kNoKey, 0}. All threads must call this function, with a
// barrier between two calls.
template <int kThreads, typename ForKeys>
__device__ __forceinline__ BestKeys best_keys(BestKeysSearch<kThreads>& search, int fewest,
                                              int most, const ForKeys& for_keys) {
  using Search = BestKeysSearch<kThreads>;
  uint64_t prefix = 0, fixed = 0;  // the bits known so far, and a mask of them
  unsigned above = 0;              // keys above all that begin with the prefix
  for (int pass = 0;; ++pass) {
    const int shift = bin_shift(pass);
    // Count the next bits of the keys that begin with the prefix.
    for (int i = threadIdx.x; i < Search::kBins; i += kThreads) search.counts[i] = 0;
    __syncthreads();
    for_keys([&](int64_t key) {
      const uint64_t bits = sortable_bits(key);
      if ((bits & fixed) == prefix)
        atomicAdd(&search.counts[int(bits >> shift) & (Search::kBins - 1)], 1u);
    });
    __syncthreads();
    // Fix these bits. The lower edge of the bin will do if few enough keys are not below it.
    const FoundBin found = find_bin(search, above, unsigned(fewest));
    if (found.bin < 0) return {kNoKey, 0};
    above = found.above;
    prefix |= uint64_t(found.bin) << shift;
    fixed |= uint64_t(Search::kBins - 1) << shift;
    if (found.count <= unsigned(most) || pass == kBinPasses - 1)
      return {sortable_key(prefix), int(found.count)};
    __syncthreads();  // all have read the counts before any clears them
  }
}

// The lowest float that a key from `least` on can hold, or `limit` if that is higher.
__device__ __forceinline__ float lowest_logit(int64_t least, float limit) {
  const float logit = key_value(least);
  return logit > limit ? logit : limit;  // false for NaN, to which a bin's lower edge may map
}

}  // namespace retinanet
