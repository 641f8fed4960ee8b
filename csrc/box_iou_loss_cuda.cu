// GIoU, DIoU and CIoU losses of pairs of boxes on CUDA, and their gradients.
//
// Work: one thread takes one pair, whose boxes it reads with one 128-bit access each (two in
// float64). The threads of a warp read neighbouring boxes and write neighbouring results.
//
// Bytes moved per pair in float32: 32 read and 4 written forward, 32 read and 16 written backward,
// and 4 more read backward unless one incoming gradient belongs to all pairs. Pairs are
// independent, so the results are deterministic.
#include "box_iou_loss.h"
#include "common/cuda.h"

namespace retinanet {
namespace {

constexpr int kThreads = 128;

// 128-bit accesses: 2 loads, 0 stores
template <typename T, IouKind kKind>
__global__ void __launch_bounds__(kThreads)
    box_iou_loss_kernel(const Box<T>* __restrict__ boxes1, const Box<T>* __restrict__ boxes2,
                        int64_t count, T* __restrict__ out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = box_iou_loss<kKind>(boxes1[i], boxes2[i]);
}

Tensor box_iou_loss_cuda(const Tensor& boxes1, const Tensor& boxes2, std::string kind) {
  check_box_iou_loss(boxes1, boxes2, "box_iou_loss");
  const CudaScope scope("box_iou_loss", boxes1, boxes2);
  const Tensor a = contiguous_aligned(boxes1), b = contiguous_aligned(boxes2);
  const int64_t count = a.size(0);
  Tensor out = empty_tensor(a, {count});
  if (count == 0) return out;
  dispatch_compute(a.scalar_type(), "box_iou_loss", [&](auto zero) {
    using T = decltype(zero);
    dispatch_box_iou_loss(kind, "box_iou_loss", [&](auto kind_constant) {
      launch("box_iou_loss_kernel", box_iou_loss_kernel<T, decltype(kind_constant)::value>,
             unsigned(ceil_div(count, kThreads)), kThreads, 0, scope, data<Box<T>>(a),
             data<Box<T>>(b), count, data<T>(out));
    });
  });
  return out;
}

// The incoming gradient of pair i is grad[i * grad_stride].
// 128-bit accesses: 2 loads, 1 store
template <typename T, IouKind kKind>
__global__ void __launch_bounds__(kThreads)
    box_iou_loss_backward_kernel(const T* __restrict__ grad, int64_t grad_stride,
                                 const Box<T>* __restrict__ boxes1,
                                 const Box<T>* __restrict__ boxes2, int64_t count,
                                 Box<T>* __restrict__ out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = box_iou_loss_grad<kKind>(boxes1[i], boxes2[i], grad[i * grad_stride]);
}

Tensor box_iou_loss_backward_cuda(const Tensor& grad, const Tensor& boxes1, const Tensor& boxes2,
                                  std::string kind) {
  check_box_iou_loss_backward(grad, boxes1, boxes2);
  const CudaScope scope("box_iou_loss_backward", grad, boxes1, boxes2);
  const Tensor a = contiguous_aligned(boxes1), b = contiguous_aligned(boxes2);
  const int64_t count = a.size(0);
  Tensor out = empty_tensor(a, {count, 4});
  if (count == 0) return out;
  dispatch_compute(a.scalar_type(), "box_iou_loss_backward", [&](auto zero) {
    using T = decltype(zero);
    dispatch_box_iou_loss(kind, "box_iou_loss_backward", [&](auto kind_constant) {
      launch("box_iou_loss_backward_kernel",
             box_iou_loss_backward_kernel<T, decltype(kind_constant)::value>,
             unsigned(ceil_div(count, kThreads)), kThreads, 0, scope, data<T>(grad), grad.stride(0),
             data<Box<T>>(a), data<Box<T>>(b), count, data<Box<T>>(out));
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("box_iou_loss", TORCH_BOX(&box_iou_loss_cuda));
  m.impl("box_iou_loss_backward", TORCH_BOX(&box_iou_loss_backward_cuda));
}

}  // namespace retinanet
