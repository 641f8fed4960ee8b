// Softmax cross-entropy read from the heads' own tensors on the CPU.
//
// Work: a thread takes a chunk of one level at a time. Vectorised loops have one anchor in each
// lane.
//
//   contiguous: cells of one anchor,                  channels_last: rows of K logits, which the
//   with one strip in each of its K planes            forward pass copies to a buffer of K strips
//
//     plane 0      ....[ strip 0   ]....                ....[row|row|row| ... |row]....
//     plane 1      ....[ strip 1   ]....
//     ...
//     plane K-1    ....[ strip K-1 ]....
//
// Bytes moved: the forward pass reads the logits twice, the second time from the cache. The
// backward pass writes each gradient once, and reads the logits of a chunk of cells, or of a row,
// only if one of its anchors counts. Deterministic: sums over classes have a fixed order, and
// anchors are independent.
#include <algorithm>
#include <cstring>

#include "common/half.h"
#include "common/huge_pages.h"
#include "dense_softmax_cross_entropy.h"

namespace retinanet {
namespace {

constexpr int kLanes = 16;
constexpr int kChunk = 128;  // anchors; their logits fit into the L2 cache
static_assert(kChunk % kLanes == 0);

// Anchors of a level: cells [begin, end) of anchor `anchor` of a contiguous level, or rows
// [begin, end) of a channels_last level.
struct Chunk {
  int level;
  int64_t anchor, begin, end;

  int size() const { return int(end - begin); }
};

// The chunks of one image.
template <typename T>
std::vector<Chunk> chunks_of(const HeadLevels<T>& levels, int64_t num_classes) {
  std::vector<Chunk> chunks;
  for (int l = 0; l < levels.count; ++l) {
    const HeadLevel<T>& level = levels.level[l];
    const int64_t per_cell = level.channels / num_classes;
    const int64_t runs = level.channels_last ? 1 : per_cell;
    const int64_t length = level.channels_last ? level.area * per_cell : level.area;
    for (int64_t a = 0; a < runs; ++a)
      for (int64_t begin = 0; begin < length; begin += kChunk)
        chunks.push_back({l, a, begin, std::min(length, begin + kChunk)});
  }
  return chunks;
}

// Where the anchors of a chunk are.
struct Place {
  int64_t first, step;  // numbers of the anchors of the batch: first, first + step, ...
  int64_t offset;       // of the logit of the first anchor and class in the level's tensor
};

template <typename T>
Place place_of(const CrossEntropyArguments& args, const HeadLevel<T>& level, int64_t image,
               const Chunk& chunk) {
  const int64_t num_classes = args.num_classes;
  const int64_t first = image * args.anchors + level.first / num_classes;
  const int64_t offset = image * level.size();
  if (level.channels_last) return {first + chunk.begin, 1, offset + chunk.begin * num_classes};
  const int64_t per_cell = level.channels / num_classes;
  return {first + chunk.begin * per_cell + chunk.anchor, per_cell,
          offset + chunk.anchor * num_classes * level.area + chunk.begin};
}

// Calls f(level, place, chunk) for every chunk of every image, on several threads.
template <typename T, typename F>
void for_chunks(const CrossEntropyArguments& args, const HeadLevels<T>& levels, F&& f) {
  const std::vector<Chunk> chunks = chunks_of(levels, args.num_classes);
  const int64_t count = int64_t(chunks.size());
  torch::stable::parallel_for(0, args.heads.images * count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Chunk& chunk = chunks[i % count];
      const HeadLevel<T>& level = levels.level[chunk.level];
      f(level, place_of(args, level, i / count, chunk), chunk);
    }
  });
}

// Prefetches a strip. The hardware prefetcher cannot predict the jump from plane to plane.
template <typename T>
ALWAYS_INLINE inline void prefetch(const T* x, int cells) {
  constexpr int kLine = 64 / int(sizeof(T));
  for (int i = 0; i < cells; i += kLine) __builtin_prefetch(x + i);
}

constexpr int kAhead = 8;  // planes from a strip to the one that is prefetched

