// The scores of all classes of selected anchors on CUDA.
//
// Work: one thread per score. Neighbouring threads take the classes of one anchor, which are
// adjacent in memory if the logits are channels_last.
//
//   scores   | slot 0: class 0 .. K-1 | slot 1: class 0 .. K-1 | ...     of image 0, 1, ...
//   thread     0 .. K-1                 K .. 2K-1                ...     a tile is 256 scores
//
// Bytes moved: each selected logit is read once and each score is written once. The index of an
// anchor stays in the cache. Deterministic: every score is computed by one thread.
#include "common/cuda.h"
#include "gather_class_scores.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_class_scores_kernel(ClassScores<T> score, const int64_t* __restrict__ anchors,
                               int64_t slots, int64_t count, float* __restrict__ scores) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / score.num_classes;  // (image, slot)
  scores[i] = score(row / slots, anchors[row], i - row * score.num_classes);
}

Tensor gather_class_scores_cuda(std::vector<Tensor> cls_logits, const Tensor& anchor_index,
                                int64_t num_classes) {
  const CudaScope scope("gather_class_scores", anchor_index, cls_logits);
  const HeadTensors heads(cls_logits, "gather_class_scores", "cls_logits");
  check_class_scores(heads, anchor_index, num_classes);
  const Tensor anchors = contiguous_aligned(anchor_index);
  const int64_t slots = anchors.size(1), count = heads.images * slots * num_classes;
  Tensor scores = torch::stable::new_empty(cls_logits[0], {heads.images, slots, num_classes},
                                           ScalarType::Float);
  if (count == 0) return scores;
  dispatch_floating(heads.dtype(), "gather_class_scores", [&](auto zero) {
    using T = decltype(zero);
    const ClassScores<T> score{heads.view<T>(), num_classes, heads.elements / num_classes};
    launch("gather_class_scores_kernel", gather_class_scores_kernel<T>,
           unsigned(ceil_div(count, kThreads)), kThreads, 0, scope, score, data<int64_t>(anchors),
           slots, count, data<float>(scores));
  });
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("gather_class_scores", TORCH_BOX(&gather_class_scores_cuda));
}

}  // namespace retinanet
