// Sigmoid focal loss on the CPU: one pass over the logits, split over threads by fixed chunks of
// elements, so that the sum does not depend on the number of threads.
#include <algorithm>

#include "focal_loss.h"

namespace retinanet {
namespace {

constexpr int64_t kChunk = 1 << 14;

// Calls f(chunk, begin, end) for every chunk of `n` elements.
template <typename F>
void for_chunks(int64_t n, F&& f) {
  torch::stable::parallel_for(0, (n + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) f(c, c * kChunk, std::min(n, (c + 1) * kChunk));
  });
}

Tensor sigmoid_focal_loss_cpu(const Tensor& inputs, const Tensor& targets, double alpha,
                              double gamma, bool reduce) {
  check_focal_loss(inputs, targets, "sigmoid_focal_loss");
  const Tensor x = packed(inputs), t = packed(targets);
  const int64_t n = x.numel();
  const ScalarType sum_dtype =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = reduce ? torch::stable::new_empty(x, {}, sum_dtype) : torch::stable::empty_like(x);
  dispatch_focal(x, t, "sigmoid_focal_loss", [&](auto zero, const auto view) {
    using T = decltype(zero);
    using C = Compute<T>;
    const Focal<C> focal{C(alpha), C(gamma)};
    const T* xp = data<T>(x);
    if (!reduce) {
      T* op = data<T>(out);
      for_chunks(n, [&](int64_t, int64_t begin, int64_t end) {
        auto target = view.at(begin);
        for (int64_t i = begin; i < end; ++i) {
          op[i] = T(target.loss(focal, C(xp[i])));
          if (i + 1 < end) target.advance();
        }
      });
      return;
    }
    std::vector<double> partial((n + kChunk - 1) / kChunk);
    for_chunks(n, [&](int64_t chunk, int64_t begin, int64_t end) {
      double sum = 0;
      auto target = view.at(begin);
      for (int64_t i = begin; i < end; ++i) {
        sum += target.loss(focal, C(xp[i]));
        if (i + 1 < end) target.advance();
      }
      partial[chunk] = sum;
    });
    double sum = 0;
    for (const double p : partial) sum += p;
    *data<C>(out) = C(sum);
  });
  return out;
}

Tensor sigmoid_focal_loss_backward_cpu(const Tensor& grad, const Tensor& inputs,
                                       const Tensor& targets, double alpha, double gamma) {
  check_focal_loss(inputs, targets, "sigmoid_focal_loss_backward");
  check_focal_loss_grad(grad, inputs, "sigmoid_focal_loss_backward");
  const Tensor g = packed(grad), x = packed(inputs), t = packed(targets);
  Tensor out = torch::stable::empty_like(x);
  dispatch_focal(x, t, "sigmoid_focal_loss_backward", [&](auto zero, const auto view) {
    using T = decltype(zero);
    using C = Compute<T>;
    const Focal<C> focal{C(alpha), C(gamma)};
    const T* xp = data<T>(x);
    T* op = data<T>(out);
    // The gradient of a sum is one number in the dtype of the sum; that of "none" has the logits'
    // shape and dtype.
    const bool shared = g.dim() == 0;
    const C scale = !shared                              ? C(0)
                    : g.scalar_type() == x.scalar_type() ? C(*data<T>(g))
                                                         : *data<C>(g);
    const T* gp = data<T>(g);
    for_chunks(x.numel(), [&](int64_t, int64_t begin, int64_t end) {
      auto target = view.at(begin);
      for (int64_t i = begin; i < end; ++i) {
        op[i] = T((shared ? scale : C(gp[i])) * target.grad(focal, C(xp[i])));
        if (i + 1 < end) target.advance();
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss_cpu));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward_cpu));
}

}  // namespace retinanet
