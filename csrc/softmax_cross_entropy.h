// Softmax cross-entropy of rows of logits, for both backends:
//
//     loss = log(sum_k exp(x_k)) - x_t = log(sum_k exp(x_k - m)) + (m - x_t),    m = max_k x_k
//     dloss/dx_k = exp(x_k - m) / sum_j exp(x_j - m) - (1 if k = t, else 0)
//
// No exponent is positive, so nothing overflows. A target of -2 is ignored: its row has loss and
// gradient 0, whatever its logits. Any other target outside 0 .. K-1 makes both NaN.
#pragma once

#include <cmath>
#include <limits>

#include "common/checks.h"

namespace retinanet {

// What is known of a row of logits.
template <typename C>
struct SoftmaxRow {
  C most;  // the highest logit, m
  C sum;   // of all exp(x_k - m)

  // The loss for the target's logit.
  HOST_DEVICE C loss(C logit) const { return std::log(sum) + (most - logit); }
};

HOST_DEVICE bool is_class(int target, int64_t classes) { return target >= 0 && target < classes; }

// The loss of a row whose target is not a class.
template <typename C>
HOST_DEVICE C loss_without_class(int target) {
  return target == kIgnored ? C(0) : std::numeric_limits<C>::quiet_NaN();
}

// The op's arguments, checked once for both backends.
struct CrossEntropyArguments {
  Tensor inputs, targets;
  int64_t rows, classes;

  CrossEntropyArguments(const Tensor& inputs, const Tensor& targets, const char* op)
      : inputs(contiguous_aligned(inputs)), targets(contiguous_aligned(targets)) {
    bool ok = inputs.dim() > 0 && targets.dim() == inputs.dim() - 1;
    for (int64_t d = 0; ok && d < targets.dim(); ++d) ok = targets.size(d) == inputs.size(d);
    check(ok, op, ": targets ", shape(targets), " do not fit inputs ", shape(inputs));
    check_dtype(targets, ScalarType::Int, op, "targets");
    rows = targets.numel();
    classes = inputs.size(inputs.dim() - 1);
    check(classes > 0 && classes < (int64_t(1) << 31), op,
          ": expected 1 to 2^31 - 1 classes, got inputs ", shape(inputs));
  }

  ScalarType loss_dtype() const {
    return inputs.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  // Checks the incoming gradient, which has the shape and dtype of the loss.
  void check_grad(const Tensor& grad, const char* op) const {
    bool ok = grad.dim() == targets.dim();
    for (int64_t d = 0; ok && d < targets.dim(); ++d) ok = grad.size(d) == targets.size(d);
    check(ok, op, ": grad ", shape(grad), " does not fit targets ", shape(targets));
    check_dtype(grad, loss_dtype(), op, "grad");
  }
};

}  // namespace retinanet
