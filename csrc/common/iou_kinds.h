// Relatives of the IoU that measure how well a predicted box fits its ground truth: GIoU
// (Rezatofighi et al. 2019), DIoU and CIoU (Zheng et al. 2020).
//
// Each formula is written once, for numbers that may carry their derivatives (Dual). The trade-off
// alpha of CIoU counts as a constant in derivatives, as in the appendix of its paper. No
// denominator has an epsilon added. A ratio with denominator 0 is 0 instead, and the IoU of two
// boxes without area is 1 if they are identical, else 0.
#pragma once

#include "boxes.h"

namespace retinanet {

enum class IouKind { kIou, kGiou, kDiou, kCiou };

// A number and its derivatives with respect to the four coordinates of the predicted box.
template <typename T>
struct Dual {
  T v;
  T d[4] = {0, 0, 0, 0};

  HOST_DEVICE Dual(T value = T(0)) : v(value) {}

  // This number, with `factor` times the derivatives of b added to its own.
  HOST_DEVICE Dual plus(const Dual& b, T factor) const {
    Dual r = *this;
    for (int i = 0; i < 4; ++i) r.d[i] += factor * b.d[i];
    return r;
  }
};

template <typename T>
HOST_DEVICE Dual<T> operator+(const Dual<T>& a, const Dual<T>& b) {
  return Dual<T>(a.v + b.v).plus(a, T(1)).plus(b, T(1));
}
template <typename T>
HOST_DEVICE Dual<T> operator-(const Dual<T>& a, const Dual<T>& b) {
  return Dual<T>(a.v - b.v).plus(a, T(1)).plus(b, T(-1));
}
template <typename T>
HOST_DEVICE Dual<T> operator*(const Dual<T>& a, const Dual<T>& b) {
  return Dual<T>(a.v * b.v).plus(a, b.v).plus(b, a.v);
}

// a / b, or 0 if b is 0.
template <typename T>
HOST_DEVICE T ratio(T a, T b) {
  return b == T(0) ? T(0) : a / b;
}
template <typename T>
HOST_DEVICE Dual<T> ratio(const Dual<T>& a, const Dual<T>& b) {
  if (b.v == T(0)) return Dual<T>(0);
  const T value = a.v / b.v;
  return Dual<T>(value).plus(a, 1 / b.v).plus(b, -value / b.v);
}

// The angle of a box's diagonal, atan(w / h). It is 0 for a box of 0 x 0.
template <typename T>
HOST_DEVICE T diagonal(T w, T h) {
  return std::atan2(w, h);
}
template <typename T>
HOST_DEVICE Dual<T> diagonal(const Dual<T>& w, const Dual<T>& h) {
  const T square = w.v * w.v + h.v * h.v;
  return Dual<T>(std::atan2(w.v, h.v)).plus(w, ratio(h.v, square)).plus(h, -ratio(w.v, square));
}

// A number without its derivatives.
template <typename T>
HOST_DEVICE T value_of(T v) {
  return v;
}
template <typename T>
HOST_DEVICE T value_of(const Dual<T>& v) {
  return v.v;
}

// The maximum of two numbers, NaN if one is NaN. The derivative of a tie is the mean of both.
template <typename T>
HOST_DEVICE T max_propagating_nan(T a, T b) {
  return a > b || a != a ? a : b;
}
template <typename T>
HOST_DEVICE Dual<T> max_propagating_nan(const Dual<T>& a, const Dual<T>& b) {
  if (a.v == b.v) return Dual<T>(a.v).plus(a, T(0.5)).plus(b, T(0.5));
  return a.v > b.v || a.v != a.v ? a : b;
}
// The minimum of two numbers, by the same rules for NaN and ties.
template <typename V>
HOST_DEVICE V min_propagating_nan(const V& a, const V& b) {
  return V(0) - max_propagating_nan(V(0) - a, V(0) - b);
}

// The corners of a box. V is float or double, or a Dual of it for derivatives.
template <typename V>
struct Coordinates {
  V x1, y1, x2, y2;
};

// IoU, GIoU, DIoU or CIoU of a predicted box p and its ground truth g. The IoU has the value of
// `iou` (boxes.h), which does not give derivatives.
template <IouKind kKind, typename V>
HOST_DEVICE V iou_like(const Coordinates<V>& p, const Coordinates<V>& g) {
  // The IoU, from the intersection and the union.
  const V pw = p.x2 - p.x1, ph = p.y2 - p.y1, gw = g.x2 - g.x1, gh = g.y2 - g.y1;
  const V w =
      max_propagating_nan(min_propagating_nan(p.x2, g.x2) - max_propagating_nan(p.x1, g.x1), V(0));
  const V h =
      max_propagating_nan(min_propagating_nan(p.y2, g.y2) - max_propagating_nan(p.y1, g.y1), V(0));
  const V inter = w * h, united = pw * ph + gw * gh - inter;
  if constexpr (kKind == IouKind::kIou) {
    // The IoU is a constant 0 where the ratio is not a positive number, as with degenerate boxes.
    const V iou = ratio(inter, united);
    return value_of(iou) > 0 ? iou : V(0);
  }
  const bool same = value_of(p.x1) == value_of(g.x1) && value_of(p.y1) == value_of(g.y1) &&
                    value_of(p.x2) == value_of(g.x2) && value_of(p.y2) == value_of(g.y2);
  const V iou = same && value_of(united) == 0 ? V(1) : ratio(inter, united);
  // The sides of the outer box, the smallest one that encloses both.
  const V outer_w = max_propagating_nan(p.x2, g.x2) - min_propagating_nan(p.x1, g.x1);
  const V outer_h = max_propagating_nan(p.y2, g.y2) - min_propagating_nan(p.y1, g.y1);
  if constexpr (kKind == IouKind::kGiou) {
    // GIoU subtracts the share of the outer box that neither box covers.
    const V outer = outer_w * outer_h;
    return iou - ratio(outer - united, outer);
  } else {
    // DIoU subtracts the squared distance of the centres over the outer box's squared diagonal.
    const V half = V(0.5);
    const V dx = half * (p.x1 + p.x2 - g.x1 - g.x2), dy = half * (p.y1 + p.y2 - g.y1 - g.y2);
    const V value = iou - ratio(dx * dx + dy * dy, outer_w * outer_w + outer_h * outer_h);
    if constexpr (kKind == IouKind::kDiou) {
      return value;
    } else {
      // CIoU subtracts alpha * v as well. v compares the aspect ratios: it is 4 / pi^2 times the
      // squared difference of the diagonals' angles.
      constexpr double kFourOverPiSquared = 0.40528473456935108577551785283891;
      const V angle = diagonal(gw, gh) - diagonal(pw, ph);
      const V v = V(kFourOverPiSquared) * angle * angle;
      const auto alpha = ratio(value_of(v), 1 - value_of(iou) + value_of(v));
      return value - V(alpha) * v;
    }
  }
}

}  // namespace retinanet
