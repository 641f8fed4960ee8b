// Greedy non-maximum suppression (NMS): the rule and the op's arguments, for both backends.
//
// Candidates are visited in a given order. A candidate is kept unless its IoU with a kept box of
// its class is above the threshold, or a cap is reached. Candidates are compared with kept boxes
// only, so memory is O(kept) and a candidates x candidates matrix of IoUs never exists.
#pragma once

#include "common/boxes.h"
#include "common/checks.h"

namespace retinanet {

template <typename T>
struct NmsRules {
  T iou_threshold;
  int64_t max_detections;
  int64_t max_per_class;  // 0 means no cap
  bool class_agnostic;    // boxes of different classes suppress each other

  HOST_DEVICE bool suppresses(const Box<T>& kept, T kept_area, const Box<T>& box,
                              T box_area) const {
    return iou(kept, kept_area, box, box_area) > iou_threshold;
  }
};

// The op's arguments, checked once for both backends.
struct NmsArguments {
  Tensor boxes, count;
  std::optional<Tensor> order, labels;
  int64_t images, candidates, max_detections;

  NmsArguments(const Tensor& boxes, const std::optional<Tensor>& order, const Tensor& count,
               const std::optional<Tensor>& labels, int64_t max_detections)
      : boxes(contiguous_aligned(boxes)),
        count(contiguous_aligned(count)),
        order(contiguous_aligned(order)),
        labels(contiguous_aligned(labels)),
        max_detections(max_detections) {
    check(boxes.dim() == 3, "nms_sorted: boxes must have shape [N, C, 4], got ", shape(boxes));
    images = boxes.size(0);
    candidates = boxes.size(1);
    check_shape(boxes, {images, candidates, 4}, "nms_sorted", "boxes");
    check_shape(count, {images}, "nms_sorted", "count");
    check_dtype(count, ScalarType::Long, "nms_sorted", "count");
    for (const auto& [t, name] : {std::pair(&order, "order"), std::pair(&labels, "labels")}) {
      if (!*t) continue;
      check_shape(**t, {images, candidates}, "nms_sorted", name);
      check_dtype(**t, ScalarType::Long, "nms_sorted", name);
    }
    check(max_detections >= 0, "nms_sorted: max_detections must not be negative, got ",
          max_detections);
  }
};

}  // namespace retinanet
