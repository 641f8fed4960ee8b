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
// softplus(-x) + (1 - t) softplus(x).  With infinite logits every factor takes its limit.
#pragma once

#include <algorithm>

#include "common/checks.h"
#include "common/elementary.h"

namespace retinanet {

// How q^gamma is computed: as q q; as a product of q, its powers and its root, for multiples of
// 1/2 up to 7.5; or as that times the power that remains.  kAny serves every gamma.
enum class Power { kTwo, kHalves, kAny };

template <typename T>
struct Focal {
  T positive, negative;  // alpha_t of targets 1 and 0
  T gamma;
  int halves;  // gamma = halves / 2 + rest
  T rest;

  // alpha < 0: no class balancing.
  static Focal make(double alpha, double gamma) {
    const int halves = int(std::min(std::floor(2 * gamma), 15.0));
    return {T(alpha < 0 ? 1 : alpha), T(alpha < 0 ? 1 : 1 - alpha), T(gamma), halves,
            T(gamma - 0.5 * halves)};
  }

  Power power() const {
    return halves == 4 && rest == T(0) ? Power::kTwo
                                       : (rest == T(0) ? Power::kHalves : Power::kAny);
  }

  // Loss of a target of 1 (`hit`) or 0, from e = exp(-|x|).
  template <Power kPower, typename M>
  VECTORISED T loss(T x, T e, bool hit) const {
    const Parts p = parts<M>(flipped(x, hit), e);
    const T factor = modulator<kPower, M>(p), weight = hit ? positive : negative;
    return weight * (M::multiply_add(gamma * p.r_error, factor, factor) *
                     bounded_without(weight, p.softplus));
  }

  // Its derivative, times `scale`, which comes first so that no factor underflows before the
  // result.
  template <Power kPower, typename M>
  VECTORISED T grad(T x, T e, bool hit, T scale) const {
    const Parts p = parts<M>(flipped(x, hit), e);
    const T inner = p.r * M::multiply_add(gamma * p.a, bounded(p.softplus), p.b);
    return scale * (hit ? -positive : negative) * modulator<kPower, M>(p) *
           M::multiply_add((gamma + T(1)) * p.r_error, inner, inner);
  }

  // Loss of any target.
  template <Power kPower, typename M>
  VECTORISED T soft_loss(T x, T e, T t) const {
    const Parts p = parts<M>(x, e);
    const T q = p.s * (T(1) - t) + p.one_minus_s * t;
    const T weight = balance(t);
    return weight * (power_of<kPower>(q) * bounded_without(weight, cross_entropy(p, t)));
  }

  template <Power kPower, typename M>
  VECTORISED T soft_grad(T x, T e, T t, T scale) const {
    const Parts p = parts<M>(x, e);
    const T q = p.s * (T(1) - t) + p.one_minus_s * t;
    // (dq / dx) / q; q itself may be 0 where the target is 0 or 1.
    const T inside = p.s * p.one_minus_s * (T(1) - T(2) * t) / q;
    const T slope = t == T(0) ? p.one_minus_s : (t == T(1) ? -p.s : inside);
    const T inner =
        gamma * (slope * bounded(cross_entropy(p, t))) + (p.s * (T(1) - t) - p.one_minus_s * t);
    return scale * balance(t) * power_of<kPower>(q) * inner;
  }

 private:
  struct Parts {
    T a, b, r;         // exp(-max(z, 0)), exp(min(z, 0)), 1 / (1 + exp(-|z|))
    T r_error;         // what is missing in r, relative to it
    T s, one_minus_s;  // sigmoid(z) = b r, sigmoid(-z) = a r
    T softplus;        // -log(1 - s)
    T softplus_minus;  // -log(s)
  };

