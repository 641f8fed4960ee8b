// The topk best keys of each level for any topk: a search over global memory, in a fixed number of
// launches, with 8 KiB of temporary memory per level and image.
//
//     count_bins_kernel    one block per tile and image: the next 11 bits of the keys that begin
//          |               with the bits fixed so far, in 2,048 bins of the level
//          v
//     choose_bin_kernel    one block per level and image: the bin that holds the topk-th best key
//          |
//          |  six times; a level whose search has ended is not read again
//          v
//     write_keys_kernel    one block per tile and image: the selected keys
//
// The logits of a level are read two or three times if few of them are equal, else up to seven
// times.
#pragma once

#include "detect_cuda_tile.h"

namespace retinanet {

// The search in one level of one image.
struct LevelSearch {
  uint64_t prefix, fixed;  // the bits known so far, and a mask of them
  unsigned above;          // keys above all that begin with the prefix
  bool done;               // the keys from `prefix` on are selected
  unsigned selected;       // how many these are, once done
  unsigned written;        // of which are in the output
};

// Calls visit(place) for the logits of a tile that pass.
template <typename T, typename F>
__device__ __forceinline__ void for_passing(const TileLogits<T>& logits, float limit,
                                            const F& visit) {
  const StepTest<T> test(limit);
  for (int step = 0; step < logits.end; step += SelectTile<T>::kStep) {
    StepPacks<T> packs;
    logits.load_step(step, packs);
    for (unsigned mask = test(packs); mask != 0; mask &= mask - 1)
      visit(first_place<T>(step, mask));
  }
}

// Counts, in the level's bins, the next bits of the tile's keys that begin with the prefix.
// 128-bit accesses: 4 loads, 0 stores
template <typename T>
__global__ void __launch_bounds__(SelectTile<T>::kThreads)
    count_bins_kernel(HeadLevels<T> levels, Tiles tiles, float limit, int pass,
                      const LevelSearch* __restrict__ searches, unsigned* __restrict__ counts) {
  constexpr int kThreads = SelectTile<T>::kThreads, kBins = BestKeysSearch<kThreads>::kBins;
  __shared__ unsigned bins[kBins];
  const int tile = blockIdx.x;
  int l = 0;
  while (tile >= tiles.first[l + 1]) ++l;
  const int64_t i = int64_t(blockIdx.y) * levels.count + l;
  const LevelSearch& search = searches[i];
  if (search.done) return;
  const uint64_t prefix = search.prefix, fixed = search.fixed;
  const int shift = bin_shift(pass), places = tiles.steps * SelectTile<T>::kStep;
  for (int b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
  __syncthreads();
  const TileLogits<T> logits(levels.level[l], blockIdx.y, int64_t(tile - tiles.first[l]) * places,
                             places);
  for_passing(logits, limit, [&](int place) {
    const uint64_t bits = sortable_bits(logits.key(place));
    if ((bits & fixed) == prefix) atomicAdd(&bins[int(bits >> shift) & (kBins - 1)], 1u);
  });
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kThreads) {
    if (bins[b] != 0) atomicAdd(&counts[i * kBins + b], bins[b]);
  }
}

// Chooses the bin that holds the level's topk-th best key, and clears the bins for the next pass.
__global__ void __launch_bounds__(1024)
    choose_bin_kernel(Tiles tiles, int pass, LevelSearch* __restrict__ searches,
                      unsigned* __restrict__ counts, bool* __restrict__ truncated) {
  constexpr int kThreads = 1024, kBins = BestKeysSearch<kThreads>::kBins;
  __shared__ BestKeysSearch<kThreads> shared;
  __shared__ int64_t total;
  const int64_t i = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  LevelSearch& search = searches[i];
  if (search.done) return;
  const unsigned above = search.above;
  int64_t my_total = 0;
  for (int b = threadIdx.x; b < kBins; b += kThreads) {
    shared.counts[b] = counts[i * kBins + b];
    my_total += shared.counts[b];
    counts[i * kBins + b] = 0;
  }
  my_total = block_sum<kThreads>(my_total);
  if (threadIdx.x == 0) total = my_total;
  __syncthreads();
  const int64_t slots = tiles.slot[blockIdx.x + 1] - tiles.slot[blockIdx.x];
  if (pass == 0) {
    // The first pass counts all keys.
    if (threadIdx.x == 0) truncated[i] = total > tiles.topk;
    if (total <= slots) {
      if (threadIdx.x == 0) {
        search.done = true;
        search.selected = unsigned(total);
      }
      return;
    }
  }
  const FoundBin found = find_bin(shared, above, unsigned(slots));
  if (threadIdx.x == 0) {
    search.prefix |= uint64_t(found.bin) << bin_shift(pass);
    search.fixed |= uint64_t(kBins - 1) << bin_shift(pass);
    search.above = found.above;
    search.done = found.count == unsigned(slots);
    search.selected = found.count;
  }
}

// Writes the selected keys of a tile to the level's slots, in any order, and marks unused slots.
// 128-bit accesses: 4 loads, 0 stores
template <typename T>
__global__ void __launch_bounds__(SelectTile<T>::kThreads, 4)
    write_keys_kernel(HeadLevels<T> levels, Tiles tiles, float limit,
                      LevelSearch* __restrict__ searches, int64_t* __restrict__ keys) {
  const int tile = blockIdx.x;
  int l = 0;
  while (tile >= tiles.first[l + 1]) ++l;
  LevelSearch& search = searches[int64_t(blockIdx.y) * levels.count + l];
  const int64_t least = sortable_key(search.prefix), selected = search.selected;
  const int64_t slots = tiles.slot[l + 1] - tiles.slot[l];
  int64_t* out = keys + int64_t(blockIdx.y) * tiles.slot[levels.count] + tiles.slot[l];
  const int places = tiles.steps * SelectTile<T>::kStep;
  const TileLogits<T> logits(levels.level[l], blockIdx.y, int64_t(tile - tiles.first[l]) * places,
                             places);
  for_passing(logits, limit, [&](int place) {
    const int64_t key = logits.key(place);
    if (key >= least) out[atomicAdd(&search.written, 1u)] = key;
  });
  // The level's blocks share the unused slots.
  const int64_t threads = int64_t(tiles.first[l + 1] - tiles.first[l]) * blockDim.x;
  for (int64_t i = selected + int64_t(tile - tiles.first[l]) * blockDim.x + threadIdx.x; i < slots;
       i += threads)
    out[i] = kNoKey;
}

}  // namespace retinanet
