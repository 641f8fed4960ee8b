// Pairwise IoU on the CPU: threads share the rows.
#include "box_iou.h"

namespace retinanet {
namespace {

Tensor box_iou_cpu(const Tensor& boxes1, const Tensor& boxes2, std::string kind) {
  check_box_iou(boxes1, boxes2);
  const Tensor a = contiguous_aligned(boxes1), b = contiguous_aligned(boxes2);
  const int64_t rows = a.size(0), columns = b.size(0);
  Tensor out = torch::stable::new_empty(a, {rows, columns});
  dispatch_compute(a.scalar_type(), "box_iou", [&](auto zero) {
    using T = decltype(zero);
    const Box<T>*ap = data<Box<T>>(a), *bp = data<Box<T>>(b);
    T* op = data<T>(out);
    std::vector<T> areas(columns);
    for (int64_t j = 0; j < columns; ++j) areas[j] = area(bp[j]);
    dispatch_iou_kind(kind, [&](auto measure) {
      torch::stable::parallel_for(
          0, rows, 1 + 16384 / (columns + 1), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
              const T area_i = area(ap[i]);
              for (int64_t j = 0; j < columns; ++j)
                op[i * columns + j] =
                    iou_like<decltype(measure)::value>(ap[i], area_i, bp[j], areas[j]);
            }
          });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) { m.impl("box_iou", TORCH_BOX(&box_iou_cpu)); }

}  // namespace retinanet
