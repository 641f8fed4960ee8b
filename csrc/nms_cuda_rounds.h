// Greedy NMS of one image by one block, a chunk of 256 candidates at a time.
//
// The block decides all candidates of a chunk at once. A candidate depends on the earlier ones that
// would suppress it, which are few, so a few rounds over the chunk replace a walk in order:
//
//     kept boxes      | 0 .. 255 | 256 .. 511 | ...        from earlier chunks
//          |  1. The kept boxes pass through shared memory, a tile at a time. Each candidate has
//          |     four threads, which share the boxes of a tile. They drop the candidate if one of
//          |     the boxes suppresses it.
//          v
//     bit matrices    before[8][256], peers[8][256]        in shared memory
//          |  2. The four threads compare their candidate, if it is left, with the earlier ones of
//          |     the chunk: `before` has those that would suppress it, `peers` those of its class.
//          v
//     bit masks       open[8], kept[8]
//          |  3. Rounds: a candidate is dropped once one of its `before` is kept. It is kept once
//          |     none of them is kept or open. At least the first open candidate is decided in each
//          |     round. Boxes of a detector need 2 to 6 rounds, a chain of 256 boxes needs 256.
//          v
//     4. The candidates that are kept, up to the caps, are appended to the kept boxes.
//
// A cap per class works in the rounds: a candidate is excluded once its class is full, and waits
// while open peers may fill the class.
//
// Deterministic: the atomics clear bits and add counts, whose result does not depend on their
// order, and each round's decisions follow from the bits that the round before has left.
#pragma once

#include "common/cuda.h"
#include "nms_cuda_images.h"

namespace retinanet {

// A block's shared memory.
template <typename T>
struct NmsRounds {
  static constexpr int kChunk = 256;
  static constexpr int kThreads = 1024;
  static constexpr int kParts = kThreads / kChunk;  // threads of one candidate
  static constexpr int kWords = kChunk / kWarp;     // words of a bit mask of one chunk
  static constexpr int kTile = 4096 / sizeof(Box<T>);

