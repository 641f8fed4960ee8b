// Pairwise IoU: the check that both backends share; the formula is in boxes.h.
#pragma once

#include "boxes.h"

namespace retinanet {

inline void check_box_iou(const Tensor& boxes1, const Tensor& boxes2) {
  check(boxes1.dim() == 2 && boxes1.size(1) == 4, "box_iou: boxes1 must have shape [M, 4], got ",
        shape(boxes1));
  check(boxes2.dim() == 2 && boxes2.size(1) == 4, "box_iou: boxes2 must have shape [N, 4], got ",
        shape(boxes2));
  check_dtype(boxes2, boxes1.scalar_type(), "box_iou", "boxes2");
}

}  // namespace retinanet
