// Sigmoid focal loss on the CPU: one pass over the logits, split over threads by fixed chunks of
// elements, so that the sum does not depend on the number of threads.
#include <algorithm>

#include "common/half.h"
#include "common/huge_pages.h"
#include "focal_loss_cpu_strips.h"

namespace retinanet {
namespace {

// Sets the block's targets for the elements begin .. begin + size - 1.
template <typename C, typename Label>
void set_targets(FocalBlock<C>& block, const ClassTargets<C, Label>& targets, int64_t begin,
                 int size) {
  set_rows(block, targets, begin, size);
}

template <typename C, typename Target>
void set_targets(FocalBlock<C>& block, const DenseTargets<Target>& targets, int64_t begin,
                 int size) {
  const C* values = widened(targets.data + begin, size, block.target);
  fill(block.weight, size, C(1));
  int soft = 0;
  vectorised([&soft, values, size, code = block.code](auto) ALWAYS_INLINE {
    int found = 0;
    for (int i = 0; i < size; ++i) {
      code[i] = values[i] == C(1);
      found |= values[i] != C(0) && values[i] != C(1);
    }
    soft = found;
  });
  block.hit = 1;
  block.soft = soft != 0;
  if (soft && values != block.target) std::copy(values, values + size, block.target);
}

// Calls f(begin, size, block) for the blocks of [begin, end), with their targets set.
template <typename C, typename View, typename F>
void for_blocks(const View& view, int64_t begin, int64_t end, F&& f) {
  FocalBlock<C> block;
  for (; begin < end; begin += kBlock) {
    const int size = int(std::min<int64_t>(kBlock, end - begin));
    set_targets(block, view, begin, size);
    f(begin, size, block);
  }
}

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
  const Tensor x = contiguous_aligned(inputs), t = contiguous_aligned(targets);
  const int64_t n = x.numel();
  const ScalarType sum_dtype =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = reduce ? torch::stable::new_empty(x, {}, sum_dtype) : torch::stable::empty_like(x);
  if (!reduce) advise_huge_pages(out);
  dispatch_focal(x, t, "sigmoid_focal_loss", [&](auto zero, const auto view) {
    using T = decltype(zero);
    using C = Compute<T>;
    const auto focal = Focal<C>::make(alpha, gamma);
    const T* xp = data<T>(x);
    T* op = reduce ? nullptr : data<T>(out);
    std::vector<double> partial(reduce ? (n + kChunk - 1) / kChunk : 0);
    for_chunks(n, [&](int64_t chunk, int64_t begin, int64_t end) {
      alignas(64) C logits[kBlock], losses[kBlock];
      double sum = 0;
      for_blocks<C>(view, begin, end, [&](int64_t i, int size, const FocalBlock<C>& block) {
        const C* x = widened(xp + i, size, logits);
        if (reduce) {
          focal_losses(focal, block, x, size, losses);
          sum += block_sum(losses, size);
        } else {
          write(op + i, size, [&](C* out) { focal_losses(focal, block, x, size, out); });
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
                                       const Tensor& targets, double alpha, double gamma) {
  check_focal_loss(inputs, targets, "sigmoid_focal_loss_backward");
  check_focal_loss_grad(grad, inputs, "sigmoid_focal_loss_backward");
  const Tensor g = contiguous_aligned(grad), x = contiguous_aligned(inputs),
               t = contiguous_aligned(targets);
  Tensor out = torch::stable::empty_like(x);
  advise_huge_pages(out);
  dispatch_focal(x, t, "sigmoid_focal_loss_backward", [&](auto zero, const auto view) {
    using T = decltype(zero);
    using C = Compute<T>;
    const auto focal = Focal<C>::make(alpha, gamma);
    const T* xp = data<T>(x);
    T* op = data<T>(out);
    // The gradient of a sum is one number in the dtype of the sum; that of "none" has the logits'
    // shape and dtype.
    const bool shared = g.dim() == 0;
    const C scale = !shared                              ? C(1)
                    : g.scalar_type() == x.scalar_type() ? widen(*data<T>(g))
                                                         : *data<C>(g);
    const T* gp = data<T>(g);
    for_chunks(x.numel(), [&](int64_t, int64_t begin, int64_t end) {
      alignas(64) C logits[kBlock];
      for_blocks<C>(view, begin, end, [&](int64_t i, int size, FocalBlock<C>& block) {
        if (!shared) {
          vectorised([&](auto) ALWAYS_INLINE {
            for (int j = 0; j < size; ++j) block.weight[j] *= widen(gp[i + j]);
          });
        }
        const C* x = widened(xp + i, size, logits);
        write(op + i, size, [&](C* out) { focal_gradients(focal, block, x, scale, size, out); });
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
