// The best keys of each tile: the only read of the logits.
//
// A tile is some steps of one level of one image, in memory order. A step is four packs of each of
// 256 threads, all on their way at once:
//
//     image     |..lead..|  step 0                          |  step 1   ...        |..tail..|
//     step      | pack of thread 0 | pack of thread 1 | ... | four times
//
// Packs start at multiples of 16 bytes, wherever the image starts. The first and the last pack of
// an image may reach beyond it. They are read element by element.
//
// Most steps hold nothing above the block's floor, and end after one comparison per logit and
// one barrier. In the others, each thread reserves room in shared memory for the keys of its logits
// above the floor. If there is no room, the block prunes its keys to about the topk best, whose
// lowest becomes the floor.
#pragma once

#include "detect_cuda_bins.h"
#include "detect_cuda_step.h"

namespace retinanet {

// How the levels of an image are cut into tiles.
struct Tiles {
  int first[kMaxLevels + 1] = {0};     // the level's first tile
  int64_t slot[kMaxLevels + 1] = {0};  // the level's first slot in the output
  int steps;                           // of a tile
  int topk;
};

// What a tile has found. Its keys are in a segment of global memory: first the front, which are
// the best, then the others.
struct alignas(8) TileResult {
  int64_t front_least;  // the keys of the front are not below it, the others are
  int front, kept;      // keys in the front, and in all
  int64_t passed;       // logits that passed, unless there are more than topk
};

constexpr int kTileKeys = 4096;  // keys in shared memory
// The most keys of a segment, and the largest topk. A buffer of this many keys has room for the
// logits of one more pack of each thread.
constexpr int kSegment = 2048;
constexpr int kFront = 128;  // the most keys of a segment's front

// A block's shared memory.
struct TileKeys {
  BestKeysSearch<256> search;
  int64_t keys[kTileKeys];
  int reserved;       // slots of `keys` that are taken
  int front, others;  // keys written to the segment
};

// One tile as a block sees it. Places count the elements of the tile. The place 0 of an image's
// first tile is the last multiple of 16 bytes at or before the image's first logit.
template <typename T>
struct TileLogits {
  const T* base;                        // place 0, which may be before the image's first logit
  int first, end;                       // the logits of the image are at [first, end)
  uint32_t origin;                      // place 0 as an offset in the level, modulo 2^32
  uint32_t level_first;                 // index of the level's first logit among all levels
  uint32_t area, channels, reciprocal;  // reciprocal = (2^32 - 1) / area, rounded down
  bool channels_last;

  // The tile of `places` places that starts at place `begin` of an image.
  __device__ TileLogits(const HeadLevel<T>& level, int64_t image, int64_t begin, int places) {
    const T* x = level.data + image * level.size();
    const int lead = int(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
    const int64_t left = lead + level.size() - begin;
    base = x - lead + begin;
    first = begin == 0 ? lead : 0;
    end = left < places ? int(left) : places;
    origin = uint32_t(begin) - uint32_t(lead);
    level_first = uint32_t(level.first);
    area = uint32_t(level.area);
    channels = uint32_t(level.channels);
    reciprocal = 0xffffffffu / area;
    channels_last = level.channels_last;
  }

  // The ranking key of the logit at a place.
  __device__ __forceinline__ int64_t key(float logit, int place) const {
    uint32_t offset = origin + uint32_t(place);
    if (!channels_last) {
      // Divide by multiplication. The quotient is at most one too low.
      uint32_t channel = __umulhi(offset, reciprocal), cell = offset - channel * area;
      if (cell >= area) {
        ++channel;
        cell -= area;
      }
      offset = cell * channels + channel;
    }
    return ranking_key(logit, level_first + offset);
  }

  __device__ __forceinline__ int64_t key(int place) const { return key(float(base[place]), place); }

  // The pack at a place. Elements outside the image are NaN, which never passes.
  __device__ __forceinline__ Packed<T> load(int place) const {
    constexpr int kSize = Packed<T>::kSize;
    if (place >= first && place + kSize <= end) return load_packed(base + place);
    Packed<T> pack;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const bool inside = place + j >= first && place + j < end;
      pack.v[j] = inside ? base[place + j] : T(std::numeric_limits<float>::quiet_NaN());
    }
    return pack;
  }

