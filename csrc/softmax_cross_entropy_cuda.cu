// Softmax cross-entropy on CUDA.
//
// Work: one warp takes a row; the warps stride over the rows. Its lanes take the row's logits in
// turn, so the 32 accesses of an instruction are to consecutive addresses. Packs of 16 bytes would
// not fit rows whose length is no multiple of them, such as the 91 classes of COCO.
//
// Bytes moved per logit: the forward kernel reads it once, and a second time from the first-level
// cache. The backward kernel writes a gradient, and reads the logits of rows whose incoming
// gradient is not 0.
//
// Deterministic: the sum of a row has a fixed order. Rows are independent.
#include "common/boxes.h"  // higher
#include "common/cuda.h"
#include "softmax_cross_entropy.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// The maximum and the sum of a row, in all lanes of a warp. All lanes must call it.
template <typename T>
__device__ __forceinline__ SoftmaxRow<Compute<T>> softmax_row(const T* x, int64_t classes) {
  using C = Compute<T>;
  const int lane = threadIdx.x % kWarp;
  C most = -std::numeric_limits<C>::infinity(), sum = 0;
  for (int64_t k = lane; k < classes; k += kWarp) most = higher(most, C(x[k]));
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    most = higher(most, __shfl_xor_sync(kFullMask, most, offset));
  for (int64_t k = lane; k < classes; k += kWarp) sum += std::exp(C(x[k]) - most);
  return {most, __shfl_sync(kFullMask, warp_sum(sum), 0)};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    softmax_cross_entropy_kernel(const T* __restrict__ inputs, const int* __restrict__ targets,
                                 int64_t rows, int64_t classes, Compute<T>* __restrict__ loss) {
  using C = Compute<T>;
  const int64_t stride = int64_t(gridDim.x) * kWarps;
  for (int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; r < rows; r += stride) {
    const T* x = inputs + r * classes;
    const int target = targets[r];  // the same in all lanes, as the condition below
    C value = loss_without_class<C>(target);
    if (is_class(target, classes)) value = softmax_row(x, classes).loss(C(x[target]));
    if (threadIdx.x % kWarp == 0) loss[r] = value;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    softmax_cross_entropy_backward_kernel(const Compute<T>* __restrict__ grads,
                                          const T* __restrict__ inputs,
                                          const int* __restrict__ targets, int64_t rows,
                                          int64_t classes, T* __restrict__ out) {
  using C = Compute<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = int64_t(gridDim.x) * kWarps;
  for (int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; r < rows; r += stride) {
    const T* x = inputs + r * classes;
    T* to = out + r * classes;
    const C grad = grads[r];  // the same in all lanes, as the condition below
    const int target = targets[r];
    if (grad == C(0) || !is_class(target, classes)) {
      const C value = grad == C(0) ? C(0) : loss_without_class<C>(target);
      for (int64_t k = lane; k < classes; k += kWarp) to[k] = T(value);
      continue;
    }
    const SoftmaxRow<C> softmax = softmax_row(x, classes);
    const C scale = grad / softmax.sum;
    for (int64_t k = lane; k < classes; k += kWarp) {
      const C share = std::exp(C(x[k]) - softmax.most) * scale;
      to[k] = T(k == target ? share - grad : share);
    }
  }
}

unsigned blocks_for(int64_t rows) {
  return unsigned(std::min<int64_t>(ceil_div(rows, kWarps), 1 << 20));
}

Tensor softmax_cross_entropy_cuda(const Tensor& inputs, const Tensor& targets) {
  const CudaScope scope("softmax_cross_entropy", inputs, targets);
  const CrossEntropyArguments args(inputs, targets, "softmax_cross_entropy");
  Tensor out = empty_tensor(args.targets, args.targets.sizes(), args.loss_dtype());
  dispatch_floating(inputs.scalar_type(), "softmax_cross_entropy", [&](auto zero) {
    using T = decltype(zero);
    if (args.rows == 0) return;
    launch("softmax_cross_entropy_kernel", softmax_cross_entropy_kernel<T>, blocks_for(args.rows),
           kThreads, 0, scope, data<T>(args.inputs), data<int>(args.targets), args.rows,
           args.classes, data<Compute<T>>(out));
  });
  return out;
}

Tensor softmax_cross_entropy_backward_cuda(const Tensor& grad, const Tensor& inputs,
                                           const Tensor& targets) {
  const char* op = "softmax_cross_entropy_backward";
  const CudaScope scope(op, inputs, targets, grad);
  const CrossEntropyArguments args(inputs, targets, op);
  args.check_grad(grad, op);
  const Tensor g = contiguous_aligned(grad);
  Tensor out = empty_tensor_like(args.inputs);
  dispatch_floating(inputs.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    if (args.rows == 0) return;
    launch("softmax_cross_entropy_backward_kernel", softmax_cross_entropy_backward_kernel<T>,
           blocks_for(args.rows), kThreads, 0, scope, data<Compute<T>>(g), data<T>(args.inputs),
           data<int>(args.targets), args.rows, args.classes, data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("softmax_cross_entropy", TORCH_BOX(&softmax_cross_entropy_cuda));
  m.impl("softmax_cross_entropy_backward", TORCH_BOX(&softmax_cross_entropy_backward_cuda));
}

}  // namespace retinanet
