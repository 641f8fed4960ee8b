// The focal loss of one pack of logits on CUDA, for both focal losses.
//
// Almost every logit is ordinary: a negative, of ordinary size. A pack is evaluated in two steps,
// so that ordinary logits cost no branch and no look at their target:
//
//   1. one test for the whole pack: does any element need more than the ordinary case? Then all
//      elements, as if they were ordinary.
//   2. if the test says so, a loop over the `odd` elements by the general formula, which replaces
//      their results. An odd element is a positive, or its logit is NaN or large. A sum cannot
//      leave results out again, so it then takes all elements by the general formula.
//
//     pack   | x0 | x1 | x2 | x3 |      odd = 0b0100: x2 is the positive of its anchor
//
// Both steps give the same bits for the same logit, so results do not depend on a logit's
// neighbours. The loss of an anchor with a weight is the exception: the steps multiply in another
// order, so that it may differ by an ulp.
//
// bfloat16 has so few values that those of ordinary size fit into a table in shared memory,
// together with their results. Each block computes the table by the general formula, hence with the
// same bits. With what surrounds it in a loop over packs, a logit then takes 9 to 11 instructions.
#pragma once

#include "common/cuda.h"
#include "focal_loss_cuda_formula.h"

namespace retinanet {

constexpr int kFocalThreads = 256;
// Blocks that a multiprocessor should hold at least, or 0 for no bound. Without a bound, ptxas
// prefers a few spills to a block less in the kernels of double and of any gamma, and in those of
// half types that walk through planes.
template <typename T, Power kPower, bool kRows>
constexpr int kFocalBlocks = kPower != Power::kTwo || std::is_same_v<T, double> ? 2
                             : sizeof(T) == 2 && !kRows                         ? 4
                                                                                : 0;

// Sets `weight` to that of a logit of class k, a positive if `hit`. Returns false if the result is
// 0 whatever the logit is: in a masked row, or because the factor of the class's positives is 0.
template <typename C, typename Index>
__device__ __forceinline__ bool find_weight(const RowTarget<C>& target, const C* pos_weight,
                                            bool hit, Index k, C& weight) {
  weight = target.weight;
  if (target.masked()) return false;
  if (!hit || !pos_weight) return true;
  weight *= pos_weight[k];
  return pos_weight[k] != C(0);
}

// How logits of type T are evaluated: losses or, with kGrad, gradients. Ordinary ones take
// gamma_two_loss and gamma_two_grad where these apply. Otherwise all elements are odd.
// The incoming gradient is a part of the targets' weights if all logits of a block share it.
template <typename T, Power kPower, bool kSoft, bool kGrad_, bool kSharedScale>
struct FormulaPacks {
  using C = Compute<T>;
  using Formula = FocalFormula<C, kPower, kSoft>;
  using Pack = Packed<T>;
  static constexpr int kSize = Pack::kSize;
  static constexpr bool kGrad = kGrad_;
  static constexpr bool kOrdinary = Formula::kFast;  // whether any elements are ordinary
  static constexpr bool kLoadsAhead = false;
  using Constants = GammaTwoConstants<kGrad>;
  // What a block keeps in shared memory.
  struct BlockMemory {
    Constants constants;
  };

  Formula formula;
  const C* pos_weight = nullptr;  // factor of each class's positives, or null
  const BlockMemory* memory = nullptr;
  Constants constants = {};

  // Stores the constants where nvcc cannot know them. It would set constants that it knows again
  // for each pack. All threads must call this function. The caller synchronises the block before it
  // calls ready().
  __device__ __forceinline__ void prepare(C, BlockMemory& to) {
    memory = &to;
    if (kOrdinary && threadIdx.x == 0) to.constants = {};
  }
  // These packs with their constants in registers, for a loop.
  __device__ __forceinline__ FormulaPacks ready() const {
    return {formula, pos_weight, memory, kOrdinary ? memory->constants : Constants{}};
  }
  // The target as the functions below take it. Its weight is 0 in a masked row, whatever the scale.
  __device__ __forceinline__ RowTarget<C> prepared(RowTarget<C> target, C scale) const {
    if (kGrad && kSharedScale) target.weight *= scale;
    if (target.masked()) target.weight = C(0);
    return target;
  }
  // Whether ordinary elements may be evaluated with this scale.
  __device__ __forceinline__ bool accepts(C) const { return true; }

