// Soft-NMS (Bodla et al. 2017): the rule and the op's arguments, for both backends.
//
// Each step takes the candidate with the highest score, and multiplies the scores of the others of
// its class by a factor that falls as their IoU with it rises. Factors are at most 1, so a
// candidate whose score is not above `min_score` is never taken later.
//
// The factors have the same bits on every backend, so the same candidates are taken in the same
// order. The exception is the exponential in float64, which comes from the standard library.
#pragma once

#include "common/boxes.h"
#include "common/checks.h"
#include "common/elementary.h"

namespace retinanet {

template <typename T>
struct SoftNmsRules {
  T iou_threshold, sigma, min_score;
  int64_t max_detections;

  template <bool kGaussian>
  VECTORISED T factor(T iou_with_taken) const {
    // Use fused multiply-adds on every instruction set, because the GPU uses them.
    if constexpr (kGaussian)
      return exp_minus<Arithmetic<true>>(div(mul(iou_with_taken, iou_with_taken), sigma));
    else
      return iou_with_taken > iou_threshold ? T(1) - iou_with_taken : T(1);
  }
};

// Calls f(std::bool_constant<kGaussian>) for the method of this name.
template <typename F>
inline void dispatch_soft_nms(const std::string& method, F&& f) {
  if (method == "gaussian") return f(std::true_type{});
  check(method == "linear", "soft_nms: method must be 'linear' or 'gaussian', got '", method, "'");
  f(std::false_type{});
}

// The op's arguments, checked once for both backends.
struct SoftNmsArguments {
  Tensor boxes, scores;
  std::optional<Tensor> labels, counts;
  int64_t images, candidates, max_detections;

  SoftNmsArguments(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& labels,
                   const std::optional<Tensor>& counts, double min_score, int64_t max_detections)
      : boxes(contiguous_aligned(boxes)),
        scores(contiguous_aligned(scores)),
        labels(contiguous_aligned(labels)),
        counts(contiguous_aligned(counts)),
        max_detections(max_detections) {
    check(boxes.dim() == 3, "soft_nms: boxes must have shape [N, C, 4], got ", shape(boxes));
    images = boxes.size(0);
    candidates = boxes.size(1);
    check_shape(boxes, {images, candidates, 4}, "soft_nms", "boxes");
    check_shape(scores, {images, candidates}, "soft_nms", "scores");
    check_dtype(scores, boxes.scalar_type(), "soft_nms", "scores");
    if (labels) {
      check_shape(*labels, {images, candidates}, "soft_nms", "labels");
      check_dtype(*labels, ScalarType::Long, "soft_nms", "labels");
    }
    if (counts) {
      check_shape(*counts, {images}, "soft_nms", "counts");
      check_dtype(*counts, ScalarType::Long, "soft_nms", "counts");
    }
    check(candidates <= (int64_t(1) << 30), "soft_nms: expected at most 2^30 candidates, got ",
          candidates);
    check(min_score >= 0, "soft_nms: min_score must not be negative, got ", min_score);
    check(max_detections >= 0, "soft_nms: max_detections must not be negative, got ",
          max_detections);
  }
};

}  // namespace retinanet
