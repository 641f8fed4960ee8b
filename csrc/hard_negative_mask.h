// Hard negative mining of SSD (Liu et al. 2016): how many negatives an image keeps and how they
// rank, for both backends.
//
// The background anchors of an image rank by (float32 loss descending, index ascending). A NaN loss
// ranks first, so that the mask keeps it and the total loss shows it.
#pragma once

#include <cmath>

#include "common/checks.h"
#include "common/ranking_key.h"

namespace retinanet {

// The number of negatives that an image keeps: ceil(ratio * positives), but at least
// `min_negatives`, and at most all of them.
HOST_DEVICE int64_t num_hard_negatives(int64_t positives, int64_t negatives, double ratio,
                                       int64_t min_negatives) {
  const double wanted = std::ceil(ratio * double(positives));
  const int64_t enough = wanted < double(negatives) ? int64_t(wanted) : negatives;
  const int64_t least = min_negatives < negatives ? min_negatives : negatives;
  return enough < least ? least : enough;
}

HOST_DEVICE int64_t hard_negative_key(float loss, uint32_t anchor) {
  return ranking_key(loss != loss ? bits_float(0x7fffffff) : loss, anchor);
}

// The op's arguments, checked once for both backends.
struct HardNegativeArguments {
  Tensor loss, labels;
  int64_t images, anchors;

  HardNegativeArguments(const Tensor& loss, const Tensor& labels, double ratio,
                        int64_t min_negatives)
      : loss(contiguous_aligned(loss)), labels(contiguous_aligned(labels)) {
    check(loss.dim() == 2, "hard_negative_mask: loss must have shape [N, A], got ", shape(loss));
    images = loss.size(0);
    anchors = loss.size(1);
    check_dtype(loss, ScalarType::Float, "hard_negative_mask", "loss");
    check_shape(labels, {images, anchors}, "hard_negative_mask", "labels");
    check_dtype(labels, ScalarType::Int, "hard_negative_mask", "labels");
    check(anchors <= (int64_t(1) << 30), "hard_negative_mask: expected at most 2^30 anchors, got ",
          anchors);
    check(ratio >= 0 && std::isfinite(ratio),
          "hard_negative_mask: ratio must be finite and not negative, got ", ratio);
    check(min_negatives >= 0, "hard_negative_mask: min_negatives must not be negative, got ",
          min_negatives);
  }
};

}  // namespace retinanet
