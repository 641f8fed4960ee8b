// The first kernel of matching on CUDA: what the blocks of the second need to know of all anchors.
#pragma once

#include "matching_cuda_bounds.h"
#include "matching_grid_reach.h"

namespace retinanet {

constexpr int kPrepareThreads = 256;
constexpr int kPrepareWarps = kPrepareThreads / kWarp;

// Finds a level's bounds. The lanes of the warp divide the base anchors among them.
__device__ __forceinline__ void find_level_bounds(const Grid& grid, int level,
                                                  const float* base_anchors, LevelBounds* result) {
  constexpr float kMax = std::numeric_limits<float>::max();
  // A NaN leaves a maximum as it is. min(v) = -max(-v), so all bounds are maxima.
  float most[6] = {-kMax, -kMax, -kMax, -kMax, -kMax, 0.f};
  for (int b = threadIdx.x % kWarp; b < grid.per_cell[level]; b += kWarp) {
    const float* base = base_anchors + 4 * int64_t(grid.base[level] + b);
    const BaseReach reach(grid, level, base);
    // In some cells, rounding makes an anchor smaller or larger than its base anchor.
    const float slack = rounding_slack(reach.x.extent, reach.y.extent);
    const float least_area = higher(0.f, reach.x.size - slack) * higher(0.f, reach.y.size - slack);
    const float most_area = (reach.x.size + slack) * (reach.y.size + slack);
    const float values[6] = {-base[0], -base[1], base[2], base[3], -least_area, most_area};
#pragma unroll
    for (int i = 0; i < 6; ++i) most[i] = higher(most[i], values[i]);
  }
#pragma unroll
  for (int i = 0; i < 6; ++i) most[i] = warp_max(most[i]);
  if (threadIdx.x % kWarp != 0) return;
  // Areas that are hardly normal numbers, or none, are no bounds.
  constexpr float kTiny = 1e-30f;
  const float least_area = lower(-most[4], kMax);
  *result = {{-most[0], -most[1], most[2], most[3]},
             least_area < kTiny ? 0.f : least_area,
             higher(most[5], kTiny)};
}

// Finds the best IoU of a ground truth over the anchors of a grid. All lanes of a warp must call it
// with the same box, and get the same result.
template <typename T>
__device__ __forceinline__ T find_best_on_grid(const Grid& grid, const float* base_anchors,
                                               const Box<T>& box) {
  const int lane = threadIdx.x % kWarp;
  const T box_area = area(box);
  const int last = grid.levels - 1, bases = grid.base[last] + grid.per_cell[last];
  T best = 0;
  const auto level_of_base = [&](int number) {
    int level = 0;
    while (level < last && number >= grid.base[level + 1]) ++level;
    return level;
  };
  const auto visit = [&](int level, int number, int64_t y, int64_t x) {
    const Box<float> a = grid.box(level, base_anchors + 4 * int64_t(number), y, x);
    const Box<T> anchor{T(a.x1), T(a.y1), T(a.x2), T(a.y2)};
    best = higher(best, iou_if_overlapping(box, box_area, anchor, area(anchor)));
  };
  // First visit, for each base anchor, the cell whose anchor is closest to the ground truth by
  // centre. The best of these IoUs is close to the best of all. Each lane has its own base anchors.
  for (int number = lane; number < bases; number += kWarp) {
    const int level = level_of_base(number);
    const BaseReach reach(grid, level, base_anchors + 4 * int64_t(number));
    int64_t y, x;
    if (BoxReach(reach, box).nearest(y, x)) visit(level, number, y, x);
  }
  // Then visit every anchor that can reach this IoU. No other can be better. The warp takes one
  // base anchor after the other, and its lanes divide the cells.
  const float lower_bound = higher(float(warp_max(best)), std::numeric_limits<float>::min());
  for (int first = 0; first < bases; first += kWarp) {
    // The cells of the lane's base anchor: rows y .. y + rows - 1, columns x .. x + columns - 1.
    // There are none if a size is 0 or less.
    int level = 0, y = 0, x = 0, rows = 0, columns = 0;
    if (first + lane < bases) {
      level = level_of_base(first + lane);
      const BaseReach reach(grid, level, base_anchors + 4 * int64_t(first + lane));
      const BoxReach box_reach(reach, box);
      const CellRange range = box_reach.range(box_reach.intersection_for_iou(lower_bound));
      y = int(range.rows.begin);
      x = int(range.columns.begin);
      rows = int(range.rows.end - range.rows.begin);
      columns = int(range.columns.end - range.columns.begin);
    }
    for (unsigned left = __ballot_sync(kFullMask, rows > 0 && columns > 0); left != 0;
         left &= left - 1) {
      const int owner = __ffs(int(left)) - 1;
      const int its_level = __shfl_sync(kFullMask, level, owner);
      const int its_y = __shfl_sync(kFullMask, y, owner), its_x = __shfl_sync(kFullMask, x, owner);
      const auto width = uint32_t(__shfl_sync(kFullMask, columns, owner));
      const uint32_t count = width * uint32_t(__shfl_sync(kFullMask, rows, owner));
      for (uint32_t i = lane; i < count; i += kWarp)
        visit(its_level, first + owner, its_y + i / width, its_x + i % width);
    }
  }
  return warp_max(best);
}

// Clears the counts of the results. On a grid, also finds the best IoU of each ground truth, where
// batch.best is given, and the bounds of each level. With explicit anchors, clears batch.best.
//
// Each warp has a task of its own: a ground truth of the image, or a level.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads, 2)
    match_prepare_kernel(const __grid_constant__ MatchBatch<T> batch, MatchOutputs<T> out) {
  const int64_t image = blockIdx.y;
  const int lane = threadIdx.x % kWarp;
  const int64_t task = int64_t(blockIdx.x) * kPrepareWarps + threadIdx.x / kWarp;
  const Grid& grid = batch.anchors.grid;
  const auto* base_anchors = static_cast<const float*>(batch.anchors.data);
  if (task == 0 && lane == 0) out.num_positive[image] = 0;
  if (task < batch.max_gt) {
    const int64_t i = image * batch.max_gt + task;
    if (out.gt_positives && lane == 0) out.gt_positives[i] = 0;
    if (!batch.best) return;  // in all lanes of a warp alike, as the next condition
    T best = 0;
    if (grid.levels > 0 && task < batch.num_gt(image) && is_valid(batch.gt_boxes[i]))
      best = find_best_on_grid(grid, base_anchors, batch.gt_boxes[i]);
    if (lane == 0) batch.best[i] = best;
  } else if (image == 0 && task - batch.max_gt < grid.levels) {
    const int level = int(task - batch.max_gt);
    find_level_bounds(grid, level, base_anchors, batch.level_bounds + level);
  }
}

// Launches the kernel.
template <typename T>
void prepare_matching(const MatchBatch<T>& batch, const MatchOutputs<T>& out, int64_t images,
                      const CudaScope& scope) {
  const int64_t tasks = std::max<int64_t>(batch.max_gt + batch.anchors.grid.levels, 1);
  launch("match_prepare_kernel", match_prepare_kernel<T>,
         dim3(unsigned(ceil_div(tasks, kPrepareWarps)), unsigned(images)), kPrepareThreads, 0,
         scope, batch, out);
}

}  // namespace retinanet
