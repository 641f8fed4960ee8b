// Pairwise IoU and its relatives on the CPU, and their gradients. Each thread takes a chunk of the
// rows.
#include "box_iou.h"
#include "common/flatten.h"

namespace retinanet {
namespace {

Tensor box_iou_cpu(const Tensor& boxes1, const Tensor& boxes2, std::string kind) {
  check_box_iou(boxes1, boxes2, "box_iou");
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
    dispatch_iou_kind(kind, "box_iou", [&](auto kind_constant) {
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

// The gradient of a row is summed over the columns in order, in float64. `grad` may have any
// strides, because it is often expanded or transposed.
Tensor box_iou_backward_cpu(const Tensor& grad, const Tensor& boxes1, const Tensor& boxes2,
                            std::string kind) {
  check_box_iou_backward(grad, boxes1, boxes2);
  const Tensor a = contiguous_aligned(boxes1), b = contiguous_aligned(boxes2);
  const int64_t rows = a.size(0), columns = b.size(0);
  const int64_t row_stride = grad.stride(0), column_stride = grad.stride(1);
  Tensor out = empty_tensor(a, {rows, 4});
  dispatch_compute(a.scalar_type(), "box_iou_backward", [&](auto zero) {
    using T = decltype(zero);
    const Box<T>*row_boxes = data<Box<T>>(a), *column_boxes = data<Box<T>>(b);
    const T* grads = data<T>(grad);
    Box<T>* result = data<Box<T>>(out);
    // A chunk has one row, or as many rows as make about 1,024 pairs.
    const int64_t chunk = 1 + 1024 / (columns + 1);
    dispatch_iou_kind(kind, "box_iou_backward", [&](auto kind_constant) {
      constexpr IouKind kKind = decltype(kind_constant)::value;
      torch::stable::parallel_for(0, rows, chunk, [&](int64_t begin, int64_t end) FLATTEN {
        for (int64_t i = begin; i < end; ++i) {
          double x1 = 0, y1 = 0, x2 = 0, y2 = 0;
          for (int64_t j = 0; j < columns; ++j) {
            const T g = grads[i * row_stride + j * column_stride];
            const Box<T> d = iou_like_derivatives<kKind>(row_boxes[i], column_boxes[j]);
            x1 += g * d.x1;
            y1 += g * d.y1;
            x2 += g * d.x2;
            y2 += g * d.y2;
          }
          result[i] = {T(x1), T(y1), T(x2), T(y2)};
        }
      });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("box_iou", TORCH_BOX(&box_iou_cpu));
  m.impl("box_iou_backward", TORCH_BOX(&box_iou_backward_cpu));
}

}  // namespace retinanet
