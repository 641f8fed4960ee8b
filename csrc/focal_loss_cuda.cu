// Sigmoid focal loss on CUDA.
//
// Work: a thread handles one pack, 16 bytes of consecutive logits (2 to 8 of them), per step.
//
//   logits   | pack 0 | pack 1 |  ...  | pack 255 | pack 256 | pack 257 |  ...   | tail |
//   thread       0        1                255          0          1
//            |<-------- step 0 of a block ------->|<-------- step 1 ---- ...
//
//   elementwise   a tile is one step. Blocks take further tiles if the grid is too small for all.
//   sum           a tile is kSteps (16) consecutive steps, whatever the GPU.
//   tail          the last pack may be incomplete. It is then accessed element by element.
//
// Bytes moved per element: the forward pass reads the logit and, unless it sums, writes the loss.
// The backward pass reads the logit (and the incoming gradient unless it is one number) and writes
// the gradient. Both read an elementwise target, also in packs of 16 bytes. A class label is read
// once per pack and at each end of a row inside the pack, and stays in the cache. Deterministic:
// there are no atomics. Each thread adds its packs in order, a block adds its threads by shuffles,
// and a second kernel adds the tiles. All but the sum within a pack is in float64.
#include "common/cuda.h"
#include "common/partial_sums.h"
#include "focal_loss.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;
constexpr int kSteps = 16;  // steps of a tile of the summing kernel, one pack per thread each

// Elements [begin, begin + kSize) of x[0 .. n): one 128-bit access if all of them exist.
template <typename T>
__device__ __forceinline__ Packed<T> load_pack(const T* __restrict__ x, int64_t begin, int64_t n) {
  if (begin + Packed<T>::kSize <= n) return load_packed(x + begin);
  Packed<T> pack;
#pragma unroll
  for (int j = 0; j < Packed<T>::kSize; ++j) {
    if (begin + j < n) pack.v[j] = x[begin + j];
  }
  return pack;
}

template <typename T>
__device__ __forceinline__ void store_pack(T* __restrict__ out, const Packed<T>& pack,
                                           int64_t begin, int64_t n) {
  if (begin + Packed<T>::kSize <= n) return stream_packed(out + begin, pack);
#pragma unroll
  for (int j = 0; j < Packed<T>::kSize; ++j) {
    if (begin + j < n) out[begin + j] = pack.v[j];
  }
}

// The targets of one pack, which give the losses and gradients of its elements. The caller visits
// the elements in order and calls advance() between two of them.
template <Power kPower, typename C, int kSize, typename View>
struct PackTargets;

// Class labels: the target is that of the current element's row.
template <Power kPower, typename C, int kSize, typename Label>
struct PackTargets<kPower, C, kSize, ClassTargets<C, Label>> {
  ClassTargets<C, Label> view;
  int64_t row, k;  // of the current element
  RowTarget<C> target;

  __device__ __forceinline__ PackTargets(const ClassTargets<C, Label>& targets, int64_t begin,
                                         int64_t)
      : view(targets), row(begin / targets.num_classes), k(begin - row * targets.num_classes) {
    target = view.row(row);
  }
  __device__ __forceinline__ C loss(const Focal<C>& focal, C x, int) const {
    if (target.masked()) return C(0);
    const C e = exp_minus<DeviceArithmetic>(std::abs(x));
    return target.weight *
           focal.template loss<kPower, DeviceArithmetic>(x, e, k == target.positive);
  }
  __device__ __forceinline__ C grad(const Focal<C>& focal, C x, int, C scale) const {
    if (target.masked()) return C(0);
    const C e = exp_minus<DeviceArithmetic>(std::abs(x));
    return focal.template grad<kPower, DeviceArithmetic>(x, e, k == target.positive,
                                                         scale * target.weight);
  }
  // At the end of a row, reads the label of the next row. Call it only if another element follows.
  __device__ __forceinline__ void advance() {
    if (++k < view.num_classes) return;
    k = 0;
    target = view.row(++row);
  }
};

// Elementwise targets: loaded in packs like the logits. Targets of 0 and 1 take the same formula as
// class labels, so that both give the same results.
template <Power kPower, typename C, int kSize, typename Target>
struct PackTargets<kPower, C, kSize, ElementTargets<Target>> {
  static constexpr int kPart = Packed<Target>::kSize;
  // Several packs if Target is wider than the logits.
  Packed<Target> parts[kSize / kPart];

