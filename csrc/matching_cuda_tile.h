// Tiles of ground truths in shared memory, for the kernels of matching_cuda.cu. A tile records
// which of its ground truths can change the result of any anchor of the block.
#pragma once

#include "matching_cuda_bounds.h"

namespace retinanet {

constexpr int kTile = kThreads;  // ground truths in shared memory, loaded by one thread each

// A tile of ground truths in shared memory.
template <typename T>
struct GroundTruthTile {
  Box<T> box[kTile];
  T area[kTile], promoting_iou[kTile];
  unsigned relevant[kTile / kWarp];  // a bit for each ground truth that can change a result

  // Loads ground truths first .. first + size - 1 of the image. `best` has the best IoU of each
  // ground truth of the image. If `best` is null, IoUs of `relevant_iou` and more can change a
  // result. Ends with a barrier.
  __device__ __forceinline__ void load(const MatchBatch<T>& batch, int64_t image, const T* best,
                                       T relevant_iou, int first, int size,
                                       const BlockBounds<T>& bounds) {
    const int i = threadIdx.x;
    bool matters = false;
    if (i < size) {
      const Box<T> gt = batch.gt_boxes[image * batch.max_gt + first + i];
      const T gt_area = retinanet::area(gt);
      const MatchRules<T>& rules = batch.rules;
      const T promoting = best ? rules.promoting_iou(best[first + i]) : T(-1);
      if (best) relevant_iou = rules.relevant_iou(promoting);
      matters = is_valid(gt) && bounds.may_match(gt, gt_area, relevant_iou);
      box[i] = gt;
      area[i] = gt_area;
      promoting_iou[i] = promoting;
    }
    // Store the ballot of each warp as one word of `relevant`.
    const unsigned bits = __ballot_sync(kFullMask, matters);
    if (i % kWarp == 0) relevant[i / kWarp] = bits;
    __syncthreads();
  }

  // Calls f(i) for the relevant ground truths, in order. All threads make the same calls.
  template <typename F>
  __device__ __forceinline__ void for_relevant(F&& f) const {
    for (int word = 0; word < kTile / kWarp; ++word)
      for (unsigned bits = relevant[word]; bits != 0; bits &= bits - 1)  // drops the lowest bit
        f(word * kWarp + __ffs(int(bits)) - 1);
  }

  // Compares ground truth i with the thread's anchors, and returns their highest IoU with it.
  // `first` is the image's index of the tile's first ground truth.
  __device__ __forceinline__ T visit(int first, int i, bool zero_is_relevant,
                                     ThreadAnchors<T>& mine) const {
    return mine.visit(first + i, box[i], area[i], promoting_iou[i], zero_is_relevant);
  }
};

}  // namespace retinanet
