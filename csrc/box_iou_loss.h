// Losses of pairs of boxes, 1 minus their GIoU, DIoU or CIoU: the formula and the input checks,
// used by both backends. The measures are in iou_kinds.h.
//
// The backward op computes the gradient of boxes1. The losses are symmetric, so the gradient of
// boxes2 is the result for swapped boxes.
#pragma once

#include "box_iou.h"

namespace retinanet {

// Calls f with the IouKind named `kind`, as an integral_constant.
template <typename F>
inline void dispatch_box_iou_loss(const std::string& kind, const char* op, F&& f) {
  if (kind == "giou") return f(std::integral_constant<IouKind, IouKind::kGiou>{});
  if (kind == "diou") return f(std::integral_constant<IouKind, IouKind::kDiou>{});
  check(kind == "ciou", op, ": kind must be giou, diou or ciou, got ", kind);
  f(std::integral_constant<IouKind, IouKind::kCiou>{});
}

// The loss of a pair of boxes.
template <IouKind kKind, typename T>
HOST_DEVICE T box_iou_loss(const Box<T>& a, const Box<T>& b) {
  return T(1) - iou_like<kKind>(Coordinates<T>{a.x1, a.y1, a.x2, a.y2},
                                Coordinates<T>{b.x1, b.y1, b.x2, b.y2});
}

// The gradient of that loss with respect to the coordinates of `a`, times `scale`.
template <IouKind kKind, typename T>
HOST_DEVICE Box<T> box_iou_loss_grad(const Box<T>& a, const Box<T>& b, T scale) {
  const Box<T> d = iou_like_derivatives<kKind>(a, b);
  return {-scale * d.x1, -scale * d.y1, -scale * d.x2, -scale * d.y2};
}

inline void check_box_iou_loss(const Tensor& boxes1, const Tensor& boxes2, const char* op) {
  check(boxes1.dim() == 2 && boxes1.size(1) == 4, op, ": boxes1 must have shape [N, 4], got ",
        shape(boxes1));
  check_shape(boxes2, {boxes1.size(0), 4}, op, "boxes2");
  check_dtype(boxes2, boxes1.scalar_type(), op, "boxes2");
}

inline void check_box_iou_loss_backward(const Tensor& grad, const Tensor& boxes1,
                                        const Tensor& boxes2) {
  constexpr const char* kOp = "box_iou_loss_backward";
  check_box_iou_loss(boxes1, boxes2, kOp);
  check_shape(grad, {boxes1.size(0)}, kOp, "grad");
  check_dtype(grad, boxes1.scalar_type(), kOp, "grad");
}

}  // namespace retinanet