// Sets the maximum and the sum of each of `cells` anchors, whose strips start at x, x + area, ...
// A NaN logit makes the sum NaN.
template <typename M, typename C, typename T>
ALWAYS_INLINE inline void softmax_of_cells(const T* x, int64_t area, int64_t num_classes, int cells,
                                           C* __restrict__ most, C* __restrict__ sum) {
  const auto higher = [](C a, C b) ALWAYS_INLINE { return a < b ? b : a; };
  for (int i = 0; i < cells; ++i) most[i] = widen(x[i]);
  int64_t k = 1;
  for (; k + 4 <= num_classes; k += 4) {
    const T *a = x + k * area, *b = a + area, *c = b + area, *d = c + area;
    for (int p = 0; p < 4 && k + kAhead + p < num_classes; ++p)
      prefetch(a + (kAhead + p) * area, cells);
    for (int i = 0; i < cells; ++i)
      most[i] = higher(most[i],
                       higher(higher(widen(a[i]), widen(b[i])), higher(widen(c[i]), widen(d[i]))));
  }
  for (; k < num_classes; ++k)
    for (int i = 0; i < cells; ++i) most[i] = higher(most[i], widen(x[k * area + i]));
  for (int i = 0; i < cells; ++i) sum[i] = C(0);
  for (k = 0; k + 2 <= num_classes; k += 2) {
    const T *a = x + k * area, *b = a + area;
    for (int i = 0; i < cells; ++i)
      sum[i] += softmax_term<M>(most[i], C(widen(a[i]))) + softmax_term<M>(most[i], C(widen(b[i])));
  }
  if (k < num_classes)
    for (int i = 0; i < cells; ++i) sum[i] += softmax_term<M>(most[i], C(widen(x[k * area + i])));
}

std::tuple<Tensor, Tensor> dense_softmax_cross_entropy_cpu(std::vector<Tensor> cls_logits,
                                                           const Tensor& targets,
                                                           int64_t num_classes) {
  const char* op = "dense_softmax_cross_entropy";
  const CrossEntropyArguments args(cls_logits, targets, num_classes, op);
  Tensor out = args.new_loss(), softmax = args.new_softmax();
  dispatch_floating(args.heads.dtype(), op, [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const int* target = data<int>(args.targets);
    C* loss = data<C>(out);
    auto* saved = reinterpret_cast<Softmax<C>*>(data<C>(softmax));
    const HeadLevels<T> levels = args.heads.view<T>();
    for_chunks(args, levels, [&](const HeadLevel<T>& level, const Place& at, const Chunk& chunk) {
      const T* x = level.data + at.offset;
      const int size = chunk.size(), whole = (size + kLanes - 1) / kLanes * kLanes;
      alignas(64) C most[kChunk], sum[kChunk];
      const auto set_softmax = [&](const auto* x, int64_t area, int cells) {
        vectorised([=, most = &most[0], sum = &sum[0]](auto arithmetic) ALWAYS_INLINE {
          softmax_of_cells<decltype(arithmetic)>(x, area, num_classes, cells, most, sum);
        });
      };
      if (level.channels_last) {
        std::vector<C> strips(num_classes * whole);
        for (int64_t k = 0; k < num_classes; ++k)
          for (int i = 0; i < size; ++i) strips[k * whole + i] = widen(x[i * num_classes + k]);
        set_softmax(strips.data(), whole, whole);
      } else {
        // Loops over whole lanes are faster. The lanes behind the last cell read logits
        // of the next planes, and their results are not used.
        const int64_t end = at.offset + (num_classes - 1) * level.area + whole;
        set_softmax(x, level.area, end <= args.heads.images * level.size() ? whole : size);
      }
      const int64_t cell_step = level.channels_last ? num_classes : 1;
      const int64_t class_step = level.channels_last ? 1 : level.area;
      for (int i = 0; i < size; ++i) {
        const int64_t anchor = at.first + i * at.step;
        const int t = target[anchor];
        saved[anchor] = {most[i], sum[i]};
        loss[anchor] = is_class(t, num_classes)
                           ? saved[anchor].loss(widen(x[i * cell_step + t * class_step]))
                           : loss_without_class<C>(t);
      }
    });
  });
  return {out, softmax};
}

// Sets the gradients of `cells` anchors, whose strips start at x and `to`, as if none of them were
// that of a target.
template <typename M, typename C, typename T>
ALWAYS_INLINE inline void gradients_of_cells(const T* x, T* __restrict__ to, int64_t area,
                                             int64_t num_classes, int cells,
                                             const C* __restrict__ most,
                                             const C* __restrict__ scale) {
  for (int64_t k = 0; k < num_classes; ++k, x += area, to += area) {
    if (k + kAhead < num_classes) prefetch(x + kAhead * area, cells);
    for (int i = 0; i < cells; ++i) {
      const SoftmaxGradient<C> gradient{most[i], scale[i], C(0)};
      const C value = gradient.template of<M>(widen(x[i]), false);
      to[i] = narrowed<T>(kept(value, gradient.counts()));
    }
  }
}