  // The thread's packs of the step that starts at place `step`. Only the first and the last step of
  // an image can reach beyond it.
  __device__ __forceinline__ void load_step(int step, StepPacks<T>& packs) const {
    if (step >= first && step + SelectTile<T>::kStep <= end) {
#pragma unroll
      for (int p = 0; p < kTilePacks; ++p)
        packs[p] = load_packed(base + place_of<T>(step, p * Packed<T>::kSize));
    } else {
#pragma unroll
      for (int p = 0; p < kTilePacks; ++p) packs[p] = load(place_of<T>(step, p * Packed<T>::kSize));
    }
  }
};

// The keys that a block has collected. All members are the same in every thread.
struct TileState {
  int filled = 0;          // keys in shared memory
  float least;             // lower logits are not among the topk best
  int64_t floor = kNoKey;  // neither are keys below this one
};

// The most keys that pruning leaves: a few more than topk, which saves passes.
__device__ __forceinline__ int most_kept(int topk) { return min(topk + topk / 4, kSegment); }

// Prunes the block's keys in place to the best, at least `fewest` and at most `most`. All threads
// must call this function.
__device__ __forceinline__ void prune(TileKeys& shared, TileState& state, int fewest, int most) {
  constexpr int kThreads = 256;
  const int filled = state.filled;
  const BestKeys best = best_keys(shared.search, fewest, most, [&](auto&& visit) {
    for (int i = threadIdx.x; i < filled; i += kThreads) visit(shared.keys[i]);
  });
  if (threadIdx.x == 0) shared.reserved = 0;
  // The survivors of each 256 keys move down, to places that have been read.
  for (int start = 0; start < filled; start += kThreads) {
    const int i = start + int(threadIdx.x);
    const int64_t key = i < filled ? shared.keys[i] : kNoKey;
    __syncthreads();
    if (i < filled && key >= best.least) shared.keys[atomicAdd(&shared.reserved, 1)] = key;
  }
  __syncthreads();
  state.filled = best.count;
  state.floor = best.least;
  state.least = lowest_logit(best.least, state.least);
}

// Leaves in `mask` the logits whose keys are not below the floor.
template <typename T>
__device__ __forceinline__ unsigned not_below_floor(const TileLogits<T>& logits,
                                                    const TileState& state, int step,
                                                    unsigned mask) {
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int place = first_place<T>(step, left);
    const float logit = float(logits.base[place]);
    // Only a logit that equals the lowest one needs a look at its key.
    if (logit < state.least || (logit == state.least && logits.key(logit, place) < state.floor))
      mask ^= left & (0 - left);
  }
  return mask;
}

// Reserves room for the keys of `mask` in every thread, and writes them if there is room for all.
// Returns whether there was. All threads must call this function.
template <typename T>
__device__ __forceinline__ bool collect(TileKeys& shared, const TileLogits<T>& logits,
                                        TileState& state, int step, unsigned mask) {
  int slot = mask != 0 ? atomicAdd(&shared.reserved, __popc(mask)) : 0;
  __syncthreads();
  const int reserved = shared.reserved;
  if (reserved > kTileKeys) return false;
  for (; mask != 0; mask &= mask - 1) shared.keys[slot++] = logits.key(first_place<T>(step, mask));
  state.filled = reserved;
  return true;
}

