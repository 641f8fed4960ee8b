// Focal loss read from the heads' own tensors: arguments and checks, for both backends. The formula
// of one logit is in focal_loss.h.
#pragma once

#include "common/heads.h"
#include "focal_loss.h"

namespace retinanet {

// The most classes for which a logit's index in a CUDA tile of 256 anchors stays below 2^31.
constexpr int64_t kMaxClasses = 1 << 23;

// The targets of an anchor's positive class and of its other classes, after label smoothing.
template <typename C>
struct Smoothing {
  C positive, negative;

  static Smoothing make(double label_smoothing) {
    return {C(1 - label_smoothing / 2), C(label_smoothing / 2)};
  }
};

// The checked arguments of the forward and the backward op.
struct DenseFocalArguments {
  HeadTensors heads;
  Tensor labels;                        // [N, A] int32
  std::optional<Tensor> anchor_weight;  // [N, A] in the compute dtype
  int64_t num_classes, anchors;         // `anchors` counts those of one image
  double label_smoothing;

  DenseFocalArguments(const std::vector<Tensor>& cls_logits, const Tensor& labels_,
                      const std::optional<Tensor>& anchor_weight_, int64_t num_classes_,
                      double label_smoothing_, const char* op)
      : heads(cls_logits, op, "cls_logits"),
        labels(contiguous_aligned(labels_)),
        anchor_weight(contiguous_aligned(anchor_weight_)),
        num_classes(num_classes_),
        anchors(num_classes > 0 ? heads.elements / num_classes : 0),
        label_smoothing(label_smoothing_) {
    check(num_classes > 0 && num_classes <= kMaxClasses, op, ": expected 1 to ", kMaxClasses,
          " classes, got ", num_classes);
    for (const Tensor& t : heads.tensors)
      check(t.size(1) % num_classes == 0, op, ": cls_logits ", shape(t), " do not fit ",
            num_classes, " classes");
    check_shape(labels, {heads.images, anchors}, op, "labels");
    check_dtype(labels, ScalarType::Int, op, "labels");
    if (!anchor_weight) return;
    check_shape(*anchor_weight, {heads.images, anchors}, op, "anchor_weight");
    check_dtype(*anchor_weight, heads.compute_dtype(), op, "anchor_weight");
  }

  // Whether the targets are soft. A label_smoothing that leaves a target of 1 unchanged in double
  // counts as none.
  bool soft() const { return 1 - label_smoothing / 2 != 1; }

  // Labels and weights of one image's anchors, from anchor `first` on.
  template <typename C>
  ClassTargets<C, int32_t> targets(int64_t image, int64_t first) const {
    const int64_t row = image * anchors + first;
    return {data<int32_t>(labels) + row, num_classes,
            anchor_weight ? data<C>(*anchor_weight) + row : static_cast<const C*>(nullptr)};
  }
};

}  // namespace retinanet