std::vector<Tensor> dense_softmax_cross_entropy_backward_cpu(const Tensor& grad,
                                                             std::vector<Tensor> cls_logits,
                                                             const Tensor& targets,
                                                             const Tensor& softmax,
                                                             int64_t num_classes) {
  const char* op = "dense_softmax_cross_entropy_backward";
  const CrossEntropyArguments args(cls_logits, targets, num_classes, op);
  args.check_backward(grad, softmax, op);
  const Tensor all_grads = contiguous_aligned(grad), all_softmax = contiguous_aligned(softmax);
  std::vector<Tensor> out = args.heads.empty_like();
  for (Tensor& t : out) advise_huge_pages(t);
  dispatch_floating(args.heads.dtype(), op, [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const int* target = data<int>(args.targets);
    const C* grads = data<C>(all_grads);
    const auto* saved = reinterpret_cast<const Softmax<C>*>(data<C>(all_softmax));
    const auto gradient_of = [=](int64_t anchor) ALWAYS_INLINE {
      return SoftmaxGradient<C>::make(saved[anchor], grads[anchor], target[anchor], num_classes);
    };
    // Sets the gradient of the target's logit.
    const auto finish = [=](int64_t anchor, const SoftmaxGradient<C>& gradient, const T* logits,
                            T* to, int64_t step) ALWAYS_INLINE {
      const int t = target[anchor];
      if (!gradient.counts() || !is_class(t, num_classes)) return;
      const C logit = widen(logits[t * step]);
      to[t * step] = narrowed<T>(gradient.template of<BaselineArithmetic>(logit, true));
    };
    const HeadLevels<T> levels = args.heads.view<T>();
    LevelOutputs<T> results;
    for (size_t l = 0; l < out.size(); ++l) results.data[l] = data<T>(out[l]);
    for_chunks(args, levels, [&](const HeadLevel<T>& level, const Place& at, const Chunk& chunk) {
      const T* x = level.data + at.offset;
      T* to = results.data[chunk.level] + at.offset;
      const int size = chunk.size();
      if (level.channels_last) {
        vectorised([=](auto arithmetic) ALWAYS_INLINE {
          for (int i = 0; i < size; ++i) {
            const auto gradient = gradient_of(at.first + i);
            const T* row = x + i * num_classes;
            T* __restrict__ to_row = to + i * num_classes;
            if (!gradient.counts()) {
              std::memset(to_row, 0, size_t(num_classes) * sizeof(T));
              continue;
            }
            for (int64_t k = 0; k < num_classes; ++k)
              to_row[k] =
                  narrowed<T>(gradient.template of<decltype(arithmetic)>(widen(row[k]), false));
            finish(at.first + i, gradient, row, to_row, 1);
          }
        });
        return;
      }
      const int64_t area = level.area;
      SoftmaxGradient<C> gradients[kChunk];
      alignas(64) C most[kChunk], scale[kChunk];
      bool any = false;
      for (int i = 0; i < size; ++i) {
        gradients[i] = gradient_of(at.first + i * at.step);
        most[i] = gradients[i].most;
        scale[i] = gradients[i].scale;
        any |= gradients[i].counts();
      }
      if (!any) {
        for (int64_t k = 0; k < num_classes; ++k)
          std::memset(to + k * area, 0, size_t(size) * sizeof(T));
        return;
      }
      vectorised([=, most = &most[0], scale = &scale[0]](auto arithmetic) ALWAYS_INLINE {
        gradients_of_cells<decltype(arithmetic)>(x, to, area, num_classes, size, most, scale);
      });
      for (int i = 0; i < size; ++i)
        finish(at.first + i * at.step, gradients[i], x + i, to + i, area);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("dense_softmax_cross_entropy", TORCH_BOX(&dense_softmax_cross_entropy_cpu));
  m.impl("dense_softmax_cross_entropy_backward",
         TORCH_BOX(&dense_softmax_cross_entropy_backward_cpu));
}

}  // namespace retinanet