// Collects the keys of `mask` pack by pack, and prunes in between, so that there is always room.
// All threads must call this function.
template <typename T>
__device__ __forceinline__ void collect_slowly(TileKeys& shared, const TileLogits<T>& logits,
                                               TileState& state, int step, unsigned mask,
                                               int topk) {
  using Select = SelectTile<T>;
  for (int p = 0; p < kTilePacks; ++p) {
    __syncthreads();  // all keys are written, and all have read the reserved slots
    if (state.filled + Select::kThreads * Select::kSize > kTileKeys)
      prune(shared, state, topk, most_kept(topk));
    if (threadIdx.x == 0) shared.reserved = state.filled;
    __syncthreads();
    const unsigned of_pack = mask & bits_of_pack<T>(p);
    collect(shared, logits, state, step, not_below_floor(logits, state, step, of_pack));
  }
}

// Writes the block's keys to a segment, the best of them first. All threads must call this
// function.
__device__ __forceinline__ void write_segment(TileKeys& shared, TileState& state, int topk,
                                              int64_t passed, int64_t* segment,
                                              TileResult& result) {
  __syncthreads();  // all keys are written
  if (state.filled > kSegment) prune(shared, state, topk, most_kept(topk));
  const int filled = state.filled;
  // Find the front. If all keys fit, it has them all.
  BestKeys front{kNoKey, filled};
  if (filled > kFront)
    front = best_keys(shared.search, kFront / 2, kFront, [&](auto&& visit) {
      for (int i = threadIdx.x; i < filled; i += 256) visit(shared.keys[i]);
    });
  if (threadIdx.x == 0) {
    shared.front = 0;
    shared.others = front.count;
    result = {front.least, front.count, filled, passed};
  }
  __syncthreads();
  for (int i = threadIdx.x; i < filled; i += 256) {
    const int64_t key = shared.keys[i];
    segment[atomicAdd(key >= front.least ? &shared.front : &shared.others, 1)] = key;
  }
}

// Writes the best keys of a tile to its segment, and what it has found to `results`.
// 128-bit accesses: 4 loads, 0 stores
// Hot loop: one loop over packs takes nearly all of the time
template <typename T>
__global__ void __launch_bounds__(SelectTile<T>::kThreads, 4)
    select_tile_kernel(HeadLevels<T> levels, Tiles tiles, float limit,
                       const int64_t* __restrict__ floors, int64_t* __restrict__ segments,
                       TileResult* __restrict__ results) {
  using Select = SelectTile<T>;
  __shared__ TileKeys shared;
  // Find the level of this tile, and the tile's places.
  const int tile = blockIdx.x;
  int l = 0;
  while (tile >= tiles.first[l + 1]) ++l;
  const int places = tiles.steps * Select::kStep;
  const TileLogits<T> logits(levels.level[l], blockIdx.y, int64_t(tile - tiles.first[l]) * places,
                             places);
  TileState state;
  state.floor = floors[int64_t(blockIdx.y) * levels.count + l];
  state.least = state.floor == kNoKey ? limit : lowest_logit(state.floor, limit);
  StepTest<T> test(state.least);
  int my_passed = 0;
  if (threadIdx.x == 0) shared.reserved = 0;
  __syncthreads();
  for (int step = 0; step < logits.end; step += Select::kStep) {
    // Load the thread's packs, and skip the step if no thread has a logit above the floor.
    StepPacks<T> packs;
    logits.load_step(step, packs);
    unsigned mask = test(packs);
    if (!__syncthreads_or(mask != 0)) continue;
    // Collect the keys of those that are.
    my_passed += __popc(mask);
    // A floor without index bits is not above any key of its logit.
    if (uint32_t(state.floor) != 0) mask = not_below_floor(logits, state, step, mask);
    if (!collect(shared, logits, state, step, mask)) {
      collect_slowly(shared, logits, state, step, mask, tiles.topk);
      test = StepTest<T>(state.least);
    }
  }
  const int64_t passed = block_sum<Select::kThreads>(my_passed);
  const int64_t i = int64_t(blockIdx.y) * gridDim.x + tile;
  write_segment(shared, state, tiles.topk, passed, segments + i * kSegment, results[i]);
}

}  // namespace retinanet
