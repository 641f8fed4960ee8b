// What both backends of the focal loss on the heads' own tensors share.
#pragma once

#include "common/heads.h"
#include "focal_loss.h"

namespace retinanet {

constexpr int64_t kMaxClasses = 1 << 23;

// The targets of an anchor's own class and of the others.
struct Smoothing {
  double positive, negative;

  explicit Smoothing(double smoothing) : positive(1 - smoothing / 2), negative(smoothing / 2) {}

  bool none() const { return positive == 1; }
};

// Checked arguments of the forward and the backward op.
struct DenseFocalArguments {
  HeadTensors heads;
  Tensor labels;                 // [N, A] int32
  std::optional<Tensor> weight;  // [N, A] in the compute dtype
  int64_t num_classes, anchors;
  Smoothing smoothing;

  DenseFocalArguments(const std::vector<Tensor>& cls_logits, const Tensor& labels_,
                      const std::optional<Tensor>& weight_, int64_t num_classes_,
                      double label_smoothing, const char* op)
      : heads(cls_logits, op, "cls_logits"),
        labels(contiguous_aligned(labels_)),
        weight(contiguous_aligned(weight_)),
        num_classes(num_classes_),
        anchors(num_classes > 0 ? heads.elements / num_classes : 0),
        smoothing(label_smoothing) {
    // The bound keeps the elements of a CUDA block's anchors below 2^31.
    check(num_classes > 0 && num_classes <= kMaxClasses, op, ": expected 1 to ", kMaxClasses,
          " classes, got ", num_classes);
    for (const Tensor& t : heads.tensors)
      check(t.size(1) % num_classes == 0, op, ": cls_logits ", shape(t), " do not fit ",
            num_classes, " classes");
    check_shape(labels, {heads.images, anchors}, op, "labels");
    check_dtype(labels, ScalarType::Int, op, "labels");
    if (!weight) return;
    check_shape(*weight, {heads.images, anchors}, op, "weight");
    check_dtype(*weight, heads.compute_dtype(), op, "weight");
  }

  // Labels and weights of the anchors of one image from row `first` on.
  template <typename C>
  ClassTargets<C, int32_t> targets(int64_t image, int64_t first) const {
    const int64_t row = image * anchors + first;
    return {data<int32_t>(labels) + row, num_classes,
            weight ? data<C>(*weight) + row : static_cast<const C*>(nullptr)};
  }
};

}  // namespace retinanet