  template <typename M>
  static VECTORISED Parts parts(T z, T e) {
    const T u = T(1) + e, r = T(1) / u, l = log1p_unit<M>(e);
    // r^gamma multiplies the error of r by gamma, but that of u and of the division are known.
    const T of_u = (u - T(1)) - e, of_division = M::one_minus_product(u, r);
    const T a = z < T(0) ? T(1) : e, b = z < T(0) ? e : T(1);
    return {a,
            b,
            r,
            M::multiply_add(of_u, r, of_division),
            b * r,
            a * r,
            (T(0) < z ? z : T(0)) + l,
            (z < T(0) ? -z : T(0)) + l};
  }

  // Keeps 0 * inf out: a vanishing factor wins.
  static VECTORISED T bounded(T v) {
    constexpr T kMax = std::numeric_limits<T>::max();
    return kMax < v ? kMax : v;
  }
  static VECTORISED T bounded_without(T weight, T v) { return weight == T(0) ? bounded(v) : v; }

  VECTORISED T balance(T t) const { return positive * t + negative * (T(1) - t); }

  static VECTORISED T cross_entropy(const Parts& p, T t) {
    // Not 0 * inf: a target of 0 or 1 leaves one of the terms out.
    const T positive_term = t == T(0) ? T(0) : t * p.softplus_minus;
    const T negative_term = t == T(1) ? T(0) : (T(1) - t) * p.softplus;
    return positive_term + negative_term;
  }

  // q^(halves / 2)
  VECTORISED T half_power(T q) const {
    const T q2 = q * q, q4 = q2 * q2;
    return ((halves & 2) ? q : T(1)) * ((halves & 4) ? q2 : T(1)) * ((halves & 8) ? q4 : T(1)) *
           ((halves & 1) ? std::sqrt(q) : T(1));
  }

  template <Power kPower, typename M>
  VECTORISED T modulator(const Parts& p) const {
    if constexpr (kPower == Power::kTwo) return p.s * p.s;
    const T power = half_power(p.s);
    return kPower == Power::kHalves ? power
                                    : power * exp_minus<M>(rest * bounded(p.softplus_minus));
  }

  template <Power kPower>
  VECTORISED T power_of(T q) const {
    if constexpr (kPower == Power::kTwo) return q * q;
    const T power = half_power(q);
    return kPower == Power::kHalves ? power : power * std::pow(q, rest);
  }
};

// Targets in the shape of the logits.
template <typename Target>
struct DenseTargets {
  const Target* data;
};

// Stands for the positive class of anchors whose results are 0 whatever their logits.
constexpr int32_t kDead = std::numeric_limits<int32_t>::min();

// What a label means for its row of K logits: kBackground, kIgnored, or the class that is positive;
// anything else makes the row NaN.
template <typename C>
struct RowTarget {
  int32_t positive;  // the class that is positive, or -1
  C weight;          // factor of losses and gradients
  bool dead;         // these are 0 whatever the logits

  template <typename Label>
  static HOST_DEVICE RowTarget make(Label label, int64_t num_classes, C weight) {
    const bool valid = label >= kIgnored && label < num_classes;
    return {valid ? int32_t(label) : kBackground,
            valid ? weight : std::numeric_limits<C>::quiet_NaN(),
            label == kIgnored || weight == C(0)};
  }
};

// One label for each row of K logits, and a factor for it if `weights` is not null.
template <typename C, typename Label>
struct ClassTargets {
  const Label* labels;
  int64_t num_classes;
  const C* weights = nullptr;

  HOST_DEVICE RowTarget<C> row(int64_t r) const {
    return RowTarget<C>::make(labels[r], num_classes, weights ? weights[r] : C(1));
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
        return f(zero, ClassTargets<C, int32_t>{data<int32_t>(targets), k});
      case ScalarType::Long:
        return f(zero, ClassTargets<C, int64_t>{data<int64_t>(targets), k});
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
  check(!classes || inputs.size(inputs.dim() - 1) < (int64_t(1) << 31), op,
        ": expected fewer than 2^31 classes, got inputs ", shape(inputs));
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
