// Sigmoid focal loss of one logit, forward and backward (Lin et al. 2017, "Focal Loss for Dense
// Object Detection", eq. 5):  FL = -alpha_t (1 - p_t)^gamma log(p_t).
//
// For a target y of 0 or 1 let z = x if y = 0, else -x.  Then 1 - p_t = sigmoid(z) and -log(p_t) =
// softplus(z), so
//     FL     = alpha_t s^gamma softplus(z),                        s = sigmoid(z)
//     dFL/dz = alpha_t s^gamma (gamma (1 - s) softplus(z) + s),    dFL/dx = dFL/dz for y = 0,
//     -dFL/dz for y = 1.
// s, 1 - s and softplus all come from one exp(-|z|) and none is ever computed as `1 - p`, which
// would cancel. A soft target t has 1 - p_t = s(x)(1 - t) + s(-x) t and the cross-entropy t
// softplus(-x) + (1 - t) softplus(x).
#pragma once

#include <cmath>
#include <limits>

#include "common.h"

namespace retinanet {

template <typename T>
struct Focal {
  T alpha, gamma;  // alpha < 0: no class balancing

  HOST_DEVICE T balance(T t) const {
    return alpha < T(0) ? T(1) : alpha * t + (T(1) - alpha) * (T(1) - t);
  }

  HOST_DEVICE T modulate(T s) const {
    if (gamma == T(2)) return s * s;
    if (gamma == T(1)) return s;
    if (gamma == T(0)) return T(1);
    return std::pow(s, gamma);
  }

  HOST_DEVICE T loss(T x, T t) const {
    const Parts p = parts(t == T(1) ? -x : x);
    if (t == T(0) || t == T(1)) return balance(t) * (modulate(p.s) * p.softplus);
    const T softplus_minus = p.softplus - x;
    const T q = p.s * (T(1) - t) + p.one_minus_s * t;
    return balance(t) * (modulate(q) * (t * softplus_minus + (T(1) - t) * p.softplus));
  }

  HOST_DEVICE T grad(T x, T t) const {
    const Parts p = parts(t == T(1) ? -x : x);
    if (t == T(0) || t == T(1)) {
      // (1 - s) softplus tends to 0 as z grows; the bound keeps 0 * inf out.
      const T bounded = p.softplus > kMax ? kMax : p.softplus;
      const T g = balance(t) * (modulate(p.s) * (gamma * (p.one_minus_s * bounded) + p.s));
      return t == T(1) ? -g : g;
    }
    const T softplus_minus = p.softplus - x;
    const T q = p.s * (T(1) - t) + p.one_minus_s * t;
    const T cross_entropy = t * softplus_minus + (T(1) - t) * p.softplus;
    const T dq = p.s * p.one_minus_s * (T(1) - T(2) * t);
    return balance(t) * (modulate(q) * (gamma * (dq / q) * cross_entropy +
                                        (p.s * (T(1) - t) - p.one_minus_s * t)));
  }

 private:
  static constexpr T kMax = std::numeric_limits<T>::max();

  struct Parts {
    T s, one_minus_s, softplus;
  };

  static HOST_DEVICE Parts parts(T z) {
    const T e = std::exp(-std::abs(z)), r = T(1) / (T(1) + e);
    return {z < T(0) ? e * r : r, z < T(0) ? r : e * r, (z < T(0) ? T(0) : z) + std::log1p(e)};
  }
};

// Targets in the shape of the logits.
template <typename Target>
struct DenseTargets {
  const Target* data;

  struct Cursor {
    const Target* at;

    template <typename T>
    HOST_DEVICE T loss(const Focal<T>& focal, T x) const {
      return focal.loss(x, T(*at));
    }
    template <typename T>
    HOST_DEVICE T grad(const Focal<T>& focal, T x) const {
      return focal.grad(x, T(*at));
    }
    HOST_DEVICE void advance() { ++at; }
  };

  HOST_DEVICE Cursor at(int64_t element) const { return {data + element}; }
};

// One class id per row of K logits; kBackground, kIgnored; anything else outside 0..K-1 makes the
// row NaN.
template <typename Label>
struct ClassTargets {
  const Label* labels;
  int64_t num_classes;

  struct Cursor {
    const Label* next;
    int64_t num_classes, k, label;

    template <typename T>
    HOST_DEVICE T loss(const Focal<T>& focal, T x) const {
      if (label == kIgnored) return T(0);
      if (label < kIgnored || label >= num_classes) return std::numeric_limits<T>::quiet_NaN();
      return focal.loss(x, k == label ? T(1) : T(0));
    }
    template <typename T>
    HOST_DEVICE T grad(const Focal<T>& focal, T x) const {
      if (label == kIgnored) return T(0);
      if (label < kIgnored || label >= num_classes) return std::numeric_limits<T>::quiet_NaN();
      return focal.grad(x, k == label ? T(1) : T(0));
    }
    // Only valid while another element follows: it may read the next row's label.
    HOST_DEVICE void advance() {
      if (++k < num_classes) return;
      k = 0;
      label = int64_t(*next++);
    }
  };

  HOST_DEVICE Cursor at(int64_t element) const {
    const int64_t row = element / num_classes;
    return {labels + row + 1, num_classes, element - row * num_classes, int64_t(labels[row])};
  }
};

// Calls f(T{}, targets) with the element type of `inputs` and the view of `targets` that fits; both
// are contiguous.
template <typename F>
inline void dispatch_focal(const Tensor& inputs, const Tensor& targets, const char* op, F&& f) {
  dispatch_floating(inputs.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const int64_t k = inputs.dim() > 0 ? inputs.size(inputs.dim() - 1) : 1;
    switch (targets.scalar_type()) {
      case ScalarType::Int:
        return f(zero, ClassTargets<int32_t>{data<int32_t>(targets), k});
      case ScalarType::Long:
        return f(zero, ClassTargets<int64_t>{data<int64_t>(targets), k});
      default:
        if (targets.scalar_type() == inputs.scalar_type())
          return f(zero, DenseTargets<T>{data<T>(targets)});
        check_dtype(targets, std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float, op,
                    "dense targets");
        return f(zero, DenseTargets<C>{data<C>(targets)});
    }
  });
}

inline void check_focal_loss(const Tensor& inputs, const Tensor& targets, const char* op) {
  const bool classes =
      targets.scalar_type() == ScalarType::Int || targets.scalar_type() == ScalarType::Long;
  bool ok = targets.dim() == inputs.dim() - (classes ? 1 : 0);
  for (int64_t d = 0; ok && d < targets.dim(); ++d) ok = targets.size(d) == inputs.size(d);
  check(ok, op, ": targets ", shape(targets), " do not fit inputs ", shape(inputs));
}

inline void check_focal_loss_grad(const Tensor& grad, const Tensor& inputs, const char* op) {
  const bool half =
      inputs.scalar_type() == ScalarType::Half || inputs.scalar_type() == ScalarType::BFloat16;
  if (grad.dim() != 0 || !half || grad.scalar_type() != ScalarType::Float)
    check_dtype(grad, inputs.scalar_type(), op, "grad");
  check(grad.dim() == 0 || grad.numel() == inputs.numel(), op, ": grad ", shape(grad),
        " does not fit inputs ", shape(inputs));
}

}  // namespace retinanet
