// Soft-NMS (Bodla et al. 2017): the rule and the arguments of both ops, for both backends.
//
// Each step of soft_nms takes the candidate with the highest score, and multiplies the scores of
// the others of its class by a factor that falls as their IoU with it rises. Factors are at most 1,
// so a candidate whose score is not above `min_score` is never taken later.
//
// soft_nms_scores takes no candidates. It multiplies the score of each by the factors of all that
// rank before it, in the order of their indices.
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

// Whether a candidate ranks before another one: by score, with ties to the lower index. Scores of
// NaN and -inf rank nowhere.
template <typename T>
HOST_DEVICE bool ranks_before(T score, T other_score, bool has_lower_index) {
  const bool earlier = has_lower_index ? score >= other_score : score > other_score;
  return earlier & (other_score > -std::numeric_limits<T>::infinity());
}

// Calls f(std::bool_constant<kGaussian>, rules) for the method of this name.
template <typename T, typename F>
inline void dispatch_soft_nms(const char* op, const std::string& method, double iou_threshold,
                              double sigma, double min_score, int64_t max_detections, F&& f) {
  const SoftNmsRules<T> rules{T(iou_threshold), T(sigma), T(min_score), max_detections};
  check(rules.sigma > T(0), op, ": sigma must be positive, got ", rules.sigma);
  if (method == "gaussian") return f(std::true_type{}, rules);
  check(method == "linear", op, ": method must be 'linear' or 'gaussian', got '", method, "'");
  f(std::false_type{}, rules);
}

// The arguments of an op, checked once for both backends.
struct SoftNmsArguments {
  Tensor boxes, scores;
  std::optional<Tensor> labels, counts;
  int64_t images, candidates, max_detections;

  SoftNmsArguments(const char* op, const Tensor& boxes, const Tensor& scores,
                   const std::optional<Tensor>& labels, const std::optional<Tensor>& counts,
                   double min_score, int64_t max_detections)
      : boxes(contiguous_aligned(boxes)),
        scores(contiguous_aligned(scores)),
        labels(contiguous_aligned(labels)),
        counts(contiguous_aligned(counts)),
        max_detections(max_detections) {
    check(boxes.dim() == 3, op, ": boxes must have shape [N, C, 4], got ", shape(boxes));
    images = boxes.size(0);
    candidates = boxes.size(1);
    check_shape(boxes, {images, candidates, 4}, op, "boxes");
    check_shape(scores, {images, candidates}, op, "scores");
    check_dtype(scores, boxes.scalar_type(), op, "scores");
    if (labels) {
      check_shape(*labels, {images, candidates}, op, "labels");
      check_dtype(*labels, ScalarType::Long, op, "labels");
    }
    if (counts) {
      check_shape(*counts, {images}, op, "counts");
      check_dtype(*counts, ScalarType::Long, op, "counts");
    }
    check(candidates <= (int64_t(1) << 30), op, ": expected at most 2^30 candidates, got ",
          candidates);
    check(min_score >= 0, op, ": min_score must not be negative, got ", min_score);
    check(max_detections >= 0, op, ": max_detections must not be negative, got ", max_detections);
  }
};

}  // namespace retinanet
