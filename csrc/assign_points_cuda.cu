// Assignment of points on CUDA. blockIdx.y is the image.
//
// Work: one point per thread. A block takes its points through the ground truths of the image tile
// by tile:
//
//   ground truths            0 ......... 127   128 ....... 255   ...
//                          +---------------+-----------------+---
//   points     0 ..  127   | tile          | tile            |        block 0
//                          +---------------+-----------------+---
//            128 ..  255   | tile          | tile            |        block 1
//                          +---------------+-----------------+---
//
// A thread of the block loads one ground truth of a tile into shared memory, and marks it if it may
// take a point within the bounds of the block's points. All threads then visit the marked ones in
// order. With the usual radius, a ground truth is marked in a few blocks of each level.
//
// clear_positives_kernel clears the counts, to which the blocks of assign_points_kernel add.
//
// Bytes moved per point: 16 read (0 with a grid, whose anchors are computed) and 8 written.
// Deterministic: the only atomics are on integers.
#include "assign_points.h"
#include "matching_cuda_bounds.h"

namespace retinanet {
namespace {

// The batch that the kernels work on.
template <typename T>
struct PointBatch {
  Anchors<T> anchors;
  int64_t num_anchors;  // of one image
  const Box<T>* gt_boxes;
  const int64_t* gt_labels;
  const int64_t* gt_count;
  int max_gt;
  PointRules<T> rules;
};

// The bounds of the points of a block. All threads must call it: it has barriers.
template <typename T>
__device__ __forceinline__ PointBounds<T> bounds_of_block(const Point<T>& point, bool active) {
  constexpr T kMax = std::numeric_limits<T>::max();
  constexpr int kWarps = kThreads / kWarp, kBounds = 5;
  __shared__ T warps[kWarps][kBounds];
  // min(v) = -max(-v), so all bounds are maxima. A NaN leaves a maximum as it is.
  T most[kBounds] = {-kMax, -kMax, -kMax, -kMax, -kMax};
  if (active) {
    const T values[kBounds] = {-point.x, -point.y, point.x, point.y, point.reach};
#pragma unroll
    for (int i = 0; i < kBounds; ++i) most[i] = higher(most[i], values[i]);
  }
#pragma unroll
  for (int i = 0; i < kBounds; ++i) most[i] = warp_max(most[i]);
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < kBounds; ++i) warps[threadIdx.x / kWarp][i] = most[i];
  }
  __syncthreads();
  // In each thread, reduce over the warps of the block.
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
#pragma unroll
    for (int i = 0; i < kBounds; ++i) most[i] = higher(most[i], warps[w][i]);
  return {-most[0], -most[1], most[2], most[3], most[4]};
}

__global__ void __launch_bounds__(kThreads) clear_positives_kernel(int* num_positive, int images) {
  const int image = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (image < images) num_positive[image] = 0;
}

// 128-bit accesses: 1 load, 0 stores
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 8 : 4)
    assign_points_kernel(const __grid_constant__ PointBatch<T> batch, int* __restrict__ matches,
                         int* __restrict__ labels, int* __restrict__ num_positive) {
  __shared__ PointTarget<T> tile[kThreads];
  __shared__ unsigned marked[kThreads / kWarp];  // a bit for each ground truth of the tile
  const int64_t image = blockIdx.y;
  const int64_t anchor = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool active = anchor < batch.num_anchors;
  // Compute the point. No ground truth may take one with a reach of -1.
  Point<T> point{0, 0, -1, 0, 0};
  if (active) point = point_of(batch.anchors(image, anchor), anchor, batch.rules);
  const PointBounds<T> bounds = bounds_of_block(point, active);
  const int num_gt = int(clamp_count(batch.gt_count[image], batch.max_gt));
  int match = kBackground;
  T priority = 0;
  for (int first = 0; first < num_gt; first += kThreads) {
    // Load the tile, and mark its ground truths that may take a point of the block. Other threads
    // may still be reading the previous tile.
    if (first > 0) __syncthreads();
    const int mine = first + int(threadIdx.x);
    bool may_hold = false;
    if (mine < num_gt) {
      const PointTarget<T> target(batch.gt_boxes[image * batch.max_gt + mine]);
      may_hold = target.takes_points() && bounds.may_hold(target);
      tile[threadIdx.x] = target;
    }
    const unsigned bits = __ballot_sync(kFullMask, may_hold);
    if (threadIdx.x % kWarp == 0) marked[threadIdx.x / kWarp] = bits;
    __syncthreads();
    // Visit the marked ones in order. At equal priority the first one keeps the point.
    for (int word = 0; word < kThreads / kWarp; ++word)
      for (unsigned left = marked[word]; left != 0; left &= left - 1) {  // drops the lowest bit
        const int i = word * kWarp + __ffs(int(left)) - 1;
        const PointTarget<T>& target = tile[i];
        if (target.may_take(point) && target.priority > priority) {
          match = first + i;
          priority = target.priority;
        }
      }
  }
  // Write the match and its label, and count the positives.
  if (active) {
    const int64_t i = image * batch.num_anchors + anchor;
    matches[i] = match;
    labels[i] = match >= 0 ? int(batch.gt_labels[image * batch.max_gt + match]) : kBackground;
  }
  const int positive = __popc(__ballot_sync(kFullMask, match >= 0));
  if (threadIdx.x % kWarp == 0 && positive > 0) atomicAdd(&num_positive[image], positive);
}

PointResults assign_points_cuda(const Tensor& anchors, std::vector<int64_t> grid_sizes,
                                std::vector<double> grid_steps, std::vector<int64_t> level_sizes,
                                const Tensor& gt_boxes, const Tensor& gt_labels,
                                const Tensor& gt_count, std::optional<double> radius, double low,
                                double high) {
  const CudaScope scope("assign_points", gt_boxes, anchors, gt_labels, gt_count);
  const PointArguments args(anchors, grid_sizes, grid_steps, level_sizes, gt_boxes, gt_labels,
                            gt_count);
  check_batch("assign_points", args.images);
  PointResults results = args.empty_results();
  auto& [matches, labels, num_positive] = results;
  if (args.images == 0) return results;
  const int64_t count = args.anchors.count;
  launch("clear_positives_kernel", clear_positives_kernel,
         unsigned(ceil_div(args.images, kThreads)), kThreads, 0, scope, data<int>(num_positive),
         int(args.images));
  if (count == 0) return results;
  dispatch_compute(gt_boxes.scalar_type(), "assign_points", [&](auto zero) {
    using T = decltype(zero);
    const PointBatch<T> batch{args.anchors.view<T>("assign_points"), count,
                              data<Box<T>>(args.gt_boxes),           data<int64_t>(args.gt_labels),
                              data<int64_t>(args.gt_count),          int(args.max_gt),
                              args.rules<T>(radius, low, high)};
    launch("assign_points_kernel", assign_points_kernel<T>,
           dim3(unsigned(ceil_div(count, kThreads)), unsigned(args.images)), kThreads, 0, scope,
           batch, data<int>(matches), data<int>(labels), data<int>(num_positive));
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("assign_points", TORCH_BOX(&assign_points_cuda));
}

}  // namespace retinanet