  NmsBox<T> candidates[kChunk];
  NmsBox<T> tile[kTile];            // some of the kept boxes
  unsigned before[kWords][kChunk];  // earlier ones of the chunk that would suppress this one
  unsigned peers[kWords][kChunk];   // earlier ones of this one's class, if classes have a cap
  int kept_peers[kChunk];           // kept boxes of this one's class from earlier chunks
  unsigned open[kWords], kept[kWords];
};

__device__ __forceinline__ bool bit(const unsigned* words, int i) {
  return words[i / kWarp] >> (i % kWarp) & 1u;
}

// Step 1: compares the candidate of this thread with its share of the boxes kept from earlier
// chunks, and clears the bit of the candidate in `open` if one of them suppresses it. All threads
// must call this function.
template <typename T>
__device__ __forceinline__ void compare_with_kept(NmsRounds<T>& shared, const NmsRules<T>& rules,
                                                  const NmsBox<T>* kept, int64_t size) {
  using Rounds = NmsRounds<T>;
  const int t = threadIdx.x, c = t % Rounds::kChunk, part = t / Rounds::kChunk;
  const NmsBox<T> mine = shared.candidates[c];
  const bool was_open = bit(shared.open, c);
  bool open = was_open;
  int kept_peers = 0;
  for (int64_t start = 0; start < size; start += Rounds::kTile) {
    // Load the next tile when all threads have finished with the one before.
    const int loaded = int(size - start < Rounds::kTile ? size - start : Rounds::kTile);
    __syncthreads();
    if (t < loaded) shared.tile[t] = kept[start + t];
    __syncthreads();
    // Compare until one of the boxes suppresses the candidate.
    for (int k = part; open && k < loaded; k += Rounds::kParts) {
      if (rules.max_per_class > 0) kept_peers += shared.tile[k].label == mine.label;
      if (suppresses(rules, shared.tile[k], mine)) open = false;
    }
  }
  // The four threads of a candidate are in four warps, so their results meet in shared memory.
  const unsigned dropped = __ballot_sync(kFullMask, was_open && !open);
  if (c % kWarp == 0 && dropped != 0) atomicAnd(&shared.open[c / kWarp], ~dropped);
  if (kept_peers > 0) atomicAdd(&shared.kept_peers[c], kept_peers);
  __syncthreads();
}

// Step 2: compares the candidate of this thread with earlier ones of the chunk. Each of the four
// threads of a candidate fills two words of each row. All threads must call this function.
template <typename T>
__device__ __forceinline__ void compare_in_chunk(NmsRounds<T>& shared, const NmsRules<T>& rules) {
  using Rounds = NmsRounds<T>;
  const int c = threadIdx.x % Rounds::kChunk, part = threadIdx.x / Rounds::kChunk;
  const NmsBox<T> mine = shared.candidates[c];
  const bool open = bit(shared.open, c);
  for (int w = part; w < Rounds::kWords; w += Rounds::kParts) {
    unsigned before = 0, peers = 0;
    // Visit the open candidates of the word, which are the same for all lanes of the warp.
    for (unsigned left = w <= c / kWarp ? shared.open[w] : 0u; left != 0; left &= left - 1) {
      const int b = __ffs(int(left)) - 1, other = w * kWarp + b;
      if (!open || other >= c) continue;
      const bool peer = shared.candidates[other].label == mine.label;
      peers |= unsigned(peer) << b;
      if ((peer || rules.class_agnostic) &&
          suppresses_in_class(rules, shared.candidates[other], mine))
        before |= 1u << b;
    }
    shared.before[w][c] = before;
    if (rules.max_per_class > 0) shared.peers[w][c] = peers;
  }
  __syncthreads();
}

// The number of candidates in `mask` that come before candidate c of the chunk.
template <int kWords>
__device__ __forceinline__ int rank_in(const unsigned (&mask)[kWords], int c) {
  int rank = __popc(mask[c / kWarp] & ((1u << (c % kWarp)) - 1));
#pragma unroll
  for (int w = 0; w < kWords; ++w) rank += w < c / kWarp ? __popc(mask[w]) : 0;
  return rank;
}

// Step 3: decides the open candidates of the chunk, and leaves those to keep in `shared.kept`.
// Returns in all threads whether the cap of a class has excluded a candidate that nothing
// suppresses. All threads must call this function.
template <typename T>
__device__ __forceinline__ bool decide_in_rounds(NmsRounds<T>& shared, const NmsRules<T>& rules) {
  using Rounds = NmsRounds<T>;
  const int c = threadIdx.x % Rounds::kChunk;
  const bool decides = threadIdx.x < Rounds::kChunk;  // the first of a candidate's four threads
  unsigned before[Rounds::kWords];
#pragma unroll
  for (int w = 0; w < Rounds::kWords; ++w) before[w] = shared.before[w][c];
  // The boxes that the candidate's class may still keep.
  const int64_t room = rules.max_per_class > 0 ? rules.max_per_class - shared.kept_peers[c] : 0;
  bool open = decides && bit(shared.open, c), excluded = false;
  while (__syncthreads_or(open)) {
    bool keep = false, drop = false;
    if (open) {
      unsigned suppressed = 0, waits = 0;
#pragma unroll
      for (int w = 0; w < Rounds::kWords; ++w) {
        suppressed |= before[w] & shared.kept[w];
        waits |= before[w] & shared.open[w];
      }
      if (rules.max_per_class > 0 && !suppressed) {
        int peers = 0, open_peers = 0;
        for (int w = 0; w < Rounds::kWords; ++w) {
          peers += __popc(shared.peers[w][c] & shared.kept[w]);
          open_peers += __popc(shared.peers[w][c] & shared.open[w]);
        }
        excluded = peers >= room;
        if (peers + open_peers >= room) waits = 1;
      }
      drop = suppressed || excluded;
      keep = !drop && !waits;
    }
    const unsigned newly_kept = __ballot_sync(kFullMask, keep),
                   decided = __ballot_sync(kFullMask, keep || drop);
    __syncthreads();  // all have read the masks
    if (decides && c % kWarp == 0) {
      shared.kept[c / kWarp] |= newly_kept;
      shared.open[c / kWarp] &= ~decided;
    }
    open = open && !keep && !drop;
  }
  if (rules.max_per_class == 0) return false;
  // A later round may have kept a box that suppresses an excluded candidate.
  unsigned suppressed = 0;
  for (int w = 0; w < Rounds::kWords; ++w) suppressed |= before[w] & shared.kept[w];
  return __syncthreads_or(excluded && !suppressed);
}

// Decides the next chunk of an image's candidates. Thread t < kChunk passes candidate t of the
// chunk in `mine` and whether it `exists`; the values of other threads are ignored. Appends the
// kept candidates to `kept`, which has room for max_detections boxes, and returns the slot of the
// thread's own candidate there, or -1 if it is not kept. All threads must call this function.
template <typename T>
__device__ __forceinline__ int64_t decide_chunk(NmsRounds<T>& shared, const NmsRules<T>& rules,
                                                const NmsBox<T>& mine, bool exists, NmsBox<T>* kept,
                                                NmsProgress& progress) {
  using Rounds = NmsRounds<T>;
  const int t = threadIdx.x;
  const unsigned existing = __ballot_sync(kFullMask, exists);
  __syncthreads();  // all have finished with the chunk before
  // Publish the candidates.
  if (t < Rounds::kChunk) {
    shared.candidates[t] = mine;
    shared.kept_peers[t] = 0;
    if (t % kWarp == 0) {
      shared.open[t / kWarp] = existing;
      shared.kept[t / kWarp] = 0;
    }
  }
  __syncthreads();
  compare_with_kept(shared, rules, kept, progress.size);
  compare_in_chunk(shared, rules);
  const bool excluded = decide_in_rounds(shared, rules);
  // Append the candidates to keep while there are slots.
  int chosen = 0;
#pragma unroll
  for (int w = 0; w < Rounds::kWords; ++w) chosen += __popc(shared.kept[w]);
  int64_t slot = -1;
  if (t < Rounds::kChunk && bit(shared.kept, t)) {
    slot = progress.size + rank_in(shared.kept, t);
    if (slot < rules.max_detections) {
      kept[slot] = shared.candidates[t];
    } else {
      slot = -1;
    }
  }
  const int64_t total = progress.size + chosen;
  progress.capped = progress.capped || excluded || total > rules.max_detections;
  progress.size = total < rules.max_detections ? total : rules.max_detections;
  return slot;
}

}  // namespace retinanet
