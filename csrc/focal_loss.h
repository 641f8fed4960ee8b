// Sigmoid focal loss of one logit, forward and backward (Lin et al. 2017, "Focal Loss for Dense
// Object Detection", eq. 5):  FL = -alpha_t (1 - p_t)^gamma log(p_t).
//
// For a target y of 0 or 1, let z = x if y = 0 and z = -x if y = 1. Then 1 - p_t = sigmoid(z) and
// -log(p_t) = softplus(z), so
//     FL     = alpha_t s^gamma softplus(z),                        s = sigmoid(z)
//     dFL/dz = alpha_t s^gamma (gamma (1 - s) softplus(z) + s)
//     dFL/dx = dFL/dz if y = 0, -dFL/dz if y = 1.
// A soft target t has 1 - p_t = s(x) (1 - t) + s(-x) t, and its cross-entropy is
// t softplus(-x) + (1 - t) softplus(x).
//
// s, 1 - s and softplus are all computed from one e = exp(-|x|). None of them is computed as
// `1 - p`, which would cancel. With infinite logits every factor takes its limit.
#pragma once

#include <algorithm>

#include "common/checks.h"
#include "common/division.h"
#include "common/elementary.h"

namespace retinanet {

// How q^gamma is computed.
enum class Power {
  kTwo,     // gamma = 2: q*q
  kHalves,  // gamma is a multiple of 1/2 up to 7.5: a product of q, q^2, q^4 and sqrt(q)
  kAny,     // any gamma: that product, times the remaining power
};

// The focal loss of one logit for a given alpha and gamma. T is the compute type, and the methods'
// M is the Arithmetic (common/simd.h) of the instruction set.
template <typename T>
struct Focal {
  T positive, negative;  // alpha_t of targets 1 and 0
  T gamma;
  int gamma_halves;  // gamma = gamma_halves / 2 + gamma_remainder
  T gamma_remainder;

  // A negative alpha turns class balancing off.
  static Focal make(double alpha, double gamma) {
    const int halves = int(std::min(std::floor(2 * gamma), 15.0));
    return {T(alpha < 0 ? 1 : alpha), T(alpha < 0 ? 1 : 1 - alpha), T(gamma), halves,
            T(gamma - 0.5 * halves)};
  }

  Power power() const {
    if (gamma_remainder != T(0)) return Power::kAny;
    return gamma_halves == 4 ? Power::kTwo : Power::kHalves;
  }

  // The loss of logit x for a target of 1 (`hit`) or 0. e = exp(-|x|) in all four functions.
  template <Power kPower, typename M>
  VECTORISED T loss(T x, T e, bool hit) const {
    const Parts p = parts<M>(flipped(x, hit), e);
    const T factor = modulator<kPower, M>(p), weight = hit ? positive : negative;
    return weight * (M::multiply_add(gamma * p.r_error, factor, factor) *
                     finite_if_unweighted(weight, p.softplus));
  }

  // The derivative of `loss` times `scale`. The scale is multiplied first, so that no intermediate
  // product underflows if the result does not.
  template <Power kPower, typename M>
  VECTORISED T grad(T x, T e, bool hit, T scale) const {
    const Parts p = parts<M>(flipped(x, hit), e);
    const T inner = p.r * M::multiply_add(gamma * p.a, finite(p.softplus), p.b);
    return scale * (hit ? -positive : negative) * modulator<kPower, M>(p) *
           M::multiply_add((gamma + T(1)) * p.r_error, inner, inner);
  }

  // The loss for any target t, soft ones included.
  template <Power kPower, typename M>
  VECTORISED T soft_loss(T x, T e, T t) const {
    const Parts p = parts<M>(x, e);
    const T q = p.s * (T(1) - t) + p.one_minus_s * t;
    const T weight = balance(t);
    return weight * (power_of<kPower>(q) * finite_if_unweighted(weight, cross_entropy(p, t)));
  }

  // The derivative of `soft_loss` times `scale`.
  template <Power kPower, typename M>
  VECTORISED T soft_grad(T x, T e, T t, T scale) const {
    const Parts p = parts<M>(x, e);
    const T q = p.s * (T(1) - t) + p.one_minus_s * t;
    // slope = (dq / dx) / q. For targets of 0 and 1, where q may be 0, the quotient is known.
    const T inside = p.s * p.one_minus_s * (T(1) - T(2) * t) / q;
    const T slope = t == T(0) ? p.one_minus_s : (t == T(1) ? -p.s : inside);
    const T inner =
        gamma * (slope * finite(cross_entropy(p, t))) + (p.s * (T(1) - t) - p.one_minus_s * t);
    return scale * balance(t) * power_of<kPower>(q) * inner;
  }

 private:
  struct Parts {
    T a, b, r;         // exp(-max(z, 0)), exp(min(z, 0)), 1 / (1 + exp(-|z|))
    T r_error;         // relative error of r: 1 / (1 + e) = r (1 + r_error), very nearly
    T s, one_minus_s;  // sigmoid(z) = b r, sigmoid(-z) = a r
    T softplus;        // -log(1 - s)
    T softplus_minus;  // -log(s)
  };

