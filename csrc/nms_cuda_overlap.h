// A box as the NMS kernels compare it with others, and the comparison, mostly without a division.
#pragma once

#include "nms.h"

namespace retinanet {

// A candidate or a kept box. `area` is area(box), which is computed once.
template <typename T>
struct NmsBox {
  Box<T> box;
  T area;
  int64_t label;

  static constexpr int64_t kBytes = sizeof(Box<T>) + 16;
};
static_assert(sizeof(NmsBox<float>) == NmsBox<float>::kBytes);
static_assert(sizeof(NmsBox<double>) == NmsBox<double>::kBytes);

// Whether `kept` suppresses `other` if both are of one class. The result is always that of
// rules.suppresses, which compares fl(I / U) with the threshold t for the intersection I and the
// union U, both as computed. Most pairs are decided without the division:
//
// - Without an intersection, the IoU is 0.
// - Otherwise let u = epsilon / 2 be the unit roundoff, edge = fl(t * U) and
//   distance = fl(I - edge). t and edge are normal numbers, so that edge = t * U * (1 + d) with
//   |d| <= u. The margin of 16 u * edge is exact, because 16 u is a power of two.
//   - If distance > margin, then I >= edge * (1 + 15 u) >= t * U * (1 + 13 u). So I / U is greater
//     than the next number after t, which is at most t * (1 + 2 u). Rounding keeps the order, so
//     fl(I / U) > t.
//   - If -distance > margin, then I <= edge * (1 - 15 u) < t * U. So I / U < t, and
//     fl(I / U) <= t.
// - What is left takes the division: pairs within the margin, thresholds that are not positive, and
//   numbers outside the normal range. With NaN, every comparison below is false.
template <typename T>
__device__ __forceinline__ bool suppresses_in_class(const NmsRules<T>& rules, const NmsBox<T>& kept,
                                                    const NmsBox<T>& other) {
  using Limits = std::numeric_limits<T>;
  const T threshold = rules.iou_threshold;
  const T inter = intersection(kept.box, other.box);
  if (!(inter > T(0))) return threshold < T(0);
  const T edge = mul(threshold, add(add(kept.area, other.area), -inter));
  const T distance = add(inter, -edge);
  // Below the least edge, the margin would not be a normal number.
  const bool normal = threshold >= Limits::min() && edge >= Limits::min() / Limits::epsilon();
  if (normal && std::abs(distance) > mul(edge, 8 * Limits::epsilon())) return distance > T(0);
  return rules.suppresses(kept.box, kept.area, other.box, other.area);
}

// Whether `kept` suppresses `other`, with regard to their classes.
template <typename T>
__device__ __forceinline__ bool suppresses(const NmsRules<T>& rules, const NmsBox<T>& kept,
                                           const NmsBox<T>& other) {
  return (rules.class_agnostic || kept.label == other.label) &&
         suppresses_in_class(rules, kept, other);
}

}  // namespace retinanet
