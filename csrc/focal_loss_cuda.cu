// Sigmoid focal loss on CUDA.
//
// Work: one thread handles 16 bytes of logits (2 to 8 elements) at a time.  Elementwise kernels run
// one such pack per thread; the sum gives each block a fixed run of kPacks packs per thread, so
// that the result depends on the number of elements alone.  Bytes moved per element: forward reads
// the logit (and writes the loss unless it is summed), backward reads the logit and writes the
// gradient; both read a dense target, 16 bytes at a time too; a class label is read once per pack
// or row end, and stays in cache. Determinism: no atomics; each thread sums its packs in order, a
// block its threads by shuffles, and a second kernel the blocks' partial sums; from packs on in
// float64.
#include "focal_loss_packs.h"

namespace retinanet {
namespace {

constexpr int kPacks = 16;  // packs that each thread of the summing kernel handles

// 128-bit accesses: 1 load, 1 store
template <typename T, Power kPower, typename View>
__global__ void __launch_bounds__(kThreads)
    focal_loss_kernel(const T* __restrict__ x, View view, int64_t n, Focal<Compute<T>> focal,
                      T* __restrict__ out) {
  constexpr int kSize = Packed<T>::kSize;
  const int64_t step = int64_t(gridDim.x) * kThreads * kSize;
  for (int64_t begin = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize; begin < n;
       begin += step) {
    Packed<T> result;
    for_pack<kPower>(x, view, begin, n, [&](int j, Compute<T> v, const auto& targets) {
      result.v[j] = T(targets.loss(focal, v, j));
    });
    store_pack(out, result, begin, n);
  }
}

// 128-bit accesses: 1 load, 0 stores
template <typename T, Power kPower, typename View>
__global__ void __launch_bounds__(kThreads)
    focal_loss_sum_kernel(const T* __restrict__ x, View view, int64_t n, Focal<Compute<T>> focal,
                          double* __restrict__ partial) {
  constexpr int kSize = Packed<T>::kSize;
  const int64_t first = int64_t(blockIdx.x) * kThreads * kPacks * kSize;
  double sum = 0;
  for (int p = 0; p < kPacks; ++p) {
    const int64_t begin = first + (int64_t(p) * kThreads + threadIdx.x) * kSize;
    if (begin >= n) continue;
    Compute<T> pack = 0;
    for_pack<kPower>(x, view, begin, n, [&](int j, Compute<T> v, const auto& targets) {
      pack += targets.loss(focal, v, j);
    });
    sum += pack;
  }
  const double total = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// `grad` holds one value for all elements when `shared`, and then has type G; else one per element,
// of type T.
// 128-bit accesses: 2 loads, 1 store
template <typename T, typename G, Power kPower, typename View>
__global__ void __launch_bounds__(kThreads)
    focal_loss_backward_kernel(const void* __restrict__ grad, bool shared, const T* __restrict__ x,
                               View view, int64_t n, Focal<Compute<T>> focal, T* __restrict__ out) {
  using C = Compute<T>;
  constexpr int kSize = Packed<T>::kSize;
  const C scale = shared ? C(*static_cast<const G*>(grad)) : C(1);
  const int64_t step = int64_t(gridDim.x) * kThreads * kSize;
  for (int64_t begin = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize; begin < n;
       begin += step) {
    Packed<T> result, g;
    if (!shared) g = load_pack(static_cast<const T*>(grad), begin, n);
    for_pack<kPower>(x, view, begin, n, [&](int j, C v, const auto& targets) {
      result.v[j] = T(targets.grad(focal, v, j, shared ? scale : C(g.v[j])));
    });
    store_pack(out, result, begin, n);
  }
}

// Blocks for one pack per thread, as far as one grid dimension reaches.
template <typename T>
unsigned blocks_for(int64_t n) {
  return unsigned(
      std::min<int64_t>(ceil_div(n, kThreads * Packed<T>::kSize), (int64_t(1) << 31) - 1));
}

Tensor sigmoid_focal_loss_cuda(const Tensor& inputs, const Tensor& targets, double alpha,
                               double gamma, bool reduce) {
  check_focal_loss(inputs, targets, "sigmoid_focal_loss");
  const CudaScope scope(inputs);
  const Tensor x = contiguous_aligned(inputs), t = contiguous_aligned(targets);
  const int64_t n = x.numel();
  const ScalarType sum_dtype =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = reduce ? torch::stable::new_empty(x, {}, sum_dtype) : torch::stable::empty_like(x);
  if (n == 0) return reduce ? torch::stable::fill_(out, 0) : out;
  dispatch_focal(x, t, "sigmoid_focal_loss", [&](auto zero, const auto view) {
    using T = decltype(zero);
    using C = Compute<T>;
    using View = std::decay_t<decltype(view)>;
    const auto focal = Focal<C>::make(alpha, gamma);
    dispatch_power(focal, [&](auto power) {
      constexpr Power kPower = decltype(power)::value;
      if (!reduce) {
        launch("focal_loss_kernel", focal_loss_kernel<T, kPower, View>, blocks_for<T>(n), kThreads,
               0, scope, data<T>(x), view, n, focal, data<T>(out));
        return;
      }
      const int64_t blocks = ceil_div(n, int64_t(kThreads) * kPacks * Packed<T>::kSize);
      Tensor partial = torch::stable::new_empty(x, {blocks}, ScalarType::Double);
      launch("focal_loss_sum_kernel", focal_loss_sum_kernel<T, kPower, View>, unsigned(blocks),
             kThreads, 0, scope, data<T>(x), view, n, focal, data<double>(partial));
      launch("sum_partials_kernel", sum_partials_kernel<C>, 1, kSumThreads, 0, scope,
             data<double>(partial), blocks, data<C>(out));
    });
  });
  return out;
}

Tensor sigmoid_focal_loss_backward_cuda(const Tensor& grad, const Tensor& inputs,
                                        const Tensor& targets, double alpha, double gamma) {
  check_focal_loss(inputs, targets, "sigmoid_focal_loss_backward");
  check_focal_loss_grad(grad, inputs, "sigmoid_focal_loss_backward");
  const CudaScope scope(inputs);
  const Tensor g = contiguous_aligned(grad), x = contiguous_aligned(inputs),
               t = contiguous_aligned(targets);
  const int64_t n = x.numel();
  Tensor out = torch::stable::empty_like(x);
  if (n == 0) return out;
  dispatch_focal(x, t, "sigmoid_focal_loss_backward", [&](auto zero, const auto view) {
    using T = decltype(zero);
    using C = Compute<T>;
    using View = std::decay_t<decltype(view)>;
    const auto focal = Focal<C>::make(alpha, gamma);
    dispatch_power(focal, [&](auto power) {
      constexpr Power kPower = decltype(power)::value;
      const auto kernel = g.scalar_type() == x.scalar_type()
                              ? focal_loss_backward_kernel<T, T, kPower, View>
                              : focal_loss_backward_kernel<T, C, kPower, View>;
      launch("focal_loss_backward_kernel", kernel, blocks_for<T>(n), kThreads, 0, scope,
             g.const_data_ptr(), g.dim() == 0, data<T>(x), view, n, focal, data<T>(out));
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss_cuda));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward_cuda));
}

}  // namespace retinanet
