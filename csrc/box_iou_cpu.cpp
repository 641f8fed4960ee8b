// Pairwise IoU and its relatives on the CPU. Each thread takes a chunk of the rows.
#include "box_iou.h"

namespace retinanet {
namespace {

Tensor box_iou_cpu(const Tensor& boxes1, const Tensor& boxes2, std::string kind) {
  check_box_iou(boxes1, boxes2);
  const Tensor a = contiguous_aligned(boxes1), b = contiguous_aligned(boxes2);
  const int64_t rows = a.size(0), columns = b.size(0);
  Tensor out = empty_tensor(a, {rows, columns});
  dispatch_compute(a.scalar_type(), "box_iou", [&](auto zero) {
    using T = decltype(zero);
    const Box<T>*row_boxes = data<Box<T>>(a), *column_boxes = data<Box<T>>(b);
    T* result = data<T>(out);
    std::vector<T> areas(columns);
    for (int64_t j = 0; j < columns; ++j) areas[j] = area(column_boxes[j]);
    // A chunk has one row, or as many rows as make about 16,384 pairs.
    const int64_t chunk = 1 + 16384 / (columns + 1);
    dispatch_iou_kind(kind, [&](auto kind_constant) {
      constexpr IouKind kKind = decltype(kind_constant)::value;
      torch::stable::parallel_for(0, rows, chunk, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const T area_i = area(row_boxes[i]);
          for (int64_t j = 0; j < columns; ++j)
            result[i * columns + j] =
                iou_like<kKind>(row_boxes[i], area_i, column_boxes[j], areas[j]);
        }
      });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) { m.impl("box_iou", TORCH_BOX(&box_iou_cpu)); }

}  // namespace retinanet
