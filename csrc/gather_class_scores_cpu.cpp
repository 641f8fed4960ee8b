// The scores of all classes of selected anchors on the CPU: a loop over all slots and classes, on
// one thread, because detections are few.
#include "gather_class_scores.h"

namespace retinanet {
namespace {

Tensor gather_class_scores_cpu(std::vector<Tensor> cls_logits, const Tensor& anchor_index,
                               int64_t num_classes) {
  const HeadTensors heads(cls_logits, "gather_class_scores", "cls_logits");
  check_class_scores(heads, anchor_index, num_classes);
  const Tensor anchors = contiguous_aligned(anchor_index);
  const int64_t images = heads.images, slots = anchors.size(1);
  Tensor scores = empty_tensor(cls_logits[0], {images, slots, num_classes}, ScalarType::Float);
  dispatch_floating(heads.dtype(), "gather_class_scores", [&](auto zero) {
    using T = decltype(zero);
    const ClassScores<T> score{heads.view<T>(), num_classes, heads.elements / num_classes};
    float* out = data<float>(scores);
    for (int64_t i = 0; i < images * slots; ++i)
      for (int64_t k = 0; k < num_classes; ++k)
        *out++ = score(i / slots, data<int64_t>(anchors)[i], k);
  });
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("gather_class_scores", TORCH_BOX(&gather_class_scores_cpu));
}

}  // namespace retinanet
