// Hard negative mining on CUDA.
//
// Work: one block per image, whose threads stride over the image's anchors. The block counts
// positives and negatives, finds the key of the last hard negative by a radix search, and marks the
// anchors whose keys are at least as large:
//
//     pass 1        labels            -> positives, negatives -> number of hard negatives, k
//     pass 2 .. 9   labels and losses -> the k-th largest key, one byte per pass
//     pass 10       labels and losses -> mask
//
// Bytes moved: ten reads of an image's labels, nine reads of the losses of its background anchors,
// and one write of its mask. All reads but the first come from the cache.
// Deterministic: keys are unique, so exactly k anchors reach the k-th largest key.
#include "common/cuda.h"
#include "common/kth_largest.h"
#include "hard_negative_mask.h"

namespace retinanet {
namespace {

constexpr int kThreads = RadixSearch::kThreads;

__global__ void __launch_bounds__(kThreads)
    hard_negative_kernel(const float* __restrict__ losses, const int32_t* __restrict__ labels,
                         int anchors, double ratio, int64_t min_negatives,
                         bool* __restrict__ mask) {
  __shared__ RadixSearch search;
  __shared__ int64_t wanted;
  const int64_t image = blockIdx.x;
  losses += image * anchors;
  labels += image * anchors;
  mask += image * anchors;

  // Count the image's positives and negatives.
  int positives = 0, negatives = 0;
  for (int a = threadIdx.x; a < anchors; a += kThreads) {
    const int32_t label = labels[a];
    positives += label >= 0;
    negatives += label == kBackground;
  }
  positives = block_sum<kThreads>(positives);
  negatives = block_sum<kThreads>(negatives);
  if (threadIdx.x == 0) wanted = num_hard_negatives(positives, negatives, ratio, min_negatives);
  __syncthreads();

  // Find the key of the last hard negative.
  const bool any = wanted > 0;
  int64_t last = 0;
  if (any)
    last = kth_largest(search, unsigned(wanted), [&](auto&& visit) {
      for (int a = threadIdx.x; a < anchors; a += kThreads)
        if (labels[a] == kBackground) visit(hard_negative_key(losses[a], unsigned(a)));
    });
  // Mark the negatives that rank at least as high.
  for (int a = threadIdx.x; a < anchors; a += kThreads)
    mask[a] = any && labels[a] == kBackground && hard_negative_key(losses[a], unsigned(a)) >= last;
}

Tensor hard_negative_mask_cuda(const Tensor& loss, const Tensor& labels, double ratio,
                               int64_t min_negatives) {
  const CudaScope scope("hard_negative_mask", loss, labels);
  const HardNegativeArguments args(loss, labels, ratio, min_negatives);
  Tensor mask = torch::stable::new_empty(loss, {args.images, args.anchors}, ScalarType::Bool);
  if (args.images == 0) return mask;
  launch("hard_negative_kernel", hard_negative_kernel, unsigned(args.images), kThreads, 0, scope,
         data<float>(args.loss), data<int32_t>(args.labels), int(args.anchors), ratio,
         min_negatives, data<bool>(mask));
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("hard_negative_mask", TORCH_BOX(&hard_negative_mask_cuda));
}

}  // namespace retinanet
