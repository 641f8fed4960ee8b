// null_op on CUDA.
//
// Work: one thread takes a pack, 16 bytes of consecutive elements; the threads stride over the
// tensor. Bytes moved per element: its size, once read and once written, by 128-bit accesses.
// Elements are independent, so the result is deterministic.
#include "common/cuda.h"
#include "null_op.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;

// 128-bit accesses: 1 load, 1 store
template <typename T>
__global__ void __launch_bounds__(kThreads)
    null_op_kernel(const T* __restrict__ x, int64_t size, Compute<T> scale, T* __restrict__ out) {
  using C = Compute<T>;
  constexpr int kSize = Packed<T>::kSize;
  const int64_t stride = int64_t(gridDim.x) * kThreads * kSize;
  for (int64_t begin = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize; begin < size;
       begin += stride) {
    if (begin + kSize <= size) {
      Packed<T> pack = load_packed(x + begin);
#pragma unroll
      for (int j = 0; j < kSize; ++j) pack.v[j] = T(null_op(C(pack.v[j]), scale));
      store_packed(out + begin, pack);
    } else {  // the last elements, fewer than a pack
      for (int64_t i = begin; i < size; ++i) out[i] = T(null_op(C(x[i]), scale));
    }
  }
}

Tensor null_op_cuda(const Tensor& x, double scale) {
  check_null_op(x);
  const CudaScope scope("null_op", x);
  const Tensor in = contiguous_aligned(x);
  Tensor out = torch::stable::empty_like(in);
  dispatch_floating(in.scalar_type(), "null_op", [&](auto zero) {
    using T = decltype(zero);
    const int64_t packs = ceil_div(in.numel(), Packed<T>::kSize);
    if (packs == 0) return;
    const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(packs, kThreads), 1 << 20));
    launch("null_op_kernel", null_op_kernel<T>, blocks, kThreads, 0, scope, data<T>(in), in.numel(),
           Compute<T>(scale), data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) { m.impl("null_op", TORCH_BOX(&null_op_cuda)); }

}  // namespace retinanet
