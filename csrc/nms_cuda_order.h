// The candidates of an image in order, a batch at a time, without sorting all of them.
//
// NMS usually needs only the best few hundred of thousands of candidates. A block finds the next
// 256 to 512 ranking keys by a radix search, and sorts only these:
//
//     keys              | all candidates of the image |         not stored, computed when needed
//          |  1. Each pass of the search counts the next 10 bits of the keys in question, in a
//          |     histogram. All bins from the top that fit into the batch together are taken. If
//          |     they are less than half a batch, the next pass refines the first bin that does
//          |     not fit. Two passes are enough for most scores, and at most seven are needed.
//          v
//     batch             keys[512]                               in shared memory, in any order
//          |  2. A bitonic sort exchanges keys within warps by shuffles, and only strides of 32
//          |     and more through shared memory.
//          v
//     batch             keys[512]                               best first
//
// The next batch starts below the lowest key of this one. Deterministic: keys are unique, the
// counts do not depend on the order of the atomics, and the sort removes the order in which keys
// reach the batch.
#pragma once

#include "common/cuda.h"
#include "common/ranking_key.h"

namespace retinanet {

// A block's shared memory.
struct NmsOrder {
  static constexpr int kThreads = 1024;
  static constexpr int kBatch = 512;
  static constexpr int kBits = 10;
  static constexpr int kBins = 1 << kBits;  // each thread owns one bin of the histogram
  static_assert(kBins == kThreads);

  int64_t keys[kBatch];
  unsigned histogram[kBins];
  unsigned warps[kThreads / kWarp];  // keys in each warp's bins
  int bin;                           // the first bin that does not fit into the batch
  unsigned above;                    // keys in the bins above that one
  unsigned size;                     // keys in the batch
};

// The bits of a key, which order as unsigned numbers. kNoKey becomes 0.
__device__ __forceinline__ uint64_t key_bits(int64_t key) {
  return uint64_t(key) ^ (uint64_t(1) << 63);
}

// The sum of `value` over the threads up to this one. All threads must call this function.
__device__ __forceinline__ unsigned prefix_sum(unsigned value, unsigned* warps) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto over_warp = [lane](unsigned sum) {
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const unsigned other = __shfl_up_sync(kFullMask, sum, offset);
      if (lane >= offset) sum += other;
    }
    return sum;
  };
  const unsigned sum = over_warp(value);
  if (lane == kWarp - 1) warps[warp] = sum;
  __syncthreads();
  const unsigned up_to_warp = over_warp(warps[lane]);
  const unsigned before = __shfl_sync(kFullMask, up_to_warp, warp == 0 ? 0 : warp - 1);
  return warp == 0 ? sum : before + sum;
}

// Returns a bound such that between half a batch and a full batch of the keys have at least these
// bits, or 0 if all keys fit into one batch. Counts only keys whose bits are below `ceiling`.
// key_at(i) returns the key of candidate i < count, kNoKey if it is not one. All threads must call
// this function.
template <typename KeyAt>
__device__ __forceinline__ uint64_t next_bound(NmsOrder& shared, const KeyAt& key_at, int64_t count,
                                               uint64_t ceiling) {
  uint64_t prefix = 0,
           fixed = 0;  // the bits that are known of the keys in question, and their mask
  unsigned above = 0;  // keys above those in question
  for (int shift = 64 - NmsOrder::kBits;; shift = max(shift - NmsOrder::kBits, 0)) {
    // Count the next bits of the keys that share the prefix.
    shared.histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += NmsOrder::kThreads) {
      const uint64_t bits = key_bits(key_at(i));
      if (bits != 0 && bits < ceiling && (bits & fixed) == prefix)
        atomicAdd(&shared.histogram[int((bits - prefix) >> shift)], 1u);
    }
    __syncthreads();
    // Add up the bins from the top. Thread t owns bin kBins - 1 - t.
    const int bin = NmsOrder::kBins - 1 - int(threadIdx.x);
    const unsigned mine = shared.histogram[bin], sum = prefix_sum(mine, shared.warps),
                   room = NmsOrder::kBatch - above;
    // The conditions hold in one thread at most: its bin is the first that does not fit.
    const bool overflows = sum > room && sum - mine <= room;
    if (overflows) {
      shared.bin = bin;
      shared.above = sum - mine;
    }
    if (!__syncthreads_or(overflows)) return prefix;
    above += shared.above;
    const uint64_t next = prefix + ((uint64_t(shared.bin) + 1) << shift);
    if (above >= NmsOrder::kBatch / 2) return next;
    prefix += uint64_t(shared.bin) << shift;
    fixed |= uint64_t(NmsOrder::kBins - 1) << shift;
  }
}

// Sorts the keys of the batch, best first. All threads must call this function.
__device__ __forceinline__ void sort_batch(NmsOrder& shared) {
  const int t = threadIdx.x;
  const bool holds = t < NmsOrder::kBatch;
  int64_t key = holds ? shared.keys[t] : kNoKey;
  // After each outer step, runs of `run` keys are sorted, every other one in ascending order.
#pragma unroll 1
  for (int run = 2; run <= NmsOrder::kBatch; run *= 2) {
#pragma unroll 1
    for (int stride = run / 2; stride > 0; stride /= 2) {
      int64_t other = key;
      if (stride < kWarp) {
        other = int64_t(__shfl_xor_sync(kFullMask, (long long)(key), stride));
      } else {
        __syncthreads();
        if (holds) shared.keys[t] = key;
        __syncthreads();
        if (holds) other = shared.keys[t ^ stride];
      }
      const bool keep_larger = ((t & run) == 0) == ((t & stride) == 0);
      if (keep_larger == (other > key)) key = other;
    }
  }
  __syncthreads();
  if (holds) shared.keys[t] = key;
  __syncthreads();
}

// Collects the best keys whose bits are below `ceiling` in shared.keys, best first. Returns their
// number, and lowers `ceiling` to the place where the next batch starts, which is 0 behind the last
// one. All threads must call this function.
template <typename KeyAt>
__device__ __forceinline__ int next_batch(NmsOrder& shared, const KeyAt& key_at, int64_t count,
                                          uint64_t& ceiling) {
  const uint64_t bound = next_bound(shared, key_at, count, ceiling);
  if (threadIdx.x < NmsOrder::kBatch) shared.keys[threadIdx.x] = kNoKey;
  if (threadIdx.x == 0) shared.size = 0;
  __syncthreads();
  // Each warp reserves the slots for its keys with one atomic. The loop ends for all lanes at once.
  const int lane = threadIdx.x % kWarp;
  for (int64_t first = threadIdx.x - lane; first < count; first += NmsOrder::kThreads) {
    const int64_t i = first + lane;
    const int64_t key = i < count ? key_at(i) : kNoKey;
    const uint64_t bits = key_bits(key);
    const bool taken = bits != 0 && bits >= bound && bits < ceiling;
    const unsigned lanes = __ballot_sync(kFullMask, taken);
    unsigned slot = 0;
    if (lane == 0 && lanes != 0) slot = atomicAdd(&shared.size, unsigned(__popc(lanes)));
    slot = __shfl_sync(kFullMask, slot, 0) + __popc(lanes & ((1u << lane) - 1));
    if (taken) shared.keys[slot] = key;
  }
  __syncthreads();
  const int size = int(shared.size);
  sort_batch(shared);
  ceiling = bound;
  return size;
}

}  // namespace retinanet
