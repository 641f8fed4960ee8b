// Losses of predicted boxes, given as the heads' deltas, against their ground truth.
//
// L1 and smooth L1 compare the deltas with the encoded ground truth (Girshick, "Fast R-CNN", 2015,
// eq. 3, with beta in place of the paper's 1). The other losses decode the deltas and are 1 minus
// the GIoU, DIoU or CIoU of the boxes (iou_kinds.h).
#pragma once

#include "box_coding.h"
#include "common/heads.h"
#include "common/iou_kinds.h"

namespace retinanet {

enum class BoxLossKind { kL1, kSmoothL1, kGiou, kDiou, kCiou };

// The IouKind of a loss that compares decoded boxes.
constexpr IouKind iou_kind_of(BoxLossKind kind) {
  return kind == BoxLossKind::kGiou   ? IouKind::kGiou
         : kind == BoxLossKind::kDiou ? IouKind::kDiou
                                      : IouKind::kCiou;
}

// The loss of one anchor, and its gradient.
template <typename T>
struct BoxLoss {
  BoxCoder<T> coder;
  T beta;  // smooth L1 is quadratic for differences below beta

  static BoxLoss make(const std::vector<double>& weights, double beta,
                      std::optional<double> max_log_ratio, double offset, const char* op) {
    check(beta >= 0, op, ": beta must be >= 0, got ", beta);
    return {box_coder<T>(weights, std::nullopt, max_log_ratio, offset, op), T(beta)};
  }

  // The loss of an anchor's deltas.
  template <BoxLossKind kKind>
  HOST_DEVICE T loss(const Box<T>& delta, const Box<T>& anchor, const Box<T>& gt) const {
    if constexpr (kKind == BoxLossKind::kL1 || kKind == BoxLossKind::kSmoothL1) {
      const Box<T> target = coder.encode(gt, anchor);
      return distance<kKind>(delta.x1 - target.x1) + distance<kKind>(delta.y1 - target.y1) +
             distance<kKind>(delta.x2 - target.x2) + distance<kKind>(delta.y2 - target.y2);
    } else {
      const Box<T> p = coder.decode(delta, anchor);
      return T(1) - iou_like<iou_kind_of(kKind)>(Coordinates<T>{p.x1, p.y1, p.x2, p.y2},
                                                 Coordinates<T>{gt.x1, gt.y1, gt.x2, gt.y2});
    }
  }

  // The gradient of that loss with respect to the deltas, times `scale`.
  template <BoxLossKind kKind>
  HOST_DEVICE Box<T> grad(const Box<T>& delta, const Box<T>& anchor, const Box<T>& gt,
                          T scale) const {
    if constexpr (kKind == BoxLossKind::kL1 || kKind == BoxLossKind::kSmoothL1) {
      const Box<T> target = coder.encode(gt, anchor);
      return {
          scale * slope<kKind>(delta.x1 - target.x1), scale * slope<kKind>(delta.y1 - target.y1),
          scale * slope<kKind>(delta.x2 - target.x2), scale * slope<kKind>(delta.y2 - target.y2)};
    } else {
      // Differentiate the loss by the decoded box, then apply the chain rule of decoding.
      using V = Dual<T>;
      const Box<T> p = coder.decode(delta, anchor);
      Coordinates<V> prediction{p.x1, p.y1, p.x2, p.y2};
      prediction.x1.d[0] = prediction.y1.d[1] = prediction.x2.d[2] = prediction.y2.d[3] = T(1);
      const V loss = V(1) - iou_like<iou_kind_of(kKind)>(
                                prediction, Coordinates<V>{gt.x1, gt.y1, gt.x2, gt.y2});
      return coder.decode_grad(
          delta, anchor,
          {scale * loss.d[0], scale * loss.d[1], scale * loss.d[2], scale * loss.d[3]});
    }
  }

 private:
  // L1 or smooth L1 of one delta.
  template <BoxLossKind kKind>
  HOST_DEVICE T distance(T difference) const {
    const T d = std::abs(difference);
    return kKind == BoxLossKind::kSmoothL1 && d < beta ? T(0.5) * d * d / beta
           : kKind == BoxLossKind::kSmoothL1           ? d - T(0.5) * beta
                                                       : d;
  }

  // The derivative of `distance`: 0 for a difference of 0, NaN for NaN.
  template <BoxLossKind kKind>
  HOST_DEVICE T slope(T difference) const {
    if (kKind == BoxLossKind::kSmoothL1 && std::abs(difference) < beta) return difference / beta;
    return difference > T(0) ? T(1) : (difference < T(0) ? T(-1) : difference);
  }
};

// Calls f with the BoxLossKind named `kind`, as an integral_constant.
template <typename F>
inline void dispatch_box_loss(const std::string& kind, const char* op, F&& f) {
  if (kind == "l1") return f(std::integral_constant<BoxLossKind, BoxLossKind::kL1>{});
  if (kind == "smooth_l1") return f(std::integral_constant<BoxLossKind, BoxLossKind::kSmoothL1>{});
  if (kind == "giou") return f(std::integral_constant<BoxLossKind, BoxLossKind::kGiou>{});
  if (kind == "diou") return f(std::integral_constant<BoxLossKind, BoxLossKind::kDiou>{});
  check(kind == "ciou", op, ": kind must be l1, smooth_l1, giou, diou or ciou, got ", kind);
  f(std::integral_constant<BoxLossKind, BoxLossKind::kCiou>{});
}

// The anchors of an image that one word of `matched` stands for.
constexpr int kWordAnchors = 32;

// The inputs of the loss, as kernels read them.
template <typename T>
struct BoxLossInputs {
  using C = Compute<T>;
  HeadLevels<T> levels;  // the deltas
  Anchors<C> anchors;
  int64_t num_anchors;     // of one image
  const Box<C>* gt_boxes;  // [N, max_gt]
  const int* matches;      // [N, num_anchors]
  int64_t max_gt;
  Divisor by_per_cell[kMaxLevels];  // the anchors in a cell of each level

