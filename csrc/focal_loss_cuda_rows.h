// A tile of rows of the focal losses on CUDA: consecutive rows of K logits, which form one span in
// memory.
//
//   memory   |  pack  |  pack  |  pack  |  pack  |  pack  |  pack  |
//   span         [== row 0 ==|== row 1 ==|== row 2 ==|== row 3 ==]
//            |---| lead
//
// A thread takes every 256th pack, and carries its row and class along without a division. A pack
// that crosses the end of a row is still evaluated as a whole if both rows have the same weight.
// The first and the last pack may reach outside the span, and are then accessed element by element.
// Targets are read once per row, into shared memory.
#pragma once

#include "focal_loss_cuda_pack.h"

namespace retinanet {

// The incoming gradient of a tile's logits: one number, or one per logit of the span.
template <typename T, bool kEach>
struct IncomingGrad {
  using C = Compute<T>;
  C shared;
  const T* each;
  Packed<T> pack;

  // Loads the gradients of the pack that starts at the p-th logit of the span.
  __device__ __forceinline__ void load(int p) {
    if constexpr (kEach) pack = load_packed(each + p);
  }
  // Returns the value of the j-th element of the loaded pack.
  __device__ __forceinline__ C of_element(int j) const {
    if constexpr (kEach) return C(pack.v[j]);
    return shared;
  }
  __device__ __forceinline__ C of_logit(int e) const {
    if constexpr (kEach) return C(each[e]);
    return shared;
  }
};

// The value of the warp's first lane, which is that of all lanes.
template <typename P>
__device__ __forceinline__ P* from_lane_0(P* pointer) {
  return reinterpret_cast<P*>(__shfl_sync(kFullMask, reinterpret_cast<uintptr_t>(pointer), 0));
}

// Evaluates the logits x[0 .. size), of which the first is class `first_class` of the first row
// whose target is given. Returns the sum of the results or, with kStores, stores them at `out`,
// which has the same alignment as x. All threads of the block call it.
template <bool kStores, typename Packs, typename T, bool kEach>
__device__ __forceinline__ double evaluate_rows(const Packs& packs, const T* __restrict__ x,
                                                T* __restrict__ out, int size, int first_class,
                                                int num_classes,
                                                const RowTarget<Compute<T>>* targets,
                                                IncomingGrad<T, kEach> grad) {
  using C = Compute<T>;
  constexpr int kSize = Packed<T>::kSize, kStep = kFocalThreads * kSize;
  // The whole packs of the span, which are aligned in memory, are the logits from `begin` to `end`.
  // If a pack could belong to more than two rows, none is taken as a whole.
  const bool usable = !Packs::kOrdinary || (num_classes >= kSize && packs.accepts(grad.shared));
  const int lead = int(reinterpret_cast<uintptr_t>(x) / sizeof(T) % kSize);
  const int begin = usable && (kSize - lead) % kSize < size ? (kSize - lead) % kSize : size;
  const int end = begin + (size - begin) / kSize * kSize;
  double sum = 0;
  // The logits outside whole packs, one per thread and step.
#pragma unroll 1
  for (int t = threadIdx.x; t < size - (end - begin); t += kFocalThreads) {
    const int e = t < begin ? t : end + (t - begin);
    const unsigned place = unsigned(first_class) + unsigned(e);
    const unsigned row = place / unsigned(num_classes);
    const C result = packs.value(targets[row], int(place - row * unsigned(num_classes)), C(x[e]),
                                 grad.of_logit(e));
    if constexpr (kStores) {
      out[e] = T(result);
    } else {
      sum += result;
    }
  }

  // The whole packs. Element p of the span, where this thread's pack starts, is class `its_class`
  // of the row of `its_target`. The next pack is `rows_ahead` rows and `classes_ahead` classes
  // further on. nvcc would compute constant values again for each pack, if they did not come from
  // another thread.
  T* const its_out = from_lane_0(out);
  const int rows_ahead = __shfl_sync(kFullMask, kStep / num_classes, 0);
  const int classes_ahead = __shfl_sync(kFullMask, kStep % num_classes, 0);
  const int last_whole = __shfl_sync(kFullMask, num_classes - kSize, 0);
  int p = begin + int(threadIdx.x) * kSize;
  const unsigned from_first_row = unsigned(first_class) + unsigned(p);
  const T* its_x = x + p;
  const RowTarget<C>* its_target = targets + from_first_row / unsigned(num_classes);
  int its_class = int(from_first_row % unsigned(num_classes));
  typename Packs::Pack ahead;
  if (Packs::kLoadsAhead && p < end) ahead = load_whole<Packs>(its_x);
#pragma unroll 1
  for (; p < end; p += kStep) {
    // The result of the j-th element by the general formula.
    const auto value = [&](int j, C v, C scale) {
      const RowTarget<C>* target = its_target;
      int k = its_class + j;
      for (; k >= num_classes; k -= num_classes) ++target;
      return packs.value(*target, k, v, scale);
    };
    const typename Packs::Pack pack = Packs::kLoadsAhead ? ahead : load_whole<Packs>(its_x);
    if (Packs::kLoadsAhead && p + kStep < end) ahead = load_whole<Packs>(its_x + kStep);
    grad.load(p);
    const RowTarget<C> target = *its_target;
    const auto factor = [&](int j) { return packs.factor(target, grad.of_element(j)); };
    const auto general = [&](int j, C v) { return value(j, v, grad.of_element(j)); };
    C pack_sum = 0;
    if constexpr (kStores) {
      evaluate_whole<T>(packs, pack, factor, general).store(its_out + p);
    } else {
      pack_sum = sum_whole(packs, pack, factor, general);
    }
    if constexpr (Packs::kOrdinary) {
      // Find odd elements: all logits that are not ordinary, and the positive of the row. Its place
      // in the pack is at least kSize if it lies elsewhere.
      const unsigned place = unsigned(target.positive) - unsigned(its_class);
      const bool crosses = its_class > last_whole;
      if (packs.any_odd(pack) || place < unsigned(kSize) || crosses) {
        unsigned odd = packs.odd_bits(pack) | (place < unsigned(kSize) ? 1u << place : 0u);
        // The same for the next row, if the pack is a part of it. All its elements are odd if the
        // row has another weight.
        if (crosses) {
          const RowTarget<C> next = its_target[1];
          const auto left = unsigned(num_classes - its_class);
          const unsigned next_place = next.positive < 0 ? kSize : unsigned(next.positive) + left;
          if (next_place < unsigned(kSize)) odd |= 1u << next_place;
          if (next.weight != target.weight || next.masked() != target.masked())
            odd |= bits_of(int(left), kSize);
        }
        // A sum cannot leave out the odd elements again, so it takes all by the general formula.
        if (odd != 0)
          pack_sum =
              evaluate_odd<kStores>(x + p, kStores ? odd : bits_of(0, kSize), out + p,
                                    [&](int j, C v) { return value(j, v, grad.of_logit(p + j)); });
      }
    }
    if constexpr (!kStores) sum += pack_sum;
    its_x += kStep;
    // Without a branch or a selection, which would take more instructions.
    const unsigned next_class = unsigned(its_class) + unsigned(classes_ahead);
    const unsigned wrapped = next_class - unsigned(num_classes);
    its_target += rows_ahead + 1 + (int(wrapped) >> 31);
    its_class = int(min(next_class, wrapped));
  }
  return sum;
}

}  // namespace retinanet
