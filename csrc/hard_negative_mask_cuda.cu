// Hard negatives on CUDA.
//
// Work: one block per image counts its anchors, finds the key of the last hard negative by a radix
// search, and marks all that rank as high.  Bytes moved: ten reads of an image's labels and nine of
// its background's losses, all but the first from the cache, and one write of its mask.
// Deterministic: keys are unique.
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

  const bool any = wanted > 0;
  int64_t last = 0;
  if (any)
    last = kth_largest(search, unsigned(wanted), [&](auto&& visit) {
      for (int a = threadIdx.x; a < anchors; a += kThreads)
        if (labels[a] == kBackground) visit(hard_negative_key(losses[a], unsigned(a)));
    });
  for (int a = threadIdx.x; a < anchors; a += kThreads)
    mask[a] = any && labels[a] == kBackground && hard_negative_key(losses[a], unsigned(a)) >= last;
}

Tensor hard_negative_mask_cuda(const Tensor& loss, const Tensor& labels, double ratio,
                               int64_t min_negatives) {
  const CudaScope scope(loss);
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
