// A tile of a contiguous level of dense_focal_loss on CUDA: neighbouring cells of one anchor slot
// (the a-th anchor of each cell), in all of the slot's K planes.
//
//   plane 0      |.[pack|pack| ... |pack]....      A thread owns a column of packs: the same cells
//   in plane 1      ..|[pack|pack| ... |pack]...      every kSize-th plane. Their planes start at
//   the plane 2      |.[pack|pack| ... |pack]....      same place within a pack (`lead`), whatever
//   the
//   ...                                            number of cells.
//   plane K-1    ..|[pack|pack| ... |pack]...
//
// A tile takes the same packs of each plane, so its cells may differ between planes by less than a
// pack. A thread keeps the factors of its cells in registers, and the next class that is positive
// in one of them, so that a pack without positives costs one comparison. Packs that reach outside
// their plane are accessed element by element.
#pragma once

#include "focal_loss_cuda_pack.h"

namespace retinanet {

constexpr int kTileCells = 256;  // cells of a tile in one plane

// The number of tiles of one anchor slot's planes. An image's first plane starts at any element.
template <typename T>
HOST_DEVICE int64_t tiles_of_planes(int64_t area) {
  constexpr int kSize = Packed<T>::kSize;
  return ceil_div(area % kSize == 0 ? area : area + kSize - 1, kTileCells);
}

// The cells whose targets a tile may need: from `first` on, which may be negative. They are kept in
// shared memory.
template <typename T>
struct TileCells {
  static constexpr int kBefore = Packed<T>::kSize - 1;  // cells that the lead of a plane adds
  static constexpr int kCount = kTileCells + kBefore;
  int64_t first;

  __device__ __forceinline__ explicit TileCells(int64_t tile)
      : first(tile * kTileCells - kBefore) {}
};

// Evaluates a tile. x and out point to the slot's first plane, which is `offset` elements after a
// multiple of 16 bytes. targets[c - cells.first] is the target of cell c. Returns the sum of the
// results or, with kStores, stores them.
template <bool kStores, typename Packs, typename T>
__device__ __forceinline__ double evaluate_planes(const Packs& packs, const T* __restrict__ x,
                                                  T* __restrict__ out, int64_t offset, int64_t area,
                                                  int num_classes, TileCells<T> cells,
                                                  const RowTarget<Compute<T>>* targets,
                                                  Compute<T> scale) {
  using C = Compute<T>;
  constexpr int kSize = Packed<T>::kSize, kColumns = kTileCells / kSize;
  static_assert(kFocalThreads == kColumns * kSize, "a thread takes every kSize-th plane");
  const int first_class = int(threadIdx.x) / kColumns;
  const int lead = int((offset + first_class * area) % kSize);
  // The cells of this thread, as an index into `targets` and as a number.
  const int its_cells = int(threadIdx.x) % kColumns * kSize - lead + TileCells<T>::kBefore;
  const RowTarget<C>* const its_targets = targets + its_cells;
  const int64_t cell = cells.first + its_cells;
  if (cell <= -kSize || cell >= area) return 0;
  // The elements of a pack that are cells of the plane, as bits.
  const unsigned inside =
      bits_of(cell < 0 ? int(-cell) : 0, area - cell < kSize ? int(area - cell) : kSize);
  const bool whole = inside == bits_of(0, kSize) && packs.accepts(scale);

  x += first_class * area + cell;
  if constexpr (kStores) out += first_class * area + cell;
  const int64_t step = kSize * area;
  double sum = 0;
  if (!whole) {
    for (int k = first_class; k < num_classes; k += kSize) {
      sum += evaluate_odd<kStores>(
          x, inside, out, [&](int j, C v) { return packs.value(its_targets[j], k, v, scale); });
      x += step;
      if constexpr (kStores) out += step;
    }
    return sum;
  }

  C factors[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) factors[j] = packs.factor(its_targets[j], scale);
  // The first class from k on that is positive in one of the cells, among the thread's classes.
  const auto next_positive = [&](int k) {
    int next = num_classes;
#pragma unroll 1
    for (int j = 0; j < kSize; ++j) {
      const int positive = int(its_targets[j].positive);
      if (positive >= k && positive < next && (positive - first_class) % kSize == 0)
        next = positive;
    }
    return next;
  };
  int next = Packs::kOrdinary ? next_positive(first_class) : num_classes;
  Packed<T> ahead;
  if (Packs::kLoadsAhead && first_class < num_classes) ahead = load_packed(x);
#pragma unroll 1
  for (int k = first_class; k < num_classes; k += kSize) {
    const auto value = [&](int j, C v) { return packs.value(its_targets[j], k, v, scale); };
    const Packed<T> pack = Packs::kLoadsAhead ? ahead : load_packed(x);
    if (Packs::kLoadsAhead && k + kSize < num_classes) ahead = load_packed(x + step);
    const bool any_odd = Packs::kOrdinary && (packs.any_odd(pack) || k == next);
    const PackValues<T> values =
        evaluate_whole(packs, pack, [&](int j) { return factors[j]; }, value);
    C pack_sum = 0;  // a pack is short enough to be summed in the compute type
    if constexpr (kStores) {
      values.store(out);
    } else {
      pack_sum = values.sum();
    }
    if (any_odd) {
      unsigned odd = packs.odd_bits(pack);
      if (k == next) {
#pragma unroll 1
        for (int j = 0; j < kSize; ++j) odd |= its_targets[j].positive == k ? 1u << j : 0u;
        next = next_positive(k + 1);
      }
      const C odd_sum = evaluate_odd<kStores>(x, odd, out, value);
      pack_sum = values.sum(odd) + odd_sum;
    }
    if constexpr (!kStores) sum += pack_sum;
    x += step;
    if constexpr (kStores) out += step;
  }
  return sum;
}

}  // namespace retinanet
