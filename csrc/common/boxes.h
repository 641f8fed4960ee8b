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

// The area that two boxes share; 0 if they do not overlap.
template <typename T>
HOST_DEVICE T intersection(const Box<T>& a, const Box<T>& b) {
  const T w = max_of(add(min_of(a.x2, b.x2), -max_of(a.x1, b.x1)), T(0));
  const T h = max_of(add(min_of(a.y2, b.y2), -max_of(a.y1, b.y1)), T(0));
  return mul(w, h);
}

// Intersection over union. It is 0 if the ratio is not a positive number, as with degenerate boxes
// and NaN.
template <typename T>
HOST_DEVICE T iou(const Box<T>& a, T area_a, const Box<T>& b, T area_b) {
  const T inter = intersection(a, b);
  const T ratio = div(inter, add(add(area_a, area_b), -inter));
  return ratio > T(0) ? ratio : T(0);
}

}  // namespace retinanet
