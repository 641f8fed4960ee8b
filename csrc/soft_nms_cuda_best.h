// The best candidate of a block, with one barrier.
//
//     lanes        each its best candidate
//        |  maximum over the warp: of the scores, then of the indices that have it
//     warps        each writes its best candidate, with its box, to shared memory
//        |  barrier; each warp reads the candidates of all warps, one per lane
//     block        maximum over the warp again, in every warp
//
// Successive calls alternate between two buffers. A warp that is late to read one is waited for at
// the next call's barrier, before any warp writes to that buffer again.
#pragma once

#include <bit>

#include "common/boxes.h"
#include "common/cuda.h"

namespace retinanet {

// A candidate's score and index. A score of 0 stands for no candidate.
template <typename T>
struct Best {
  T score;
  int index;

  __device__ __forceinline__ void meet(T other_score, int other) {
    if (other_score > score || (other_score == score && other < index)) {
      score = other_score;
      index = other;
    }
  }
};

// The largest value of the warp, in every lane.
__device__ __forceinline__ unsigned warp_max(unsigned value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = max(value, __shfl_xor_sync(kFullMask, value, offset));
  return value;
#else
  return __reduce_max_sync(kFullMask, value);
#endif
}

__device__ __forceinline__ uint64_t warp_max(uint64_t value) {
  const unsigned high = unsigned(value >> 32), top = warp_max(high);
  return uint64_t(top) << 32 | warp_max(high == top ? unsigned(value) : 0u);
}

// The best candidate of the warp, in every lane. Scores are not negative, so their bits order like
// they do.
template <typename T>
__device__ __forceinline__ Best<T> warp_best(const Best<T>& best) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, unsigned>;
  const Bits bits = std::bit_cast<Bits>(best.score), top = warp_max(bits);
  return {std::bit_cast<T>(top), int(~warp_max(bits == top ? ~unsigned(best.index) : 0u))};
}

// A candidate's box and class.
template <typename T>
struct ClassBox {
  Box<T> box;
  int64_t label;
};

// The shared memory of a search, one per block of at most 32 warps.
template <typename T, int kThreads>
struct BlockBest {
  static constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kWarp, "a lane must read the candidate of each warp");

  T scores[2][kWarp];  // lanes without a warp read that there is no candidate
  int indices[2][kWarp];
  ClassBox<T> boxes[2][kWarps];

  // Sets every warp's candidate to none. A barrier must follow.
  __device__ __forceinline__ void clear() {
    if (threadIdx.x >= 2 * kWarp) return;
    scores[threadIdx.x / kWarp][threadIdx.x % kWarp] = 0;
    indices[threadIdx.x / kWarp][threadIdx.x % kWarp] = 0;
  }

  // Sets `best` to the best of the candidates that the threads pass in `best`, in every thread.
  // Returns the warp that has it. Its box, box_of(best.index), is then in boxes[buffer][warp] until
  // the next call. Calls alternate between buffers 0 and 1. `has_candidates` is the same in all
  // threads of a warp, and stays true from one call to the next. All threads must call this
  // function.
  template <typename BoxOf>
  __device__ __forceinline__ int find(Best<T>& best, int buffer, bool has_candidates,
                                      const BoxOf& box_of) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (has_candidates) {
      const Best<T> of_warp = warp_best(best);
      if (best.score > T(0) && best.index == of_warp.index) {
        scores[buffer][warp] = best.score;
        indices[buffer][warp] = best.index;
        boxes[buffer][warp] = box_of(best.index);
      } else if (lane == 0 && of_warp.score == T(0)) {
        scores[buffer][warp] = 0;
      }
    }
    __syncthreads();
    const Best<T> of_lane{scores[buffer][lane], indices[buffer][lane]};
    best = warp_best(of_lane);
    const bool has_best = of_lane.score == best.score && of_lane.index == best.index;
    return __ffs(int(__ballot_sync(kFullMask, has_best))) - 1;
  }
};

}  // namespace retinanet
