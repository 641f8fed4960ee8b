// Boxes (x1, y1, x2, y2) and their IoU, which has the same bits on every backend.
//
// The IoU decides matches and suppressions, so its value must not depend on the compiler. The
// products and sums below are never contracted into fused multiply-adds: device code uses
// intrinsics, and the CPU build passes -ffp-contract=off. The division is IEEE, and the order of
// operations is torchvision's.
#pragma once

#include <cmath>
#include <limits>

#include "types.h"

namespace retinanet {

#ifdef __CUDA_ARCH__
HOST_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
HOST_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
HOST_DEVICE float div(float a, float b) { return __fdiv_rn(a, b); }
HOST_DEVICE double mul(double a, double b) { return __dmul_rn(a, b); }
HOST_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
HOST_DEVICE double div(double a, double b) { return __ddiv_rn(a, b); }
HOST_DEVICE float lower(float a, float b) { return fminf(a, b); }
HOST_DEVICE float higher(float a, float b) { return fmaxf(a, b); }
HOST_DEVICE double lower(double a, double b) { return fmin(a, b); }
HOST_DEVICE double higher(double a, double b) { return fmax(a, b); }
#else
template <typename T>
HOST_DEVICE T mul(T a, T b) {
  return a * b;
}
template <typename T>
HOST_DEVICE T add(T a, T b) {
  return a + b;
}
template <typename T>
HOST_DEVICE T div(T a, T b) {
  return a / b;
}
// The smaller and the larger number, in one instruction on every device. The result is `a` if `b`
// is NaN. If `a` is NaN, it is NaN or `b`, depending on the device.
template <typename T>
HOST_DEVICE T lower(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
HOST_DEVICE T higher(T a, T b) {
  return a < b ? b : a;
}
#endif

// The smaller number; `a` if they are equal or one of them is NaN.
template <typename T>
HOST_DEVICE T min_of(T a, T b) {
  return b < a ? b : a;
}

// The larger number; `a` if they are equal or one of them is NaN.
template <typename T>
HOST_DEVICE T max_of(T a, T b) {
  return a < b ? b : a;
}

// A box, aligned so that it is read with one 128-bit access (two for double).
template <typename T>
struct alignas(16) Box {
  T x1, y1, x2, y2;
};

template <typename T>
HOST_DEVICE T area(const Box<T>& b) {
  return mul(add(b.x2, -b.x1), add(b.y2, -b.y1));
}

// True if both sides are positive and finite, and therefore not NaN.
template <typename T>
HOST_DEVICE bool is_valid(const Box<T>& b) {
  const T w = b.x2 - b.x1, h = b.y2 - b.y1, inf = std::numeric_limits<T>::infinity();
  return w > T(0) && w < inf && h > T(0) && h < inf;
}

// False if the boxes share no area, or if a coordinate is NaN. Their IoU is then 0.
template <typename T>
HOST_DEVICE bool may_overlap(const Box<T>& a, const Box<T>& b) {
  // `&` instead of `&&`: without branches
  return (a.x1 < b.x2) & (b.x1 < a.x2) & (a.y1 < b.y2) & (b.y1 < a.y2);
}

// The area that two boxes share; 0 if they do not overlap. No coordinate may be NaN, unless the
// caller divides by an area of the same boxes, which is then NaN.
template <typename T>
HOST_DEVICE T intersection(const Box<T>& a, const Box<T>& b) {
  const T w = higher(add(lower(a.x2, b.x2), -higher(a.x1, b.x1)), T(0));
  const T h = higher(add(lower(a.y2, b.y2), -higher(a.y1, b.y1)), T(0));
  return mul(w, h);
}

// Intersection over union. It is 0 if the ratio is not a positive number, as with degenerate boxes
// and NaN. Without branches, for loops that the compiler vectorises.
template <typename T>
HOST_DEVICE T iou(const Box<T>& a, T area_a, const Box<T>& b, T area_b) {
  const T inter = intersection(a, b);
  const T ratio = div(inter, add(add(area_a, area_b), -inter));
  return ratio > T(0) ? ratio : T(0);
}

// The same bits as iou(). Boxes that do not overlap take four comparisons and no division.
template <typename T>
HOST_DEVICE T iou_if_overlapping(const Box<T>& a, T area_a, const Box<T>& b, T area_b) {
  return may_overlap(a, b) ? iou(a, area_a, b, area_b) : T(0);
}

}  // namespace retinanet
