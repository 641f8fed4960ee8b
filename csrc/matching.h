// Matching of anchors to ground truths by IoU: the rules and the input check of both backends.
//
// The best ground truth of an anchor is the one with the highest IoU, at a tie the one with the
// lowest index. The anchor is matched to it if the IoU reaches the foreground threshold. The anchor
// is background if the IoU is below the background threshold, and ignored in between.
//
// A low-quality rule then promotes every anchor whose IoU with a ground truth equals that ground
// truth's best over all anchors. A separate pass finds the best IoUs. Every pass computes the same
// bits for a pair (boxes.h), so the comparison is exact.
//
// SSD's rule is another one. Anchors are first matched by the thresholds alone. Then each ground
// truth, in index order, takes its best anchor, whatever that anchor was matched to: the one with
// the highest IoU, at a tie the one with the lowest index. If several ground truths have the same
// best anchor, the last one has it.
#pragma once

#include "common/anchors.h"

namespace retinanet {

// What a promoted anchor is matched to.
enum class LowQuality {
  kOff,          // no anchor is promoted
  kTorchvision,  // the best ground truth of the anchor itself
  kMmdet         // the promoting ground truth, the last one if there are several
};

// The thresholds of a call, in the compute dtype T.
template <typename T>
struct MatchRules {
  T fg_iou, bg_iou, min_iou, crowd_ioa;  // min_iou belongs to the low-quality rule
  LowQuality low_quality;

  // The IoU at which a ground truth promotes anchors: its best over all anchors, if that is above
  // min_iou. It is -1 if the ground truth promotes none.
  HOST_DEVICE T promoting_iou(T best_of_gt) const {
    return low_quality != LowQuality::kOff && best_of_gt > min_iou ? best_of_gt : T(-1);
  }

  // The lowest IoU with the ground truth that can still change an anchor's result. Pairs below it
  // may be skipped.
  HOST_DEVICE T relevant_iou(T promoting_iou) const {
    return T(0) <= promoting_iou ? min_of(promoting_iou, bg_iou) : bg_iou;
  }

  // True if an IoU of 0 can change an anchor's result.
  HOST_DEVICE bool zero_is_relevant() const {
    return !(bg_iou > T(0)) || (low_quality != LowQuality::kOff && min_iou < T(0));
  }
};

// The state of one anchor while it is compared with the ground truths in index order.
template <typename T>
struct AnchorMatch {
  T best_iou = -1;             // the highest IoU so far
  int best = kBackground;      // its ground truth, the first at a tie
  int promoted = kBackground;  // the last ground truth that promotes the anchor

  HOST_DEVICE void visit(int gt, T iou) {
    const bool better = iou > best_iou;
    best_iou = better ? iou : best_iou;
    best = better ? gt : best;
  }

  // Applies the low-quality rule. A promoting_iou of -1 promotes none, as no IoU is negative.
  HOST_DEVICE void promote(int gt, T iou, T promoting_iou) {
    promoted = iou == promoting_iou ? gt : promoted;
  }

  // The match by the thresholds alone.
  HOST_DEVICE int match_by_iou(const MatchRules<T>& rules) const {
    if (best_iou >= rules.fg_iou) return best;
    return best_iou < rules.bg_iou ? kBackground : kIgnored;
  }

  // The match by the thresholds and the low-quality rule.
  HOST_DEVICE int match(const MatchRules<T>& rules) const {
    if (promoted < 0) return match_by_iou(rules);
    return rules.low_quality == LowQuality::kTorchvision ? best : promoted;
  }

  // The IoU with the matched ground truth, the best IoU if ignored, or 0 for background. Crowd
  // boxes do not change it.
  HOST_DEVICE T matched_iou(const MatchRules<T>& rules, const T* best_of_gts) const {
    const int match = this->match(rules);
    if (match == kBackground) return T(0);
    return match == best || match == kIgnored ? best_iou : best_of_gts[match];
  }
};

// True if a crowd box covers at least `threshold` of the anchor's area.
template <typename T>
HOST_DEVICE bool in_crowd(const Box<T>& anchor, const Box<T>& crowd, T threshold) {
  const T inter = intersection(anchor, crowd);
  return is_valid(crowd) && inter > T(0) && div(inter, area(anchor)) >= threshold;
}

// A count clamped to 0 .. limit.
template <typename Count>
HOST_DEVICE int64_t clamp_count(Count count, int64_t limit) {
  return count < 0 ? 0 : int64_t(count) > limit ? limit : int64_t(count);
}

// The results of the op, in the order of its schema: matches and labels [N, A], num_positive [N],
// and for statistics ious [N, A], best_ious and gt_positives [N, M]. The labels are empty without
// gt_labels. The last three are empty without statistics.
using MatchResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The same results, as kernels write them.
template <typename T>
struct MatchOutputs {
  int* matches;
  int* labels;  // null without gt_labels
  int* num_positive;
  T* ious;  // null without statistics, as are the next two
  T* best_ious;
  int* gt_positives;
};

// The arguments of the op, checked once for both backends.
struct MatchArguments {
  AnchorArgument anchors;
  Tensor gt_boxes, gt_count;
  std::optional<Tensor> gt_labels, crowd_boxes, crowd_count;
  int64_t images, max_gt, max_crowd;
  LowQuality low_quality;
  bool takes_best;  // by SSD's rule, each ground truth takes its best anchor; low_quality is kOff