  // The result of any logit x of class k, odd or ordinary. `scale` is the incoming gradient.
  template <typename Index>
  __device__ __forceinline__ C value(const RowTarget<C>& target, Index k, C x, C scale) const {
    const bool hit = target.positive == k;
    C weight;
    if (!find_weight(target, pos_weight, hit, k, weight)) return C(0);
    if constexpr (kGrad) return formula.grad(x, hit, kSharedScale ? weight : weight * scale);
    return weight * formula.loss(x, hit);
  }

  // Whether any element is odd because of its logit, and which, as bits.
  __device__ __forceinline__ bool any_odd(const Pack& x) const {
    bool odd = false;
#pragma unroll
    for (int j = 0; j < kSize; ++j) odd |= !is_ordinary(C(x.v[j]));
    return odd;
  }
  __device__ __forceinline__ unsigned odd_bits(const Pack& x) const {
    unsigned odd = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) odd |= is_ordinary(C(x.v[j])) ? 0u : 1u << j;
    return odd;
  }

  // What the results of a row's ordinary logits are multiplied by.
  __device__ __forceinline__ C factor(const RowTarget<C>& target, C scale) const {
    if constexpr (!kGrad) return target.weight * (formula.focal.negative * Formula::kLossUnit);
    const C unit = formula.focal.negative * Formula::kGradUnit;
    if constexpr (kSharedScale) return target.weight * unit;
    return target.masked() ? C(0) : target.weight * scale * unit;
  }
  // The result of the j-th element if it is ordinary, else anything.
  __device__ __forceinline__ C ordinary(const Pack& x, int j, C factor) const {
    if constexpr (!kOrdinary) {
      return C(0);
    } else if constexpr (kGrad) {
      return gamma_two_grad(float(x.v[j]), float(factor), constants);
    } else {
      return factor * gamma_two_loss(float(x.v[j]), constants);
    }
  }
  // The same added to `sum`, for losses.
  __device__ __forceinline__ C add_ordinary(const Pack& x, int j, C factor, C sum) const {
    if constexpr (!kOrdinary) return sum;
    return std::fma(factor, C(gamma_two_loss(float(x.v[j]), constants)), sum);
  }
};

// The same for bfloat16 by table, which holds the results of negatives x with 2^-10 <= |x| < 64.
// The gradients in it are multiplied by `scale`, so all logits of a block must share one.
template <Power kPower, bool kSoft, bool kGrad_>
struct TablePacks {
  using T = c10::BFloat16;
  using C = float;
  using Formula = FocalFormula<C, kPower, kSoft>;
  using Pack = Packed<uint32_t>;  // of two elements each
  static constexpr int kSize = Packed<T>::kSize;
  static constexpr bool kGrad = kGrad_;
  static constexpr bool kOrdinary = true;
  // The table has 16 binades of 128 numbers: first the positive x, then the negative ones. A
  // number's place within its half is the low 11 bits of its own bits, which differ for all of
  // them.
  static constexpr uint32_t kHalf = 2048, kLowest = (127 - 10) << 7;
  // Whether a thread loads its next pack before it evaluates one. With a table, memory is the
  // limit.
  static constexpr bool kLoadsAhead = true;
  static constexpr uint32_t kBoth = 0x10001u;  // copies 16 bits to both halves of a word
  static constexpr uint32_t kPlaces = (kHalf - 1) * kBoth;
  static_assert(sizeof(C) == 4);  // as the shifts in `offsets` assume

  // What a block keeps in shared memory.
  struct BlockMemory {
    C table[2 * kHalf];
  };

  Formula formula;
  const C* pos_weight = nullptr;  // factor of each class's positives, or null
  const float* table = nullptr;

