// Pairwise IoU, GIoU, DIoU or CIoU: the choice of the formula and the input check, used by both
// backends. The formulas are in boxes.h (IoU) and iou_kinds.h.
#pragma once

#include "common/checks.h"
#include "common/iou_kinds.h"

namespace retinanet {

// Calls f with the IouKind named `kind`, as an integral_constant.
template <typename F>
inline void dispatch_iou_kind(const std::string& kind, F&& f) {
  if (kind == "iou") return f(std::integral_constant<IouKind, IouKind::kIou>{});
  if (kind == "giou") return f(std::integral_constant<IouKind, IouKind::kGiou>{});
  if (kind == "diou") return f(std::integral_constant<IouKind, IouKind::kDiou>{});
  check(kind == "ciou", "box_iou: kind must be iou, giou, diou or ciou, got ", kind);
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

inline void check_box_iou(const Tensor& boxes1, const Tensor& boxes2) {
  check(boxes1.dim() == 2 && boxes1.size(1) == 4, "box_iou: boxes1 must have shape [M, 4], got ",
        shape(boxes1));
  check(boxes2.dim() == 2 && boxes2.size(1) == 4, "box_iou: boxes2 must have shape [N, 4], got ",
        shape(boxes2));
  check_dtype(boxes2, boxes1.scalar_type(), "box_iou", "boxes2");
}

}  // namespace retinanet
