// The focal loss of packs of logits on CUDA: what both focal ops have in common there.  A pack is
// what one thread loads at once, 16 bytes of consecutive logits.
#pragma once

#include "common/cuda.h"
#include "common/partial_sums.h"
#include "focal_loss.h"

namespace retinanet {

using M = BaselineArithmetic;

constexpr int kThreads = 256;

// The elements begin .. begin + kSize - 1 that lie below n, with one 128-bit access where all do.
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
  if (begin + Packed<T>::kSize <= n) return store_packed(out + begin, pack);
#pragma unroll
  for (int j = 0; j < Packed<T>::kSize; ++j) {
    if (begin + j < n) out[begin + j] = pack.v[j];
  }
}

// Losses and gradients of the elements of one pack, visited in order.
template <Power kPower, typename C, int kSize, typename View>
struct PackTargets;

// A row's class id is read as the row comes.
template <Power kPower, typename C, int kSize, typename Label>
struct PackTargets<kPower, C, kSize, ClassTargets<C, Label>> {
  ClassTargets<C, Label> view;
  int64_t row, k;
  RowTarget<C> target;

  __device__ __forceinline__ PackTargets(const ClassTargets<C, Label>& targets, int64_t begin,
                                         int64_t)
      : view(targets), row(begin / targets.num_classes), k(begin - row * targets.num_classes) {
    target = view.row(row);
  }
  __device__ __forceinline__ C loss(const Focal<C>& focal, C x, int) const {
    if (target.dead) return C(0);
    const C e = exp_minus<M>(std::abs(x));
    return target.weight * focal.template loss<kPower, M>(x, e, k == target.positive);
  }
  __device__ __forceinline__ C grad(const Focal<C>& focal, C x, int, C scale) const {
    if (target.dead) return C(0);
    const C e = exp_minus<M>(std::abs(x));
    return focal.template grad<kPower, M>(x, e, k == target.positive, scale * target.weight);
  }
  // Only valid while another element follows: it may read the next row's label.
  __device__ __forceinline__ void advance() {
    if (++k < view.num_classes) return;
    k = 0;
    target = view.row(++row);
  }
};

// Dense ones are read like the logits; 0 and 1 have the same results as class ids.
template <Power kPower, typename C, int kSize, typename Target>
struct PackTargets<kPower, C, kSize, DenseTargets<Target>> {
  static constexpr int kPart = Packed<Target>::kSize;
  Packed<Target> parts[kSize / kPart];

  __device__ __forceinline__ PackTargets(const DenseTargets<Target>& view, int64_t begin,
                                         int64_t n) {
#pragma unroll
    for (int i = 0; i < kSize / kPart; ++i) parts[i] = load_pack(view.data, begin + i * kPart, n);
  }
  __device__ __forceinline__ C at(int j) const { return C(parts[j / kPart].v[j % kPart]); }
  __device__ __forceinline__ C loss(const Focal<C>& focal, C x, int j) const {
    const C t = at(j), e = exp_minus<M>(std::abs(x));
    if (t == C(0) || t == C(1)) return focal.template loss<kPower, M>(x, e, t == C(1));
    return focal.template soft_loss<kPower, M>(x, e, t);
  }
  __device__ __forceinline__ C grad(const Focal<C>& focal, C x, int j, C scale) const {
    const C t = at(j), e = exp_minus<M>(std::abs(x));
    if (t == C(0) || t == C(1)) return focal.template grad<kPower, M>(x, e, t == C(1), scale);
    return focal.template soft_grad<kPower, M>(x, e, t, scale);
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

// Calls f with the constant for gamma 2, which has kernels of its own, or any other gamma.
template <typename C, typename F>
void dispatch_power(const Focal<C>& focal, F&& f) {
  if (focal.power() == Power::kTwo) return f(std::integral_constant<Power, Power::kTwo>{});
  return f(std::integral_constant<Power, Power::kAny>{});
}

}  // namespace retinanet