  // Fills the table. All threads must call this function. The caller synchronises the block before
  // it calls ready().
  __device__ __forceinline__ void prepare(C scale, BlockMemory& to) {
    table = to.table;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < 2 * kHalf; i += kFocalThreads) {
      const C x = std::bit_cast<C>((kLowest + (i - kLowest) % kHalf) << 16);
      to.table[i] = result(flipped(x, i >= kHalf), false, scale);
    }
  }
  __device__ __forceinline__ const TablePacks& ready() const { return *this; }
  __device__ __forceinline__ RowTarget<C> prepared(RowTarget<C> target, C) const {
    if (target.masked()) target.weight = C(0);
    return target;
  }
  // A masked row takes 0 times an entry, so the entries must be finite.
  __device__ __forceinline__ bool accepts(C scale) const {
    return std::abs(scale) <= std::numeric_limits<C>::max();
  }

  template <typename Index>
  __device__ __forceinline__ C value(const RowTarget<C>& target, Index k, C x, C scale) const {
    const bool hit = target.positive == k;
    C weight;
    if (!find_weight(target, pos_weight, hit, k, weight)) return C(0);
    return weight * result(x, hit, scale);
  }

  __device__ __forceinline__ bool any_odd(const Pack& x) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < Pack::kSize; ++i) bits |= above_lowest(x.v[i]);
    return (bits & ~kPlaces) != 0;
  }
  // If one element of a word is odd, the other one counts as odd as well.
  __device__ __forceinline__ unsigned odd_bits(const Pack& x) const {
    unsigned odd = 0;
#pragma unroll
    for (int i = 0; i < Pack::kSize; ++i)
      odd |= (above_lowest(x.v[i]) & ~kPlaces) != 0 ? 3u << 2 * i : 0u;
    return odd;
  }

  __device__ __forceinline__ C factor(const RowTarget<C>& target, C) const { return target.weight; }
  __device__ __forceinline__ C ordinary(const Pack& x, int j, C factor) const {
    return factor * entry(x, j);
  }
  __device__ __forceinline__ C add_ordinary(const Pack& x, int j, C factor, C sum) const {
    return std::fma(factor, entry(x, j), sum);
  }

 private:
  __device__ __forceinline__ C result(C x, bool hit, C scale) const {
    if constexpr (kGrad) return formula.grad(x, hit, scale);
    return formula.loss(x, hit);
  }
  // The entry of the j-th element.
  __device__ __forceinline__ C entry(const Pack& x, int j) const {
    // For both elements of the word, the offset of the entry in bytes. The sign selects the half.
    const uint32_t word = x.v[j / 2];
    const uint32_t offsets = (word << 2 & 4 * kPlaces) | (word >> 2 & 4 * kHalf * kBoth);
    // nvcc computes `offsets` once for both elements only if no shift follows.
    const uint32_t offset = __byte_perm(offsets, 0, j % 2 == 0 ? 0x4410 : 0x4432);
    return *reinterpret_cast<const C*>(reinterpret_cast<const char*>(table) + offset);
  }
  // For both elements of a word, by how much its bits exceed those of the lowest number in the
  // table. If an element is not in the table, the bits above its place are not all 0 in the result
  // for that element. The other one may then be wrong as well.
  static __device__ __forceinline__ uint32_t above_lowest(uint32_t word) {
    return (word & 0x7fffu * kBoth) - kLowest * kBoth;
  }
};

// TablePacks if the logits of a block share one scale and are bfloat16, else FormulaPacks.
template <typename T, Power kPower, bool kSoft, bool kGrad, bool kSharedScale = true>
using FocalPacks = std::conditional_t<kSharedScale && std::is_same_v<T, c10::BFloat16>,
                                      TablePacks<kPower, kSoft, kGrad>,
                                      FormulaPacks<T, kPower, kSoft, kGrad, kSharedScale>>;