  // The place of an anchor: its level, its number there, and where its four deltas are in the
  // level's tensor: at offset, offset + step, ...
  struct Place {
    int level;
    uint32_t in_level;
    int64_t offset, step;
  };

  HOST_DEVICE Place place(int64_t image, int64_t anchor) const {
    const int l = levels.level_of(4 * anchor);
    return place_in_level(image, l, uint32_t(anchor - levels.level[l].first / 4));
  }

  HOST_DEVICE Place place_in_level(int64_t image, int l, uint32_t in_level) const {
    const HeadLevel<T>& level = levels.level[l];
    const int64_t first = image * level.size();
    if (level.channels_last) return {l, in_level, first + 4 * int64_t(in_level), 1};
    const uint32_t cell = by_per_cell[l].quotient(in_level);
    const uint32_t a = in_level - cell * uint32_t(level.channels / 4);
    return {l, in_level, first + 4 * int64_t(a) * level.area + cell, level.area};
  }

  // Calls f(delta, anchor box, ground truth) for an anchor with a match.
  template <typename F>
  HOST_DEVICE void visit_match(int64_t image, const Place& place, int match, F&& f) const {
    const HeadLevel<T>& level = levels.level[place.level];
    const T* x = level.data + place.offset;
    const int64_t step = place.step;
    const Box<C> delta{C(x[0]), C(x[step]), C(x[2 * step]), C(x[3 * step])};
    // A match index of max_gt or more gives NaN. So does a negative one, which gets here only if
    // `matched` belongs to other matches.
    constexpr C kNan = std::numeric_limits<C>::quiet_NaN();
    const Box<C> gt = uint64_t(match) < uint64_t(max_gt) ? gt_boxes[image * max_gt + match]
                                                         : Box<C>{kNan, kNan, kNan, kNan};
    f(delta, anchors(image, level.first / 4 + place.in_level), gt);
  }
};

// The arguments that the forward and the backward op share, checked once for both backends.
//
// The forward op also returns `matched`, which tells the backward op in one bit per anchor whether
// the anchor has a match: bit a % 32 of word a / 32 is that of anchor a.
struct DenseBoxLossArguments {
  HeadTensors heads;
  AnchorArgument anchors;
  Tensor gt_boxes, matches;
  int64_t max_gt;

  DenseBoxLossArguments(const std::vector<Tensor>& box_deltas, const Tensor& anchors_,
                        const std::vector<int64_t>& grid_sizes,
                        const std::vector<double>& grid_steps, const Tensor& gt_boxes_,
                        const Tensor& matches_, const char* op)
      : heads(box_deltas, op, "box_deltas"),
        anchors(anchors_, grid_sizes, grid_steps, op),
        gt_boxes(contiguous_aligned(gt_boxes_)),
        matches(contiguous_aligned(matches_)),
        max_gt(gt_boxes.dim() == 3 ? gt_boxes.size(1) : 0) {
    for (const Tensor& t : heads.tensors) {
      check(t.size(1) % 4 == 0, op, ": box_deltas ", shape(t), " must have 4 channels per anchor");
      check(t.size(1) / 4 * t.size(2) * t.size(3) < kMaxLevelAnchors, op, ": box_deltas ", shape(t),
            " must have fewer than 2^31 anchors per image");
    }
    check(4 * anchors.count == heads.elements, op, ": box_deltas hold ", heads.elements / 4,
          " anchors, expected ", anchors.count);
    if (anchors.batched)
      check_shape(anchors.tensor, {heads.images, anchors.count, 4}, op, "anchors");
    check_shape(gt_boxes, {heads.images, max_gt, 4}, op, "gt_boxes");
    check_dtype(gt_boxes, heads.compute_dtype(), op, "gt_boxes");
    check_shape(matches, {heads.images, anchors.count}, op, "matches");
    check_dtype(matches, ScalarType::Int, op, "matches");
  }

  // The words of `matched` for one image.
  int64_t words() const { return (anchors.count + kWordAnchors - 1) / kWordAnchors; }
  Tensor new_matched() const {
    const int64_t shape[] = {heads.images, words()};
    return empty(matches, shape, 2, ScalarType::Int);
  }
  void check_matched(const Tensor& matched, const char* op) const {
    check_shape(matched, {heads.images, words()}, op, "matched");
    check_dtype(matched, ScalarType::Int, op, "matched");
  }

  // The inputs as pointers. `op` is for messages.
  template <typename T>
  BoxLossInputs<T> inputs(const char* op) const {
    using C = Compute<T>;
    BoxLossInputs<T> inputs{heads.view<T>(),
                            anchors.view<C>(op),
                            anchors.count,
                            data<Box<C>>(gt_boxes),
                            data<int>(matches),
                            max_gt,
                            {}};
    for (int l = 0; l < inputs.levels.count; ++l)
      inputs.by_per_cell[l] = Divisor(std::max<int64_t>(inputs.levels.level[l].channels / 4, 1));
    return inputs;
  }
};

}  // namespace retinanet
