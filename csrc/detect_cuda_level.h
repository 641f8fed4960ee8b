// The topk best keys of each level: one block of 1,024 threads per level and image reads what the
// level's tiles have kept.
//
//     segments      | front | others | front | others | ...         of the level's tiles
//          |  1. The fronts alone give a lower bound of the topk-th best key.
//          |  2. The keys from there on are gathered in shared memory. Of most segments, only the
//          |     front has any.
//          v
//     gathered      about topk keys
//          |  3. The topk best of them go to the level's slots, in any order.
//          v
//     keys          | level 0, topk slots | level 1, topk slots | ...
#pragma once

#include "detect_cuda_tile.h"

namespace retinanet {

constexpr int kLevelThreads = 1024;
constexpr int kGathered = 4096;  // keys that a level's block gathers in shared memory

// Visits keys of a level's segments. A warp takes a segment, and its lanes the keys. A segment's
// front is visited, and the other keys if `all` is set and some may reach `least`.
template <typename F>
__device__ __forceinline__ void for_segments(const int64_t* segments, const TileResult* results,
                                             int tiles, bool all, int64_t least, const F& visit) {
  for (int tile = int(threadIdx.x) / kWarp; tile < tiles; tile += kLevelThreads / kWarp) {
    const TileResult& result = results[tile];
    const bool others = all && result.front_least > least;
    const int count = others ? result.kept : result.front;
    for (int i = threadIdx.x % kWarp; i < count; i += kWarp)
      visit(segments[int64_t(tile) * kSegment + i]);
  }
}

// Writes the topk best keys of a level to its slots.
__global__ void __launch_bounds__(kLevelThreads)
    select_level_kernel(Tiles tiles, const int64_t* __restrict__ segments,
                        const TileResult* __restrict__ results, int64_t* __restrict__ keys,
                        bool* __restrict__ truncated) {
  __shared__ BestKeysSearch<kLevelThreads> search;
  __shared__ int64_t gathered[kGathered];
  __shared__ int64_t level_front, level_kept, level_passed;
  __shared__ int gathering, selected;
  const int l = blockIdx.x, levels = gridDim.x, count = tiles.first[l + 1] - tiles.first[l];
  const int64_t image = blockIdx.y;
  const int64_t first = image * tiles.first[levels] + tiles.first[l];
  segments += first * kSegment;
  results += first;
  // Add up the numbers of keys and of passed logits over the level's tiles.
  int64_t my_front = 0, my_kept = 0, my_passed = 0;
  for (int tile = threadIdx.x; tile < count; tile += kLevelThreads) {
    my_front += results[tile].front;
    my_kept += results[tile].kept;
    my_passed += results[tile].passed;
  }
  my_front = block_sum<kLevelThreads>(my_front);
  my_kept = block_sum<kLevelThreads>(my_kept);
  my_passed = block_sum<kLevelThreads>(my_passed);
  if (threadIdx.x == 0) {
    level_front = my_front;
    level_kept = my_kept;
    level_passed = my_passed;
    gathering = 0;
    selected = 0;
  }
  __syncthreads();

  const int slots = int(tiles.slot[l + 1] - tiles.slot[l]);
  int64_t* out = keys + image * tiles.slot[levels] + tiles.slot[l];
  const auto select = [&](int64_t key) { out[atomicAdd(&selected, 1)] = key; };
  if (level_kept <= slots) {
    // All keys fit.
    for_segments(segments, results, count, true, kNoKey, select);
  } else {
    // Find a lower bound of the topk-th best key.
    int64_t least = kNoKey;
    if (level_front >= slots)
      least = best_keys(search, slots, slots + slots / 4, [&](auto&& visit) {
                for_segments(segments, results, count, false, kNoKey, visit);
              }).least;
    // Gather the keys from there on, as many as there is room for.
    for_segments(segments, results, count, true, least, [&](int64_t key) {
      if (key < least) return;
      const int place = atomicAdd(&gathering, 1);
      if (place < kGathered) gathered[place] = key;
    });
    __syncthreads();
    const int found = gathering;
    // Select the topk best, from global memory again if there was no room.
    const auto for_keys = [&](auto&& visit) {
      if (found <= kGathered) {
        for (int i = threadIdx.x; i < found; i += kLevelThreads) visit(gathered[i]);
      } else {
        for_segments(segments, results, count, true, least, visit);
      }
    };
    const int64_t last = best_keys(search, slots, slots, for_keys).least;
    for_keys([&](int64_t key) {
      if (key >= last) select(key);
    });
  }
  __syncthreads();
  // Mark the unused slots.
  for (int i = selected + int(threadIdx.x); i < slots; i += kLevelThreads) out[i] = kNoKey;
  if (threadIdx.x == 0) truncated[image * levels + l] = level_passed > tiles.topk;
}

}  // namespace retinanet
