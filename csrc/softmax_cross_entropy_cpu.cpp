// Softmax cross-entropy on the CPU. Threads take chunks of rows.
//
// Loops over a row work on kLanes logits at a time. The last kLanes logits of a row overlap the
// ones before them, unless its length is a multiple of kLanes:
//
//   row      0 ........ 15 | 16 ....... 31 | 32 . 35
//   lanes    0 ........ 15 | 16 ....... 31
//                              20 .............. 35       of which 32 .. 35 are added to the sum
//
// Maxima and sums are kept in kLanes partial results, which are combined in a fixed order. No
// result depends on the number of threads.
#include <algorithm>
#include <cstring>

#include "common/elementary.h"
#include "common/half.h"
#include "common/huge_pages.h"
#include "softmax_cross_entropy.h"

namespace retinanet {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kChunk = 1 << 15;  // least number of logits of a thread

// kLanes numbers, on which operators work one by one. The compiler does not
// vectorise a maximum of floats by itself, because of NaN.
template <typename C>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float Type __attribute__((vector_size(kLanes * sizeof(float))));
};
template <>
struct LanesOf<double> {
  typedef double Type __attribute__((vector_size(kLanes * sizeof(double))));
};

// Combines kLanes numbers pairwise.
template <typename C, typename F>
ALWAYS_INLINE inline C folded(const typename LanesOf<C>::Type& lanes, F f) {
  C half[kLanes / 2];
  for (int j = 0; j < kLanes / 2; ++j) half[j] = f(lanes[j], lanes[j + kLanes / 2]);
  const C a = f(f(half[0], half[4]), f(half[2], half[6]));
  return f(a, f(f(half[1], half[5]), f(half[3], half[7])));
}

// Room for the logits and the exponentials of a row.
template <typename C>
struct RowBuffer {
  std::vector<C> logits, e;

  explicit RowBuffer(int64_t classes)
      : logits(std::max<int64_t>(classes, kLanes), -std::numeric_limits<C>::infinity()),
        e(logits.size()) {}
};

// Returns the maximum and the sum of a row, and writes its exponentials to `e`. Both `e` and
// `logits` are those of a RowBuffer. A NaN logit makes the sum NaN.
template <typename M, typename C, typename T>
ALWAYS_INLINE inline SoftmaxRow<C> softmax_row(const T* row, int64_t classes,
                                               C* __restrict__ logits, C* __restrict__ e) {
  using Lanes = typename LanesOf<C>::Type;
  const C* x = logits;
  if (std::is_same_v<T, C> && classes >= kLanes) {
    x = reinterpret_cast<const C*>(row);
  } else {
    for (int64_t k = 0; k < classes; ++k) logits[k] = widen(row[k]);
  }
  const int64_t size = std::max<int64_t>(classes, kLanes);  // short rows are padded with -inf
  const int64_t whole = size / kLanes * kLanes, last = size - kLanes;
  Lanes most, sums, v;
  std::memcpy(&most, x + last, sizeof(Lanes));
  for (int64_t k = 0; k < whole; k += kLanes) {
    std::memcpy(&v, x + k, sizeof(Lanes));
    most = most < v ? v : most;
  }
  const C highest = folded<C>(most, [](C a, C b) ALWAYS_INLINE { return a < b ? b : a; });
  for (int64_t k = 0; k < whole; ++k) e[k] = exp_minus<M>(highest - x[k]);
  std::memcpy(&sums, e, sizeof(Lanes));
  for (int64_t k = kLanes; k < whole; k += kLanes) {
    std::memcpy(&v, e + k, sizeof(Lanes));
    sums += v;
  }
  if (whole < size) {
    C added[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      const C value = exp_minus<M>(highest - x[last + j]);
      e[last + j] = value;
      added[j] = last + j < whole ? C(0) : value;
    }
    std::memcpy(&v, added, sizeof(Lanes));
    sums += v;
  }
  return {highest, folded<C>(sums, [](C a, C b) ALWAYS_INLINE { return a + b; })};
}

Tensor softmax_cross_entropy_cpu(const Tensor& inputs, const Tensor& targets) {
  const CrossEntropyArguments args(inputs, targets, "softmax_cross_entropy");
  Tensor out = empty_tensor(args.targets, args.targets.sizes(), args.loss_dtype());
  const int64_t classes = args.classes;
  dispatch_floating(inputs.scalar_type(), "softmax_cross_entropy", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const T* x = data<T>(args.inputs);
    const int* target = data<int>(args.targets);
    C* loss = data<C>(out);
    const int64_t least = kChunk / classes + 1;
    torch::stable::parallel_for(0, args.rows, least, [&](int64_t begin, int64_t end) {
      RowBuffer<C> buffer(classes);
      vectorised([=, logits = buffer.logits.data(),
                  e = buffer.e.data()](auto arithmetic) ALWAYS_INLINE {
        for (int64_t r = begin; r < end; ++r) {
          if (!is_class(target[r], classes)) {
            loss[r] = loss_without_class<C>(target[r]);
            continue;
          }
          const T* row = x + r * classes;
          const SoftmaxRow<C> softmax = softmax_row<decltype(arithmetic)>(row, classes, logits, e);
          loss[r] = softmax.loss(widen(row[target[r]]));
        }
      });
    });
  });
  return out;
}

Tensor softmax_cross_entropy_backward_cpu(const Tensor& grad, const Tensor& inputs,
                                          const Tensor& targets) {
  const char* op = "softmax_cross_entropy_backward";
  const CrossEntropyArguments args(inputs, targets, op);
  args.check_grad(grad, op);
  const Tensor g = contiguous_aligned(grad);
  Tensor out = empty_tensor_like(args.inputs);
  advise_huge_pages(out);
  const int64_t classes = args.classes;
  dispatch_floating(inputs.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const T* x = data<T>(args.inputs);
    const int* target = data<int>(args.targets);
    const C* grads = data<C>(g);
    T* result = data<T>(out);
    const int64_t least = kChunk / classes + 1;
    torch::stable::parallel_for(0, args.rows, least, [&](int64_t begin, int64_t end) {
      RowBuffer<C> buffer(classes);
      vectorised([=, logits = buffer.logits.data(),
                  e = buffer.e.data()](auto arithmetic) ALWAYS_INLINE {
        for (int64_t r = begin; r < end; ++r) {
          T* to = result + r * classes;
          if (grads[r] == C(0) || !is_class(target[r], classes)) {
            const C value = grads[r] == C(0) ? C(0) : loss_without_class<C>(target[r]);
            std::fill(to, to + classes, narrowed<T>(value));
            continue;
          }
          const T* row = x + r * classes;
          const SoftmaxRow<C> softmax = softmax_row<decltype(arithmetic)>(row, classes, logits, e);
          const C scale = grads[r] / softmax.sum;
          for (int64_t k = 0; k < classes; ++k) to[k] = narrowed<T>(e[k] * scale);
          to[target[r]] = narrowed<T>(e[target[r]] * scale - grads[r]);
        }
      });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("softmax_cross_entropy", TORCH_BOX(&softmax_cross_entropy_cpu));
  m.impl("softmax_cross_entropy_backward", TORCH_BOX(&softmax_cross_entropy_backward_cpu));
}

}  // namespace retinanet
