// Bounds of the anchors of a block, which rule out ground truths for the whole block.
#pragma once

#include "matching_cuda_anchors.h"

namespace retinanet {

// The maximum over a warp, in all of its lanes. All lanes must call it.
template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = max(value, __shfl_xor_sync(kFullMask, value, offset));
  return value;
}

// A box that encloses the anchors of a block, and a range that holds their areas. Every thread of
// the block has a copy. Anchors with a coordinate that is not finite may lie outside, because their
// IoU with a valid ground truth is 0.
template <typename T>
struct BlockBounds {
  Box<T> box;
  T least_area, most_area;

  // The bounds of a block on a grid: the base anchors' bounds at the block's outermost cells.
  //
  //   cells of the block, in one row       in several rows
  //        . . . . . . . . .                 . . . . . x x x x
  //        . . x x x x x . .                 x x x x x x x x x     whole rows
  //        . . . . . . . . .                 x x . . . . . . .
  //
  // Rounding is monotonic, so no anchor crosses the sums below.
  __device__ __forceinline__ static BlockBounds of_cells(const Grid& grid,
                                                         const LevelBounds& level_bounds,
                                                         const BlockAnchors& block) {
    const int level = block.level;
    const Divisor& per_cell = grid.by_per_cell[level];
    const uint32_t last_anchor = block.in_level + uint32_t(block.size - 1);
    const Grid::Cell first = grid.cell_of(level, per_cell.quotient(block.in_level));
    const Grid::Cell last = grid.cell_of(level, per_cell.quotient(last_anchor));
    const bool one_row = first.y == last.y;
    const float left = grid.centre_x(level, one_row ? first.x : 0);
    const float right = grid.centre_x(level, one_row ? last.x : grid.width[level] - 1);
    const float top = grid.centre_y(level, first.y), bottom = grid.centre_y(level, last.y);
    const Box<float>& base = level_bounds.base;
    return {{T(add(lower(left, right), base.x1)), T(add(lower(top, bottom), base.y1)),
             T(add(higher(left, right), base.x2)), T(add(higher(top, bottom), base.y2))},
            T(level_bounds.least_area),
            T(level_bounds.most_area)};
  }

  // The bounds of explicit anchors. All threads must call it: it has a barrier.
  __device__ __forceinline__ static BlockBounds of_boxes(const ThreadAnchors<T>& mine) {
    constexpr T kMax = std::numeric_limits<T>::max();
    constexpr int kWarps = kThreads / kWarp;
    // The bounds of a warp, with signs for which each is a maximum: min(v) = -max(-v).
    struct Maxima {
      Box<T> box;
      T areas[2];
    };
    __shared__ Maxima warps[kWarps];
    // Reduce over the thread's anchors. A NaN leaves a maximum as it is.
    T most[6] = {-kMax, -kMax, -kMax, -kMax, -kMax, -kMax};
#pragma unroll
    for (int k = 0; k < kThreadAnchors; ++k) {
      if (!mine.active(k)) continue;
      const Box<T>& b = mine.box[k];
      const T values[6] = {-b.x1, -b.y1, b.x2, b.y2, -mine.area[k], mine.area[k]};
#pragma unroll
      for (int i = 0; i < 6; ++i) most[i] = higher(most[i], values[i]);
    }
    // Reduce over each warp.
#pragma unroll
    for (int i = 0; i < 6; ++i) most[i] = warp_max(most[i]);
    if (threadIdx.x % kWarp == 0)
      warps[threadIdx.x / kWarp] = {{most[0], most[1], most[2], most[3]}, {most[4], most[5]}};
    __syncthreads();
    // In each thread, reduce over the warps of the block.
    Maxima all{warps[0].box, {warps[0].areas[0], warps[0].areas[1]}};
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      const Maxima& other = warps[w];
      all.box = {higher(all.box.x1, other.box.x1), higher(all.box.y1, other.box.y1),
                 higher(all.box.x2, other.box.x2), higher(all.box.y2, other.box.y2)};
      for (int i = 0; i < 2; ++i) all.areas[i] = higher(all.areas[i], other.areas[i]);
    }
    return {{-all.box.x1, -all.box.y1, all.box.x2, all.box.y2}, -all.areas[0], all.areas[1]};
  }

  // False if no anchor of the block can have an IoU of `relevant_iou` or more with box b. True if
  // `relevant_iou` is not positive, because every IoU is 0 or more.
  __device__ __forceinline__ bool may_match(const Box<T>& b, T area, T relevant_iou) const {
    if (!(relevant_iou > T(0))) return true;
    // An IoU is at most the smaller area over the larger one. Rounding is far smaller than the
    // margin of 1e-4, unless the product is too small to be a normal number.
    const T least = relevant_iou * T(1 - 1e-4);
    return may_overlap(b, box) && (relevant_iou < T(1e-30) ||
                                   (!(most_area < area * least) && !(area < least_area * least)));
  }
};

}  // namespace retinanet
