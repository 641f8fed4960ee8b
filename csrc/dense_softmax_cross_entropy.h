// Softmax cross-entropy of the anchors of a classification head, for both backends:
//
//     loss = log(sum_k exp(x_k)) - x_t = log(sum_k exp(x_k - m)) + (m - x_t),    m = max_k x_k
//     dloss/dx_k = exp(x_k - m) / sum_j exp(x_j - m) - (1 if k = t, else 0)
//
// No exponent is positive, so nothing overflows. A target of -2 is ignored: its anchor has loss and
// gradient 0, whatever its logits. Any other target outside 0 .. K-1 makes both NaN.
#pragma once

#include <cmath>
#include <limits>

#include "common/elementary.h"
#include "common/heads.h"

namespace retinanet {

// exp(x_k - m) of a logit x_k that is not above m. M is the arithmetic (simd.h).
//
// Terms below exp(-87) are 0, so that none is subnormal. exp_minus computes these as well, in two
// more steps. Anchors are independent, so the latency of a sum by terms is hidden.
template <typename M>
VECTORISED float softmax_term(float most, float logit) {
  const float a = most - logit;
  // As in exp_minus, but 2^n is a normal number, whose exponent is n + 127.
  constexpr float kRound = 12582912.f + 127.f;
  const float shifted = M::multiply_add(a, -kLog2E, kRound), n = shifted - kRound;
  float r = M::multiply_add(n, -kLn2High, -a);
  r = M::multiply_add(n, -kLn2Low, r);
  using K = ExpSeries;
  float p = M::multiply_add(K::k6, r, K::k5);
  p = M::multiply_add(p, r, K::k4);
  p = M::multiply_add(p, r, K::k3);
  p = M::multiply_add(p, r, K::k2);
  p = M::multiply_add(p, r, 1.f);
  p = M::multiply_add(p, r, 1.f);
  const float term = p * std::bit_cast<float>(std::bit_cast<uint32_t>(shifted) << 23);
  return kept(term, !(kMaxByTerms < a));  // true for NaN
}

template <typename M>
VECTORISED double softmax_term(double most, double logit) {
  return std::exp(logit - most);
}

// What is known of an anchor's logits. The forward op saves it for the backward op.
template <typename C>
struct Softmax {
  C most;  // the highest logit, m
  C sum;   // of the terms of all classes

  // The loss of an anchor whose target has this logit.
  HOST_DEVICE C loss(C logit) const { return std::log(sum) + (most - logit); }
};

HOST_DEVICE bool is_class(int target, int64_t num_classes) {
  return target >= 0 && target < num_classes;
}

// The loss of an anchor whose target is not a class.
template <typename C>
HOST_DEVICE C loss_without_class(int target) {
  return target == kIgnored ? C(0) : std::numeric_limits<C>::quiet_NaN();
}

// The gradient of an anchor's logits.
template <typename C>
struct SoftmaxGradient {
  C most;   // as in Softmax
  C scale;  // factor of the terms: 0 if the gradient is 0 whatever the logits, NaN if it is NaN
  C grad;   // the incoming gradient

  static HOST_DEVICE SoftmaxGradient make(const Softmax<C>& softmax, C grad, int target,
                                          int64_t num_classes) {
    if (grad == C(0) || !is_class(target, num_classes))
      return {C(0), grad == C(0) ? C(0) : loss_without_class<C>(target), grad};
    return {softmax.most, grad / softmax.sum, grad};
  }

  HOST_DEVICE bool counts() const { return scale != C(0); }

  // The gradient of a logit of an anchor that counts; `is_target` tells that of the target.
  template <typename M>
  VECTORISED C of(C logit, bool is_target) const {
    return softmax_term<M>(most, logit) * scale - (is_target ? grad : C(0));
  }
};

// The checked arguments of the forward and the backward op.
struct CrossEntropyArguments {
  HeadTensors heads;
  Tensor targets;                // [N, A] int32
  int64_t num_classes, anchors;  // `anchors` counts those of one image

  CrossEntropyArguments(const std::vector<Tensor>& cls_logits, const Tensor& targets_,
                        int64_t num_classes_, const char* op)
      : heads(cls_logits, op, "cls_logits"),
        targets(contiguous_aligned(targets_)),
        num_classes(num_classes_),
        anchors(num_classes > 0 ? heads.elements / num_classes : 0) {
    check(num_classes > 0, op, ": expected at least 1 class, got ", num_classes);
    for (const Tensor& t : heads.tensors)
      check(t.size(1) % num_classes == 0, op, ": cls_logits ", shape(t), " do not fit ",
            num_classes, " classes");
    check_shape(targets, {heads.images, anchors}, op, "targets");
    check_dtype(targets, ScalarType::Int, op, "targets");
  }

  // The results of the forward op: the loss, and `softmax`, which holds the highest logit and the
  // sum of the terms of each anchor.
  Tensor new_loss() const {
    return empty_tensor(targets, {heads.images, anchors}, heads.compute_dtype());
  }
  Tensor new_softmax() const {
    return empty_tensor(targets, {heads.images, anchors, 2}, heads.compute_dtype());
  }

  // Checks the incoming gradient, which is that of the loss, and what the forward op has saved.
  void check_backward(const Tensor& grad, const Tensor& softmax, const char* op) const {
    check_shape(grad, {heads.images, anchors}, op, "grad");
    check_dtype(grad, heads.compute_dtype(), op, "grad");
    check_shape(softmax, {heads.images, anchors, 2}, op, "softmax");
    check_dtype(softmax, heads.compute_dtype(), op, "softmax");
  }
};

}  // namespace retinanet