  MatchArguments(const Tensor& anchors, const std::vector<int64_t>& grid_sizes,
                 const std::vector<double>& grid_steps, const Tensor& gt_boxes,
                 const std::optional<Tensor>& gt_labels, const Tensor& gt_count,
                 const std::optional<Tensor>& crowd_boxes, const std::optional<Tensor>& crowd_count,
                 const std::string& low_quality, const char* op)
      : anchors(anchors, grid_sizes, grid_steps, op),
        gt_boxes(contiguous_aligned(gt_boxes)),
        gt_count(contiguous_aligned(gt_count)),
        gt_labels(contiguous_aligned(gt_labels)),
        crowd_boxes(contiguous_aligned(crowd_boxes)),
        crowd_count(contiguous_aligned(crowd_count)) {
    check(gt_boxes.dim() == 3, op, ": gt_boxes must have shape [N, M, 4], got ", shape(gt_boxes));
    images = gt_boxes.size(0);
    max_gt = gt_boxes.size(1);
    check(max_gt < (int64_t(1) << 30), op, ": expected fewer than 2^30 ground truths, got ",
          max_gt);
    check_shape(gt_boxes, {images, max_gt, 4}, op, "gt_boxes");
    check_shape(gt_count, {images}, op, "gt_count");
    check_dtype(gt_count, ScalarType::Long, op, "gt_count");
    if (gt_labels) {
      check_shape(*gt_labels, {images, max_gt}, op, "gt_labels");
      check_dtype(*gt_labels, ScalarType::Long, op, "gt_labels");
    }
    if (this->anchors.batched)
      check_shape(anchors, {images, this->anchors.count, 4}, op, "anchors");
    check(crowd_boxes.has_value() == crowd_count.has_value(), op,
          ": crowd_boxes and crowd_count must be given together");
    max_crowd = crowd_boxes ? crowd_boxes->size(1) : 0;
    if (crowd_boxes) {
      check_shape(*crowd_boxes, {images, max_crowd, 4}, op, "crowd_boxes");
      check_shape(*crowd_count, {images}, op, "crowd_count");
      check_dtype(*crowd_boxes, gt_boxes.scalar_type(), op, "crowd_boxes");
      check_dtype(*crowd_count, ScalarType::Long, op, "crowd_count");
    }
    check(low_quality == "torchvision" || low_quality == "mmdet" || low_quality == "ssd" ||
              low_quality == "off",
          op, ": low_quality must be torchvision, mmdet, ssd or off, got ", low_quality);
    this->low_quality = low_quality == "torchvision" ? LowQuality::kTorchvision
                        : low_quality == "mmdet"     ? LowQuality::kMmdet
                                                     : LowQuality::kOff;
    takes_best = low_quality == "ssd";
  }

  // Uninitialised results. A result that is not asked for has no columns.
  MatchResults empty_results(bool statistics) const {
    const auto empty = [&](bool asked_for, int64_t columns, ScalarType dtype) {
      return empty_tensor(gt_boxes, {images, asked_for ? columns : 0}, dtype);
    };
    const ScalarType floating = gt_boxes.scalar_type(), integer = ScalarType::Int;
    return {empty(true, anchors.count, integer),
            empty(gt_labels.has_value(), anchors.count, integer),
            empty_tensor(gt_boxes, {images}, integer),
            empty(statistics, anchors.count, floating),
            empty(statistics, max_gt, floating),
            empty(statistics, max_gt, integer)};
  }

  // Pointers to `results`, which empty_results returned.
  template <typename T>
  MatchOutputs<T> outputs(MatchResults& results, bool statistics) const {
    auto& [matches, labels, num_positive, ious, best_ious, gt_positives] = results;
    return {data<int>(matches),
            gt_labels ? data<int>(labels) : nullptr,
            data<int>(num_positive),
            statistics ? data<T>(ious) : nullptr,
            statistics ? data<T>(best_ious) : nullptr,
            statistics ? data<int>(gt_positives) : nullptr};
  }
};

}  // namespace retinanet
