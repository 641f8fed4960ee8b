// Greedy non-maximum suppression (NMS): the rule and the op's arguments, for both backends.
//
// Candidates are visited in a given order. A candidate is kept unless its IoU with a kept box of
// its class is above the threshold, or a cap is reached. Memory is O(candidates), because a
// candidates x candidates matrix of IoUs never exists.
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

// The arguments of rank_scores, checked once for both backends.
struct RankArguments {
  Tensor scores;
  std::optional<Tensor> counts;
  int64_t images, candidates;

  RankArguments(const Tensor& scores, const std::optional<Tensor>& counts)
      : scores(contiguous_aligned(scores)), counts(contiguous_aligned(counts)) {
    check(scores.dim() == 2, "rank_scores: scores must have shape [N, C], got ", shape(scores));
    images = scores.size(0);
    candidates = scores.size(1);
    check(candidates <= std::numeric_limits<uint32_t>::max(),
          "rank_scores: expected fewer than 2^32 candidates, got ", candidates);
    if (!counts) return;
    check_shape(*counts, {images}, "rank_scores", "counts");
    check_dtype(*counts, ScalarType::Long, "rank_scores", "counts");
  }
};

// The arguments of batched_nms_padded, checked once for both backends.
struct PaddedNmsArguments {
  static constexpr const char* kOp = "batched_nms_padded";

  Tensor boxes, scores;
  std::optional<Tensor> labels, counts;
  int64_t images, candidates;

  PaddedNmsArguments(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels,
                     const std::optional<Tensor>& counts, int64_t max_detections)
      : boxes(contiguous_aligned(boxes)),
        scores(contiguous_aligned(scores)),
        labels(contiguous_aligned(labels)),
        counts(contiguous_aligned(counts)) {
    check(scores.dim() == 2, kOp, ": scores must have shape [N, C], got ", shape(scores));
    images = scores.size(0);
    candidates = scores.size(1);
    check_shape(boxes, {images, candidates, 4}, kOp, "boxes");
    if (labels) {
      check_shape(*labels, {images, candidates}, kOp, "labels");
      check_dtype(*labels, ScalarType::Long, kOp, "labels");
    }
    if (counts) {
      check_shape(*counts, {images}, kOp, "counts");
      check_dtype(*counts, ScalarType::Long, kOp, "counts");
    }
    check(candidates <= std::numeric_limits<uint32_t>::max(), kOp,
          ": expected fewer than 2^32 candidates, got ", candidates);
    check(max_detections >= 0, kOp, ": max_detections must not be negative, got ", max_detections);
  }
};

}  // namespace retinanet
