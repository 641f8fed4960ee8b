// GIoU, DIoU and CIoU losses of pairs of boxes on the CPU, and their gradients. Each thread takes a
// chunk of the pairs.
#include "box_iou_loss.h"
#include "common/flatten.h"

namespace retinanet {
namespace {

constexpr int64_t kChunk = 2048;  // least number of pairs of a thread

Tensor box_iou_loss_cpu(const Tensor& boxes1, const Tensor& boxes2, std::string kind) {
  check_box_iou_loss(boxes1, boxes2, "box_iou_loss");
  const Tensor a = contiguous_aligned(boxes1), b = contiguous_aligned(boxes2);
  Tensor out = empty_tensor(a, {a.size(0)});
  dispatch_compute(a.scalar_type(), "box_iou_loss", [&](auto zero) {
    using T = decltype(zero);
    const Box<T>*first = data<Box<T>>(a), *second = data<Box<T>>(b);
    T* losses = data<T>(out);
    dispatch_box_iou_loss(kind, "box_iou_loss", [&](auto kind_constant) {
      constexpr IouKind kKind = decltype(kind_constant)::value;
      torch::stable::parallel_for(0, a.size(0), kChunk, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) losses[i] = box_iou_loss<kKind>(first[i], second[i]);
      });
    });
  });
  return out;
}

// `grad` may have any stride, because it is expanded if the losses are summed.
Tensor box_iou_loss_backward_cpu(const Tensor& grad, const Tensor& boxes1, const Tensor& boxes2,
                                 std::string kind) {
  check_box_iou_loss_backward(grad, boxes1, boxes2);
  const Tensor a = contiguous_aligned(boxes1), b = contiguous_aligned(boxes2);
  const int64_t stride = grad.stride(0);
  Tensor out = empty_tensor(a, {a.size(0), 4});
  dispatch_compute(a.scalar_type(), "box_iou_loss_backward", [&](auto zero) {
    using T = decltype(zero);
    const Box<T>*first = data<Box<T>>(a), *second = data<Box<T>>(b);
    const T* grads = data<T>(grad);
    Box<T>* result = data<Box<T>>(out);
    dispatch_box_iou_loss(kind, "box_iou_loss_backward", [&](auto kind_constant) {
      constexpr IouKind kKind = decltype(kind_constant)::value;
      torch::stable::parallel_for(0, a.size(0), kChunk, [&](int64_t begin, int64_t end) FLATTEN {
        for (int64_t i = begin; i < end; ++i)
          result[i] = box_iou_loss_grad<kKind>(first[i], second[i], grads[i * stride]);
      });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("box_iou_loss", TORCH_BOX(&box_iou_loss_cpu));
  m.impl("box_iou_loss_backward", TORCH_BOX(&box_iou_loss_backward_cpu));
}

}  // namespace retinanet
