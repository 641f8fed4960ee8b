// Pairwise IoU, GIoU, DIoU or CIoU: the choice of the formula and the input checks, used by both
// backends. The formulas are in boxes.h (IoU) and iou_kinds.h.
//
// The backward op computes the gradient of boxes1. All four measures are symmetric, so the gradient
// of boxes2 is the result for swapped boxes and the transposed gradient.
#pragma once

#include "common/checks.h"
#include "common/iou_kinds.h"

namespace retinanet {

// Calls f with the IouKind named `kind`, as an integral_constant.
template <typename F>
inline void dispatch_iou_kind(const std::string& kind, const char* op, F&& f) {
  if (kind == "iou") return f(std::integral_constant<IouKind, IouKind::kIou>{});
  if (kind == "giou") return f(std::integral_constant<IouKind, IouKind::kGiou>{});
  if (kind == "diou") return f(std::integral_constant<IouKind, IouKind::kDiou>{});
  check(kind == "ciou", op, ": kind must be iou, giou, diou or ciou, got ", kind);
  f(std::integral_constant<IouKind, IouKind::kCiou>{});
}

// The IoU of two boxes, or a relative of it. Only the IoU itself uses the areas, which the caller
// computes once per box.
template <IouKind kKind, typename T>
HOST_DEVICE T iou_like(const Box<T>& a, T a_area, const Box<T>& b, T b_area) {
  if constexpr (kKind == IouKind::kIou) {
    return iou(a, a_area, b, b_area);
  } else {
    return iou_like<kKind>(Coordinates<T>{a.x1, a.y1, a.x2, a.y2},
                           Coordinates<T>{b.x1, b.y1, b.x2, b.y2});
  }
}

// The derivatives of the measure of two boxes with respect to the coordinates of `a`.
template <IouKind kKind, typename T>
HOST_DEVICE Box<T> iou_like_derivatives(const Box<T>& a, const Box<T>& b) {
  using V = Dual<T>;
  Coordinates<V> p{a.x1, a.y1, a.x2, a.y2};
  p.x1.d[0] = p.y1.d[1] = p.x2.d[2] = p.y2.d[3] = T(1);
  const V value = iou_like<kKind>(p, Coordinates<V>{b.x1, b.y1, b.x2, b.y2});
  return {value.d[0], value.d[1], value.d[2], value.d[3]};
}

inline void check_box_iou(const Tensor& boxes1, const Tensor& boxes2, const char* op) {
  check(boxes1.dim() == 2 && boxes1.size(1) == 4, op, ": boxes1 must have shape [M, 4], got ",
        shape(boxes1));
  check(boxes2.dim() == 2 && boxes2.size(1) == 4, op, ": boxes2 must have shape [N, 4], got ",
        shape(boxes2));
  check_dtype(boxes2, boxes1.scalar_type(), op, "boxes2");
}

inline void check_box_iou_backward(const Tensor& grad, const Tensor& boxes1, const Tensor& boxes2) {
  constexpr const char* kOp = "box_iou_backward";
  check_box_iou(boxes1, boxes2, kOp);
  check_shape(grad, {boxes1.size(0), boxes2.size(0)}, kOp, "grad");
  check_dtype(grad, boxes1.scalar_type(), kOp, "grad");
}

}  // namespace retinanet