  template <typename M>
  static VECTORISED Parts parts(T z, T e) {
    const T u = T(1) + e, r = T(1) / u, l = log1p_unit<M>(e);
    // Raising r to gamma multiplies its relative error by gamma. Both sources of that error, the
    // rounding of u = 1 + e and the division, can be computed exactly, so the loss corrects for
    // them.
    const T error_of_u = (u - T(1)) - e, error_of_division = M::one_minus_product(u, r);
    const T a = z < T(0) ? T(1) : e, b = z < T(0) ? e : T(1);
    return {a,
            b,
            r,
            M::multiply_add(error_of_u, r, error_of_division),
            b * r,
            a * r,
            (T(0) < z ? z : T(0)) + l,
            (z < T(0) ? -z : T(0)) + l};
  }

  // v with infinity replaced by the largest finite number, so that 0 * v is 0 and not NaN.
  static VECTORISED T finite(T v) {
    constexpr T kMax = std::numeric_limits<T>::max();
    return kMax < v ? kMax : v;
  }
  static VECTORISED T finite_if_unweighted(T weight, T v) { return weight == T(0) ? finite(v) : v; }

  // alpha_t of a soft target.
  VECTORISED T balance(T t) const { return positive * t + negative * (T(1) - t); }

  static VECTORISED T cross_entropy(const Parts& p, T t) {
    // Leave the term of weight 0 out, because its softplus may be infinite.
    const T positive_term = t == T(0) ? T(0) : t * p.softplus_minus;
    const T negative_term = t == T(1) ? T(0) : (T(1) - t) * p.softplus;
    return positive_term + negative_term;
  }

  // q^(gamma_halves / 2)
  VECTORISED T half_power(T q) const {
    const T q2 = q * q, q4 = q2 * q2;
    return ((gamma_halves & 2) ? q : T(1)) * ((gamma_halves & 4) ? q2 : T(1)) *
           ((gamma_halves & 8) ? q4 : T(1)) * ((gamma_halves & 1) ? std::sqrt(q) : T(1));
  }

  // (1 - p_t)^gamma of a hard target.
  template <Power kPower, typename M>
  VECTORISED T modulator(const Parts& p) const {
    if constexpr (kPower == Power::kTwo) return p.s * p.s;
    const T power = half_power(p.s);
    return kPower == Power::kHalves
               ? power
               : power * exp_minus<M>(gamma_remainder * finite(p.softplus_minus));
  }

  // q^gamma
  template <Power kPower>
  VECTORISED T power_of(T q) const {
    if constexpr (kPower == Power::kTwo) return q * q;
    const T power = half_power(q);
    return kPower == Power::kHalves ? power : power * std::pow(q, gamma_remainder);
  }
};

// The factor of a logit with target t, where `positive` is that of target 1, and 1 that of target
// 0. As in alpha_t, a soft target takes the mean of both, weighted by t.
template <typename C>
HOST_DEVICE C factor_of_target(C positive, C t) {
  if (t == C(0)) return C(1);
  return t == C(1) ? positive : C(1) + (positive - C(1)) * t;
}

// What applies to elementwise targets besides their values. Unless `pos_weight` is null, it holds
// one factor of the positives per class, and logit i has class i % period / inner.
template <typename C>
struct ElementRules {
  C ignored;  // the target of logits whose results are 0; NaN if there is none
  const C* pos_weight;
  int64_t period, inner;
  Divisor by_period = Divisor(period), by_inner = Divisor(inner);
};

// One target per logit, in 0..1 or ignored.
template <typename Target>
struct ElementTargets {
  const Target* data;
  ElementRules<Compute<Target>> rules;
};

// Replaces the positive class of a row whose results are 0 whatever its logits are.
constexpr int32_t kMasked = std::numeric_limits<int32_t>::min();

// What a label means for its row of K logits. Both members have the size of C, because CUDA kernels
// keep row targets in shared memory, where padding would never be initialised.
template <typename C>
struct alignas(2 * sizeof(C)) RowTarget {
  using Index = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;

  Index positive;  // the class whose target is 1; kBackground if there is none; or kMasked
  C weight;        // factor of the row's losses and gradients

  // A label outside kIgnored..num_classes - 1 makes the row NaN.
  template <typename Label>
  static HOST_DEVICE RowTarget make(Label label, int64_t num_classes, C weight) {
    const bool valid = label >= kIgnored && label < num_classes;
    const Index positive = valid ? Index(label) : Index(kBackground);
    return {label == kIgnored || weight == C(0) ? Index(kMasked) : positive,
            valid ? weight : std::numeric_limits<C>::quiet_NaN()};
  }

  HOST_DEVICE bool masked() const { return positive == kMasked; }
};

// One label per row of K logits. Unless they are null, one weight per row, and one factor of the
// positives per class.
template <typename C, typename Label>
struct ClassTargets {
  const Label* labels;
  int64_t num_classes;
  const C* weights = nullptr;
  const C* pos_weight = nullptr;

