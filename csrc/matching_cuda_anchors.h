// The anchors that a block and a thread of matching_cuda.cu work on.
//
// A block takes kBlockAnchors consecutive anchors of an image. On a grid, they belong to one level,
// and a level's last block has fewer. A warp takes kThreadAnchors groups of 32 neighbours, one
// anchor of each group per lane:
//
//   anchors of the block    0 ... 31 | 32 ... 63 | 64 ... 95 | 96 ... 127 | ...
//                           warp 0               | warp 1                 | ...
#pragma once

#include "common/cuda.h"
#include "matching.h"

namespace retinanet {

constexpr int kThreads = 128;
constexpr int kThreadAnchors = 2;
constexpr int kBlockAnchors = kThreads * kThreadAnchors;

// Bounds that hold for every anchor of a grid's level.
struct alignas(16) LevelBounds {
  Box<float> base;  // encloses the base anchors
  float least_area, most_area;
};

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
  // The first block of each level of a grid, then the number of blocks, and the levels' bounds.
  unsigned first_block[kMaxLevels + 1];
  LevelBounds* level_bounds;

  __device__ __forceinline__ int num_gt(int64_t image) const {
    return int(clamp_count(gt_count[image], max_gt));
  }
  __device__ __forceinline__ const T* best_of(int64_t image) const {
    return best ? best + image * max_gt : nullptr;
  }
};

// The anchors of the calling block.
struct BlockAnchors {
  int64_t first;  // the number of the first one in its image
  int size;
  int level;          // on a grid
  uint32_t in_level;  // on a grid, the number of the first one in the level

  template <typename T>
  __device__ __forceinline__ static BlockAnchors of_grid(const MatchBatch<T>& batch) {
    const Grid& grid = batch.anchors.grid;
    int level = 0;
    while (blockIdx.x >= batch.first_block[level + 1]) ++level;
    const uint32_t in_level = (blockIdx.x - batch.first_block[level]) * kBlockAnchors;
    const uint32_t rest = uint32_t(grid.first[level + 1] - grid.first[level]) - in_level;
    return {grid.first[level] + in_level, rest < kBlockAnchors ? int(rest) : kBlockAnchors, level,
            in_level};
  }

  template <typename T>
  __device__ __forceinline__ static BlockAnchors of_boxes(const MatchBatch<T>& batch) {
    const int64_t first = int64_t(blockIdx.x) * kBlockAnchors, rest = batch.num_anchors - first;
    return {first, rest < kBlockAnchors ? int(rest) : kBlockAnchors, 0, 0};
  }
};

// The anchors of the calling thread, and what is known of their matches.
template <typename T>
struct ThreadAnchors {
  Box<T> box[kThreadAnchors];  // 0 beyond the last anchor of the block
  T area[kThreadAnchors];
  AnchorMatch<T> match[kThreadAnchors];
  int size;  // anchors of the block

  template <bool kOnGrid>
  __device__ __forceinline__ static ThreadAnchors load(const MatchBatch<T>& batch, int64_t image,
                                                       const BlockAnchors& block) {
    ThreadAnchors mine;
    mine.size = block.size;
#pragma unroll
    for (int k = 0; k < kThreadAnchors; ++k) {
      mine.box[k] = {0, 0, 0, 0};
      if (mine.active(k)) {
        if constexpr (kOnGrid) {
          const Box<float> b = batch.anchors.grid.box_in_level(
              block.level, static_cast<const float*>(batch.anchors.data),
              block.in_level + in_block(k));
          mine.box[k] = {T(b.x1), T(b.y1), T(b.x2), T(b.y2)};
        } else {
          mine.box[k] = static_cast<const Box<T>*>(
              batch.anchors.data)[image * batch.anchors.image_stride + block.first + in_block(k)];
        }
      }
      mine.area[k] = retinanet::area(mine.box[k]);
    }
    return mine;
  }

  // The index in its block of the thread's anchor k.
  __device__ __forceinline__ static int in_block(int k) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    return (warp * kThreadAnchors + k) * kWarp + lane;
  }

  __device__ __forceinline__ bool active(int k) const { return in_block(k) < size; }

  // Compares the anchors with a ground truth and returns their highest IoU with it. An IoU of 0 is
  // passed over unless `zero_is_relevant`.
  __device__ __forceinline__ T visit(int gt, const Box<T>& gt_box, T gt_area, T promoting_iou,
                                     bool zero_is_relevant) {
    T best = 0;
#pragma unroll
    for (int k = 0; k < kThreadAnchors; ++k) {
      if (may_overlap(gt_box, box[k]) | zero_is_relevant) {
        const T pair_iou = iou(gt_box, gt_area, box[k], area[k]);
        match[k].visit(gt, pair_iou);
        match[k].promote(gt, pair_iou, promoting_iou);
        best = higher(best, pair_iou);
      }
    }
    return best;
  }
};

}  // namespace retinanet
