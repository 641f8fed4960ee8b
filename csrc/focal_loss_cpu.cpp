// Sigmoid focal loss on the CPU, in one pass over the logits.
//
// Work: a thread takes a chunk of 16,384 consecutive logits at a time, and goes through it in
// strips of 1,024. Bytes moved: each logit (and each elementwise target) is read once, and each
// loss or gradient is written once. Deterministic: chunk boundaries are fixed, every chunk is
// summed in a fixed order, and the chunks' sums are added in order, so that the sum does not depend
// on the number of threads.
#include <algorithm>

#include "common/half.h"
#include "common/huge_pages.h"
#include "focal_loss_cpu_strips.h"

namespace retinanet {
namespace {

// Sets the strip's targets to those of elements [begin, begin + size).
template <typename C, typename Label>
void set_targets(FocalStrip<C>& strip, const ClassTargets<C, Label>& targets, int64_t begin,
                 int size) {
  set_rows(strip, targets, begin, size);
}

// Multiplies the weights of elements [begin, begin + size) by the factors of their classes. They
// are taken in runs, whose factors are equal or follow each other.
template <typename C>
void weigh_positives(FocalStrip<C>& strip, const ElementRules<C>& rules, const C* values,
                     int64_t begin, int size) {
  for (int first = 0; first < size;) {
    const int64_t place = (begin + first) % rules.period;
    const bool consecutive = rules.inner == 1 && rules.period > 1;
    const int64_t left = rules.period == 1 ? size
                         : consecutive     ? rules.period - place
                                           : rules.inner - place % rules.inner;
    const int end = int(std::min<int64_t>(size, first + left));
    const C* factors = rules.pos_weight + place / rules.inner - (consecutive ? first : 0);
    vectorised([=, &strip](auto) ALWAYS_INLINE {
      const C factor = *factors;
      for (int i = first; i < end; ++i)
        weigh_positive(strip, i, factor_of_target(consecutive ? factors[i] : factor, values[i]));
    });
    first = end;
  }
}

template <typename C, typename Target>
void set_targets(FocalStrip<C>& strip, const ElementTargets<Target>& targets, int64_t begin,
                 int size) {
  const ElementRules<C>& rules = targets.rules;
  const C* values = widened(targets.data + begin, size, strip.target);
  fill(strip.weight, size, C(1));
  int soft = 0;
  vectorised([&soft, values, size, code = strip.code, ignored = rules.ignored](auto) ALWAYS_INLINE {
    int any_soft = 0;  // a local variable: the loop would not vectorise over a captured one
    for (int i = 0; i < size; ++i) {
      const bool is_ignored = values[i] == ignored;
      code[i] = is_ignored ? kMasked : int32_t(values[i] == C(1));
      any_soft |= values[i] != C(0) && values[i] != C(1) && !is_ignored;
    }
    soft = any_soft;
  });
  strip.hit = 1;
  strip.soft = soft != 0;
  if (rules.pos_weight) weigh_positives(strip, rules, values, begin, size);
  if (soft && values != strip.target) std::copy(values, values + size, strip.target);
}

// Calls f(begin, size, strip) for every strip of the elements [begin, end), with its targets set.
template <typename C, typename View, typename F>
void for_strips(const View& view, int64_t begin, int64_t end, F&& f) {
  FocalStrip<C> strip;
  for (; begin < end; begin += kStrip) {
    const int size = int(std::min<int64_t>(kStrip, end - begin));
    set_targets(strip, view, begin, size);
    f(begin, size, strip);
  }
}

// Calls f(chunk, begin, end) for every chunk of `n` elements, on several threads.
template <typename F>
void for_chunks(int64_t n, F&& f) {
  torch::stable::parallel_for(0, (n + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) f(c, c * kChunk, std::min(n, (c + 1) * kChunk));
  });
}

Tensor sigmoid_focal_loss_cpu(const Tensor& inputs, const Tensor& targets,
                              std::optional<Tensor> pos_weight, double alpha, double gamma,
                              std::optional<double> ignore_value, bool reduce) {
  const FocalTargets given("sigmoid_focal_loss", inputs, targets, pos_weight, ignore_value);
  const Tensor x = contiguous_aligned(inputs);
  const int64_t n = x.numel();
  Tensor out = reduce ? empty_tensor(x, {}, FocalTargets::compute_type(x)) : empty_tensor_like(x);
  if (!reduce) advise_huge_pages(out);
  dispatch_focal(x, given, "sigmoid_focal_loss", [&](auto zero, const auto view) {
    using T = decltype(zero);
    using C = Compute<T>;
    const auto focal = Focal<C>::make(alpha, gamma);
    const T* from = data<T>(x);
    T* to = reduce ? nullptr : data<T>(out);
    std::vector<double> partial(reduce ? (n + kChunk - 1) / kChunk : 0);
    for_chunks(n, [&](int64_t chunk, int64_t begin, int64_t end) {
      alignas(64) C logits[kStrip], losses[kStrip];
      double sum = 0;
      for_strips<C>(view, begin, end, [&](int64_t i, int size, const FocalStrip<C>& strip) {
        const C* in = widened(from + i, size, logits);
        if (reduce) {
          focal_losses(focal, strip, in, size, losses);
          sum += pairwise_sum_in_place(losses, size);
        } else {
          write(to + i, size, [&](C* values) { focal_losses(focal, strip, in, size, values); });
        }
      });
      if (reduce) partial[chunk] = sum;
    });
    if (!reduce) return;
    double sum = 0;
    for (const double p : partial) sum += p;
    *data<C>(out) = C(sum);
  });
  return out;
}

Tensor sigmoid_focal_loss_backward_cpu(const Tensor& grad, const Tensor& inputs,
                                       const Tensor& targets, std::optional<Tensor> pos_weight,
                                       double alpha, double gamma,
                                       std::optional<double> ignore_value) {
  const char* op = "sigmoid_focal_loss_backward";
  const FocalTargets given(op, inputs, targets, pos_weight, ignore_value);
  check_focal_loss_grad(grad, inputs, op);
  const Tensor g = contiguous_aligned(grad), x = contiguous_aligned(inputs);
  Tensor out = empty_tensor_like(x);
  advise_huge_pages(out);
  dispatch_focal(x, given, op, [&](auto zero, const auto view) {
    using T = decltype(zero);
    using C = Compute<T>;
    const auto focal = Focal<C>::make(alpha, gamma);
    const T* from = data<T>(x);
    T* to = data<T>(out);
    // With a reduction, the gradient is one number in the dtype of the sum. Without one, it has the
    // shape and dtype of the logits.
    const bool shared = g.dim() == 0;
    const C scale = !shared                              ? C(1)
                    : g.scalar_type() == x.scalar_type() ? widen(*data<T>(g))
                                                         : *data<C>(g);
    const T* grads = data<T>(g);
    for_chunks(x.numel(), [&](int64_t, int64_t begin, int64_t end) {
      alignas(64) C logits[kStrip];
      for_strips<C>(view, begin, end, [&](int64_t i, int size, FocalStrip<C>& strip) {
        if (!shared) {
          vectorised([&](auto) ALWAYS_INLINE {
            for (int j = 0; j < size; ++j) strip.weight[j] *= widen(grads[i + j]);
          });
        }
        const C* in = widened(from + i, size, logits);
        write(to + i, size,
              [&](C* values) { focal_gradients(focal, strip, in, scale, size, values); });
      });
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