  HOST_DEVICE RowTarget<C> row(int64_t r) const {
    return RowTarget<C>::make(labels[r], num_classes, weights ? weights[r] : C(1));
  }
};

// The tensors and the number that say what a call's targets are, checked once for both backends.
// With class ids, `pos_weight` has shape [K]. With elementwise targets, it has a shape that
// broadcasts to that of the logits, and at most one size other than 1, K.
struct FocalTargets {
  Tensor targets;
  std::optional<Tensor> pos_weight;
  double ignored;
  int64_t period = 1, inner = 1;  // as in ElementRules

  FocalTargets(const char* op, const Tensor& inputs, const Tensor& targets,
               const std::optional<Tensor>& pos_weight, std::optional<double> ignore_value)
      : targets(contiguous_aligned(targets)),
        pos_weight(contiguous_aligned(pos_weight)),
        ignored(ignore_value.value_or(std::numeric_limits<double>::quiet_NaN())) {
    const bool classes =
        targets.scalar_type() == ScalarType::Int || targets.scalar_type() == ScalarType::Long;
    bool ok = targets.dim() == inputs.dim() - (classes ? 1 : 0);
    for (int64_t d = 0; ok && d < targets.dim(); ++d) ok = targets.size(d) == inputs.size(d);
    check(ok, op, ": targets ", shape(targets), " do not fit inputs ", shape(inputs));
    check(!classes || classes_of(inputs) < (int64_t(1) << 31), op,
          ": expected fewer than 2^31 classes, got inputs ", shape(inputs));
    if (!pos_weight) return;
    check_dtype(*pos_weight, compute_type(inputs), op, "pos_weight");
    if (classes) {
      check_shape(*pos_weight, {classes_of(inputs)}, op, "pos_weight");
    } else {
      set_period(op, inputs, *pos_weight);
    }
  }

  static int64_t classes_of(const Tensor& inputs) {
    return inputs.dim() > 0 ? inputs.size(inputs.dim() - 1) : 1;
  }
  static ScalarType compute_type(const Tensor& inputs) {
    return inputs.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

 private:
  void set_period(const char* op, const Tensor& inputs, const Tensor& pos_weight) {
    if (pos_weight.numel() == 1) return;
    // Go from the last dimension to the one that has a size other than 1.
    int64_t d = pos_weight.dim() - 1, of_inputs = inputs.dim() - 1;
    for (; d >= 0 && of_inputs >= 0 && pos_weight.size(d) == 1; --d)
      inner *= inputs.size(of_inputs--);
    check(d >= 0 && of_inputs >= 0 && pos_weight.size(d) == inputs.size(of_inputs) &&
              pos_weight.size(d) == pos_weight.numel(),
          op, ": pos_weight ", shape(pos_weight), " does not fit inputs ", shape(inputs));
    period = std::max<int64_t>(inner * pos_weight.numel(), 1);
    inner = std::max<int64_t>(inner, 1);  // without elements, no size matters
    // A pack that starts in the last place of a period ends at most 8 places later.
    check(period < (int64_t(1) << 31) - 8, op, ": expected fewer than 2^31 - 8 elements from the ",
          "dimension of pos_weight ", shape(pos_weight), " on, got inputs ", shape(inputs));
  }
};

// Calls f(T{}, view), where T is the element type of `inputs`, which is contiguous, and `view` is a
// ClassTargets for integer targets, else an ElementTargets.
template <typename F>
inline void dispatch_focal(const Tensor& inputs, const FocalTargets& given, const char* op, F&& f) {
  dispatch_floating(inputs.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const Tensor& targets = given.targets;
    const int64_t k = FocalTargets::classes_of(inputs);
    const C* pos_weight = data<C>(given.pos_weight);
    switch (targets.scalar_type()) {
      case ScalarType::Int:
        return f(zero, ClassTargets<C, int32_t>{data<int32_t>(targets), k, nullptr, pos_weight});
      case ScalarType::Long:
        return f(zero, ClassTargets<C, int64_t>{data<int64_t>(targets), k, nullptr, pos_weight});
      default:
        // The ignored value is rounded to the dtype of the targets, as the targets are.
        if (targets.scalar_type() == inputs.scalar_type())
          return f(zero,
                   ElementTargets<T>{data<T>(targets),
                                     {C(T(given.ignored)), pos_weight, given.period, given.inner}});
        check_dtype(targets, FocalTargets::compute_type(inputs), op, "targets");
        return f(zero,
                 ElementTargets<C>{data<C>(targets),
                                   {C(given.ignored), pos_weight, given.period, given.inner}});
    }
  });
}

// Checks the incoming gradient: one number if the op returned a sum, else one per input. The
// gradient of a sum of half-precision inputs may be float32, like the sum.
inline void check_focal_loss_grad(const Tensor& grad, const Tensor& inputs, const char* op) {
  const bool half =
      inputs.scalar_type() == ScalarType::Half || inputs.scalar_type() == ScalarType::BFloat16;
  if (grad.dim() != 0 || !half || grad.scalar_type() != ScalarType::Float)
    check_dtype(grad, inputs.scalar_type(), op, "grad");
  check(grad.dim() == 0 || grad.numel() == inputs.numel(), op, ": grad ", shape(grad),
        " does not fit inputs ", shape(inputs));
}

}  // namespace retinanet