  __device__ __forceinline__ PackTargets(const ElementTargets<Target>& view, int64_t begin,
                                         int64_t n) {
#pragma unroll
    for (int i = 0; i < kSize / kPart; ++i) parts[i] = load_pack(view.data, begin + i * kPart, n);
  }
  __device__ __forceinline__ C at(int j) const { return C(parts[j / kPart].v[j % kPart]); }
  __device__ __forceinline__ C loss(const Focal<C>& focal, C x, int j) const {
    const C t = at(j), e = exp_minus<DeviceArithmetic>(std::abs(x));
    if (t == C(0) || t == C(1))
      return focal.template loss<kPower, DeviceArithmetic>(x, e, t == C(1));
    return focal.template soft_loss<kPower, DeviceArithmetic>(x, e, t);
  }
  __device__ __forceinline__ C grad(const Focal<C>& focal, C x, int j, C scale) const {
    const C t = at(j), e = exp_minus<DeviceArithmetic>(std::abs(x));
    if (t == C(0) || t == C(1))
      return focal.template grad<kPower, DeviceArithmetic>(x, e, t == C(1), scale);
    return focal.template soft_grad<kPower, DeviceArithmetic>(x, e, t, scale);
  }
  __device__ __forceinline__ void advance() {}
};

// Calls f(j, x, targets) for the elements of the pack that starts at `begin`.
template <Power kPower, typename T, typename View, typename F>
__device__ __forceinline__ void for_pack(const T* __restrict__ x, const View& view, int64_t begin,
                                         int64_t n, F&& f) {
  constexpr int kSize = Packed<T>::kSize;
  const Packed<T> pack = load_pack(x, begin, n);
  const int size = begin + kSize <= n ? kSize : int(n - begin);
  PackTargets<kPower, Compute<T>, kSize, View> targets(view, begin, n);
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    if (j >= size) break;
    f(j, Compute<T>(pack.v[j]), targets);
    if (j + 1 < size) targets.advance();
  }
}

// out[i] = loss of x[i].
// 128-bit accesses: 1 load, 1 store
// 128-bit loops: loads and stores
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

// partial[blockIdx.x] = sum of the losses of the block's tile.
// 128-bit accesses: 1 load, 0 stores
// 128-bit loops: loads
template <typename T, Power kPower, typename View>
__global__ void __launch_bounds__(kThreads)
    focal_loss_sum_kernel(const T* __restrict__ x, View view, int64_t n, Focal<Compute<T>> focal,
                          double* __restrict__ partial) {
  constexpr int kSize = Packed<T>::kSize;
  const int64_t first = int64_t(blockIdx.x) * kThreads * kSteps * kSize;
  double sum = 0;
  for (int p = 0; p < kSteps; ++p) {
    const int64_t begin = first + (int64_t(p) * kThreads + threadIdx.x) * kSize;
    if (begin >= n) continue;
    // A pack is short enough to be summed in the compute type.
    Compute<T> pack = 0;
    for_pack<kPower>(x, view, begin, n, [&](int j, Compute<T> v, const auto& targets) {
      pack += targets.loss(focal, v, j);
    });
    sum += pack;
  }
  const double total = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// out[i] = gradient of x[i]. If `shared`, `grad` is one value of type G for all elements. Otherwise
// it has one value of type T per element.
// 128-bit accesses: 2 loads, 1 store
// 128-bit loops: loads and stores
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

// The number of blocks for one pack per thread, limited by the size of a grid.
template <typename T>
unsigned blocks_for(int64_t n) {
  return unsigned(
      std::min<int64_t>(ceil_div(n, kThreads * Packed<T>::kSize), (int64_t(1) << 31) - 1));
}

// Calls f with a Power as a compile-time constant. Gamma 2 has its own kernels, and every other
// gamma shares the kernels of kAny.
template <typename C, typename F>
void dispatch_power(const Focal<C>& focal, F&& f) {
  if (focal.power() == Power::kTwo) return f(std::integral_constant<Power, Power::kTwo>{});
  return f(std::integral_constant<Power, Power::kAny>{});
}

Tensor sigmoid_focal_loss_cuda(const Tensor& inputs, const Tensor& targets, double alpha,
                               double gamma, bool reduce) {
  check_focal_loss(inputs, targets, "sigmoid_focal_loss");
  const CudaScope scope("sigmoid_focal_loss", inputs, targets);
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
      const int64_t blocks = ceil_div(n, int64_t(kThreads) * kSteps * Packed<T>::kSize);
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
  const CudaScope scope("sigmoid_focal_loss_backward", inputs, grad, targets);
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