// The number of tiles that a block takes, of `tiles` in all. A block takes several, because each
// block has a sum to add and maybe a table to compute. It leaves enough blocks to keep a GPU busy.
template <typename T>
int tiles_per_block(int64_t tiles) {
  constexpr int64_t kBlocks = 1792, kMost = std::is_same_v<T, c10::BFloat16> ? 8 : 4;
  return int(std::clamp<int64_t>(tiles / kBlocks, 1, kMost));
}

// The bits of the elements [begin, end) of a pack.
HOST_DEVICE unsigned bits_of(int begin, int end) { return (1u << end) - (1u << begin); }

// The values of a pack's elements, in the compute type.
template <typename T>
struct PackValues {
  using C = Compute<T>;
  static constexpr int kSize = Packed<T>::kSize;
  C v[kSize];

  __device__ __forceinline__ void store(T* __restrict__ out) const {
    Packed<T> pack;
#pragma unroll
    for (int j = 0; j < kSize; ++j) pack.v[j] = T(v[j]);
    stream_packed(out, pack);
  }
  __device__ __forceinline__ void store_inside(T* __restrict__ out, unsigned inside) const {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (inside >> j & 1u) out[j] = T(v[j]);
    }
  }
};

// The pack at x, loaded with one 128-bit access.
template <typename Packs, typename T>
__device__ __forceinline__ typename Packs::Pack load_whole(const T* __restrict__ x) {
  return *reinterpret_cast<const typename Packs::Pack*>(x);
}

// The same pack, of which only the elements in `inside` exist, which has a bit for each element.
// Ordinary numbers stand for the others.
template <typename Packs, typename T>
__device__ __forceinline__ typename Packs::Pack load_inside(const T* __restrict__ x,
                                                            unsigned inside) {
  Packed<T> elements;
#pragma unroll
  for (int j = 0; j < Packs::kSize; ++j) elements.v[j] = inside >> j & 1u ? x[j] : T(-1.f);
  typename Packs::Pack pack;
  std::memcpy(&pack, &elements, sizeof(pack));
  return pack;
}

// Step 1 for a whole pack. factor(j) is the factor of the j-th element's row. value(j, x) is its
// result by the general formula, which replaces step 2 if no elements are ordinary.
template <typename T, typename Packs, typename Factor, typename Value>
__device__ __forceinline__ PackValues<T> evaluate_whole(const Packs& packs,
                                                        const typename Packs::Pack& x,
                                                        Factor&& factor, Value&& value) {
  PackValues<T> values;
#pragma unroll
  for (int j = 0; j < Packs::kSize; ++j) {
    if constexpr (Packs::kOrdinary) {
      values.v[j] = packs.ordinary(x, j, factor(j));
    } else {
      values.v[j] = value(j, Compute<T>(x.v[j]));
    }
  }
  return values;
}

// The same for losses that are only added. A pack is short enough to be summed in the compute type.
template <typename Packs, typename Factor, typename Value>
__device__ __forceinline__ typename Packs::C sum_whole(const Packs& packs,
                                                       const typename Packs::Pack& x,
                                                       Factor&& factor, Value&& value) {
  typename Packs::C sum = 0;
#pragma unroll
  for (int j = 0; j < Packs::kSize; ++j) {
    if constexpr (Packs::kOrdinary) {
      sum = packs.add_ordinary(x, j, factor(j), sum);
    } else {
      sum += value(j, typename Packs::C(x.v[j]));
    }
  }
  return sum;
}

// Step 2. x and out point to the first element of the pack, and `odd` has a bit for each element to
// evaluate. Returns the sum of their results or, with kStores, stores them.
template <bool kStores, typename T, typename Value>
__device__ __forceinline__ Compute<T> evaluate_odd(const T* __restrict__ x, unsigned odd,
                                                   T* __restrict__ out, Value&& value) {
  using C = Compute<T>;
  C sum = 0;
#pragma unroll 1
  for (; odd != 0; odd &= odd - 1) {
    const int j = __ffs(int(odd)) - 1;
    const C result = value(j, C(x[j]));
    if constexpr (kStores) {
      out[j] = T(result);
    } else {
      sum += result;
    }
  }
  return sum;
}

}  // namespace retinanet
