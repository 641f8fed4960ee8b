// SSD's rule on CUDA: each ground truth takes its best anchor, after all anchors have been matched
// by the thresholds. blockIdx.y is the image.
//
//   best_anchors_kernel  A block per ground truth finds its best anchor: the one with the highest
//                        IoU, and with the lowest index at a tie. Its threads divide the anchors.
//   take_anchors_kernel  A thread per ground truth matches the best anchor to it. If several ground
//                        truths have the same best anchor, the last one takes it.
//
// Bytes moved: every block reads all anchors, 16 bytes each (0 with a grid, whose boxes are
// computed), from the second-level cache once the first block has read them.
//
// Deterministic: the only atomics are on integers. No two threads write to the same anchor.
#pragma once

#include "matching_cuda_bounds.h"

namespace retinanet {

constexpr int kBestThreads = 256;

// The best anchor of a ground truth among those that a thread, a warp or a block has seen.
template <typename T>
struct BestAnchor {
  T iou = -1;  // no anchor seen
  int64_t index = std::numeric_limits<int64_t>::max();

  // Anchors must be visited in ascending order.
  __device__ __forceinline__ void visit(int64_t anchor, T iou_with_it) {
    if (iou_with_it > iou) *this = {iou_with_it, anchor};
  }

  // The best of all lanes of a warp, in each of them. All lanes must call it.
  __device__ __forceinline__ BestAnchor of_warp() const {
    const T most = warp_max(iou);
    return {most, -warp_max(iou == most ? -index : -std::numeric_limits<int64_t>::max())};
  }
};

// Writes the best IoU of each ground truth to batch.best [N, M], 0 for one that is not valid, and
// its best anchor to best_anchor [N, M], or -1 if it takes none.
// 128-bit accesses: 1 load, 0 stores
template <typename T>
__global__ void __launch_bounds__(kBestThreads)
    best_anchors_kernel(const __grid_constant__ MatchBatch<T> batch,
                        int64_t* __restrict__ best_anchor) {
  constexpr int kWarps = kBestThreads / kWarp;
  __shared__ BestAnchor<T> warps[kWarps];
  const int64_t image = blockIdx.y, i = image * batch.max_gt + blockIdx.x;
  const Box<T> gt = batch.gt_boxes[i];
  if (int(blockIdx.x) >= batch.num_gt(image) || !is_valid(gt)) {  // the whole block
    if (threadIdx.x == 0) {
      batch.best[i] = 0;
      best_anchor[i] = -1;
    }
    return;
  }
  const T gt_area = area(gt);
  BestAnchor<T> best;
  for (int64_t a = threadIdx.x; a < batch.num_anchors; a += kBestThreads) {
    const Box<T> anchor = batch.anchors(image, a);
    best.visit(a, iou_if_overlapping(gt, gt_area, anchor, area(anchor)));
  }
  best = best.of_warp();
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;  // whole warps; the first one reduces over all
  best = BestAnchor<T>{};
  if (threadIdx.x < kWarps) best = warps[threadIdx.x];
  best = best.of_warp();
  if (threadIdx.x == 0) {
    batch.best[i] = best.iou;
    best_anchor[i] = best.iou > batch.rules.min_iou ? best.index : -1;
  }
}

// Matches best anchors to their ground truths, in the results of assign_kernel.
template <typename T>
__global__ void __launch_bounds__(kBestThreads)
    take_anchors_kernel(const __grid_constant__ MatchBatch<T> batch,
                        const int64_t* __restrict__ best_anchor, MatchOutputs<T> out) {
  const int64_t image = blockIdx.y, row = image * batch.max_gt;
  const int64_t gt = int64_t(blockIdx.x) * kBestThreads + threadIdx.x;
  const int num_gt = batch.num_gt(image);
  const int64_t anchor = gt < num_gt ? best_anchor[row + gt] : -1;
  bool takes = anchor >= 0;
  for (int64_t later = gt + 1; takes && later < num_gt; ++later)
    takes = best_anchor[row + later] != anchor;
  bool gained = false;
  if (takes) {
    const int64_t i = image * batch.num_anchors + anchor;
    const int before = out.matches[i];
    gained = before < 0;
    out.matches[i] = int(gt);
    if (out.labels) out.labels[i] = int(batch.gt_labels[row + gt]);
    if (out.ious) {
      out.ious[i] = batch.best[row + gt];
      if (!gained) atomicAdd(&out.gt_positives[row + before], -1);
      atomicAdd(&out.gt_positives[row + gt], 1);
    }
  }
  const int positive = __popc(__ballot_sync(kFullMask, gained));
  if (threadIdx.x % kWarp == 0 && positive > 0) atomicAdd(&out.num_positive[image], positive);
}

// Launches both kernels. batch.best must be given.
template <typename T>
void take_best_anchors(const MatchBatch<T>& batch, const MatchOutputs<T>& out, int64_t images,
                       const Tensor& like, const CudaScope& scope) {
  const int64_t shape[] = {images, batch.max_gt};
  Tensor best_anchor = torch::stable::new_empty(like, shape, ScalarType::Long);
  launch("best_anchors_kernel", best_anchors_kernel<T>,
         dim3(unsigned(batch.max_gt), unsigned(images)), kBestThreads, 0, scope, batch,
         data<int64_t>(best_anchor));
  launch("take_anchors_kernel", take_anchors_kernel<T>,
         dim3(unsigned(ceil_div(batch.max_gt, kBestThreads)), unsigned(images)), kBestThreads, 0,
         scope, batch, data<int64_t>(best_anchor), out);
}

}  // namespace retinanet
