// Tiles of ground truths in shared memory, for the kernels of matching_cuda.cu. A tile records
// which of its ground truths can change the result of any anchor of the block.
#pragma once

#include "common/cuda.h"
#include "matching.h"

namespace retinanet {

constexpr int kThreads = 256;  // the anchors of a block, one per thread
constexpr int kTile = 128;     // ground truths in shared memory

// The batch that the kernels work on.
template <typename T>
struct MatchBatch {
  Anchors<T> anchors;
  int64_t num_anchors;  // of one image
  const Box<T>* gt_boxes;
  const int64_t* gt_labels;  // null without labels
  const int64_t* gt_count;
  int max_gt;
  MatchRules<T> rules;
  T* best;  // [N, M]: the best IoU of each ground truth over all anchors; null if not asked for

  __device__ __forceinline__ int num_gt(int64_t image) const {
    return int(clamp_count(gt_count[image], max_gt));
  }
  __device__ __forceinline__ const T* best_of(int64_t image) const {
    return best ? best + image * max_gt : nullptr;
  }
};

// The maximum over a warp, in all of its lanes. All lanes must call it.
template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = max_of(value, __shfl_xor_sync(kFullMask, value, offset));
  return value;
}

// The smallest box that encloses the anchors of a block, and the range of their areas. Every thread
// of the block holds a copy. A NaN coordinate or area does not change the bounds.
template <typename T>
struct BlockBounds {
  Box<T> box;
  T least_area, most_area;

  // `anchor` is the calling thread's, if `active`. All threads must call this: it has a barrier.
  __device__ __forceinline__ BlockBounds(const Box<T>& anchor, T area, bool active) {
    constexpr T kMax = std::numeric_limits<T>::max();
    __shared__ T warps[kThreads / kWarp][6];
    // Reduce over each warp. min(v) = -max(-v), so one maximum serves all six bounds.
    const T mine[6] = {-anchor.x1, -anchor.y1, anchor.x2, anchor.y2, -area, area};
#pragma unroll
    for (int i = 0; i < 6; ++i) {
      const T most = warp_max(active ? max_of(-kMax, mine[i]) : -kMax);
      if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp][i] = most;
    }
    __syncthreads();
    // In each thread, reduce over the warps of the block.
    T all[6];
#pragma unroll
    for (int i = 0; i < 6; ++i) {
      all[i] = warps[0][i];
      for (int w = 1; w < kThreads / kWarp; ++w) all[i] = max_of(all[i], warps[w][i]);
    }
    box = {-all[0], -all[1], all[2], all[3]};
    least_area = -all[4];
    most_area = all[5];
  }

  // False if no anchor of the block can have an IoU of `relevant_iou` or more with box b. True if
  // `relevant_iou` is not positive, because every IoU is 0 or more.
  __device__ __forceinline__ bool may_match(const Box<T>& b, T area, T relevant_iou) const {
    if (!(relevant_iou > T(0))) return true;
    const bool touches = b.x1 < box.x2 && b.x2 > box.x1 && b.y1 < box.y2 && b.y2 > box.y1;
    // An IoU is at most the smaller area over the larger one. Rounding is far smaller than the
    // margin of 1e-4, unless the product is too small to be a normal number.
    const T least = relevant_iou * T(1 - 1e-4);
    return touches && (relevant_iou < T(1e-30) ||
                       (!(most_area < area * least) && !(area < least_area * least)));
  }
};

// A tile of ground truths in shared memory.
template <typename T>
struct GroundTruthTile {
  Box<T> box[kTile];
  T area[kTile], promoting_iou[kTile];
  unsigned relevant[kTile / kWarp];  // a bit for each ground truth that can change a result

  // Loads ground truths first .. first + size - 1 of the image, one per thread. `best` has the best
  // IoU of each ground truth of the image. If `best` is null, IoUs of `relevant_iou` and more can
  // change a result. Ends with a barrier.
  __device__ __forceinline__ void load(const MatchBatch<T>& batch, int64_t image, const T* best,
                                       T relevant_iou, int first, int size,
                                       const BlockBounds<T>& bounds) {
    const int i = threadIdx.x;
    bool matters = false;
    if (i < size) {
      box[i] = batch.gt_boxes[image * batch.max_gt + first + i];
      area[i] = retinanet::area(box[i]);
      const MatchRules<T>& rules = batch.rules;
      promoting_iou[i] = best ? rules.promoting_iou(best[first + i]) : T(-1);
      if (best) relevant_iou = rules.relevant_iou(promoting_iou[i]);
      matters = is_valid(box[i]) && bounds.may_match(box[i], area[i], relevant_iou);
    }
    // Store the ballot of each warp as one word of `relevant`.
    const unsigned bits = __ballot_sync(kFullMask, matters);
    if (i < kTile && i % kWarp == 0) relevant[i / kWarp] = bits;
    __syncthreads();
  }

  // Calls f(i) for the relevant ground truths, in order. All threads make the same calls.
  template <typename F>
  __device__ __forceinline__ void for_relevant(F&& f) const {
    for (int word = 0; word < kTile / kWarp; ++word)
      for (unsigned bits = relevant[word]; bits != 0; bits &= bits - 1)  // drops the lowest bit
        f(word * kWarp + __ffs(int(bits)) - 1);
  }
};

}  // namespace retinanet
