// A tile of a contiguous level of dense_focal_loss on CUDA: neighbouring cells of one anchor slot
// (the a-th anchor of each cell), in all of the slot's K planes.
//
//   plane 0      |.[pack|pack| ... |pack]....
//   plane 1      ..|[pack|pack| ... |pack]...
//   plane 2      |.[pack|pack| ... |pack]....
//   ...
//   plane K-1    ..|[pack|pack| ... |pack]...
//
// A thread owns a column of packs: the same cells in every kSize-th plane. These planes start at
// the same place within a pack (`lead`), whatever the number of cells.
//
// A tile takes the same packs of each plane, so its cells may differ between planes by less than a
// pack. A thread keeps the factors of its cells in registers, and the next class that is positive
// in one of them, so that a pack without positives costs one comparison. A pack that reaches
// outside its plane is loaded and stored element by element, and evaluated like the others.
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

// The logits that a thread evaluates: a pack in every kSize-th plane, from class `first` on.
template <typename T>
struct Column {
  const T* x;  // the pack in the first plane
  T* out;
  int area;  // elements of a plane
  int first, num_classes;
  const RowTarget<Compute<T>>* targets;  // those of the pack's cells
  unsigned inside;                       // the elements that are cells of the plane, as bits

  // Elements from one pack to the next.
  __device__ __forceinline__ int64_t step() const { return int64_t(area) * Packed<T>::kSize; }

  // The elements whose positive class is k, as bits.
  __device__ __forceinline__ unsigned positives(int k) const {
    unsigned bits = 0;
#pragma unroll 1
    for (unsigned left = inside; left != 0; left &= left - 1) {
      const int j = __ffs(int(left)) - 1;
      if (targets[j].positive == k) bits |= 1u << j;
    }
    return bits;
  }

  // The first class from k on that is positive in one of the cells, among the thread's classes.
  __device__ __forceinline__ int next_positive(int k) const {
    int next = num_classes;
#pragma unroll 1
    for (unsigned left = inside; left != 0; left &= left - 1) {
      const int positive = int(targets[__ffs(int(left)) - 1].positive);
      if (positive >= k && positive < next && (positive - first) % Packed<T>::kSize == 0)
        next = positive;
    }
    return next;
  }
};

// Evaluates a column. With kWhole all its packs may be loaded as a whole, though only the elements
// in `column.inside` count. Returns the sum of the results or, with kStores, stores them.
template <bool kStores, bool kWhole, typename Packs, typename T>
__device__ __forceinline__ double evaluate_column(const Packs& packs, Column<T> column,
                                                  bool has_positives, Compute<T> scale) {
  using C = Compute<T>;
  constexpr int kSize = Packed<T>::kSize;
  const unsigned inside = column.inside;
  const bool stores_whole = kWhole && inside == bits_of(0, kSize);
  C factors[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    factors[j] = inside >> j & 1u ? packs.factor(column.targets[j], scale) : C(0);
  const auto factor = [&](int j) { return factors[j]; };
  const auto load = [&](const T* x) {
    return kWhole ? load_whole<Packs>(x) : load_inside<Packs>(x, inside);
  };
  int next = has_positives ? column.next_positive(column.first) : column.num_classes;
  double sum = 0;
  typename Packs::Pack ahead;
  if (Packs::kLoadsAhead) ahead = load(column.x);
#pragma unroll 1
  for (int k = column.first; k < column.num_classes; k += kSize) {
    const auto value = [&](int j, C v) { return packs.value(column.targets[j], k, v, scale); };
    const typename Packs::Pack pack = Packs::kLoadsAhead ? ahead : load(column.x);
    if (Packs::kLoadsAhead && k + kSize < column.num_classes)
      ahead = load(column.x + column.step());
    C pack_sum = 0;
    if constexpr (kStores) {
      const PackValues<T> values = evaluate_whole<T>(packs, pack, factor, value);
      if (stores_whole) {
        values.store(column.out);
      } else {
        values.store_inside(column.out, inside);
      }
    } else {
      pack_sum = sum_whole(packs, pack, factor, value);
    }
    if (Packs::kOrdinary && (packs.any_odd(pack) || k == next)) {
      // A sum cannot leave out the odd elements again, so it takes all by the general formula.
      unsigned odd = inside;
      if constexpr (kStores) odd &= packs.odd_bits(pack) | column.positives(k);
      pack_sum = evaluate_odd<kStores>(column.x, odd, column.out, value);
      if (k == next) next = column.next_positive(k + 1);
    }
    if constexpr (!kStores) sum += pack_sum;
    column.x += column.step();
    if constexpr (kStores) column.out += column.step();
  }
  return sum;
}

// Evaluates a tile. x and out point to the slot's first plane, which is element `offset` of the
// level's tensor of so many elements. The tensor starts at a multiple of 16 bytes. targets[c -
// cells.first] is the target of cell c, and `has_positives` is whether one of them has a positive
// class. Returns the sum of the results or, with kStores, stores them.
template <bool kStores, typename Packs, typename T>
__device__ __forceinline__ double evaluate_planes(const Packs& packs, const T* __restrict__ x,
                                                  T* __restrict__ out, int64_t offset,
                                                  int64_t elements, int64_t area, int num_classes,
                                                  TileCells<T> cells,
                                                  const RowTarget<Compute<T>>* targets,
                                                  bool has_positives, Compute<T> scale) {
  constexpr int kSize = Packed<T>::kSize, kColumns = kTileCells / kSize;
  static_assert(kFocalThreads == kColumns * kSize, "a thread takes every kSize-th plane");
  // nvcc would load the area from the kernel's arguments again for each pack.
  const int its_area = __shfl_sync(kFullMask, int(area), 0);
  const int first_class = int(threadIdx.x) / kColumns;
  const int lead = int((offset + first_class * area) % kSize);
  // The cells of this thread, as an index into `targets` and as a number.
  const int its_cells = int(threadIdx.x) % kColumns * kSize - lead + TileCells<T>::kBefore;
  const int64_t cell = cells.first + its_cells;
  if (cell <= -kSize || cell >= area || first_class >= num_classes) return 0;
  const unsigned inside =
      bits_of(cell < 0 ? int(-cell) : 0, area - cell < kSize ? int(area - cell) : kSize);
  const int64_t start = first_class * area + cell;
  Column<T> column;
  column.x = x + start;
  column.out = kStores ? out + start : nullptr;
  column.area = its_area;
  column.first = first_class;
  column.num_classes = num_classes;
  column.targets = targets + its_cells;
  column.inside = inside;
  if (packs.accepts(scale)) {
    // If a pack reaches across the end of its plane, its other elements belong to a neighbouring
    // plane.
    const bool whole = inside == bits_of(0, kSize);
    if (whole || (Packs::kOrdinary && offset + num_classes * area + kSize <= elements))
      return evaluate_column<kStores, true>(packs, column, has_positives, scale);
    if constexpr (Packs::kOrdinary)
      return evaluate_column<kStores, false>(packs, column, has_positives, scale);
  }
  double sum = 0;
  for (int k = first_class; k < num_classes; k += kSize) {
    sum += evaluate_odd<kStores>(column.x, inside, column.out, [&](int j, Compute<T> v) {
      return packs.value(column.targets[j], k, v, scale);
    });
    column.x += column.step();
    if constexpr (kStores) column.out += column.step();
  }
  return sum;
}

}  // namespace retinanet
