// Focal loss read from the heads' own tensors on the CPU, in one pass over the logits.
//
// Work: a thread takes a chunk of one level at a time, and goes through it in strips.
//
//   channels_last: 16,384 consecutive logits, in       contiguous: up to 1,024 cells of one anchor,
//   strips of 1,024 that ignore row boundaries         with one strip in each of its K planes
//
//     [row|row|row|row|row|row|row|row| ...              plane 0      ....[ strip 0   ]....
//     [ strip 0   | strip 1   | strip 2 ...              plane 1      ....[ strip 1   ]....
//                                                        ...
//                                                        plane K-1    ....[ strip K-1 ]....
//
// Bytes moved: each logit is read once, and the backward pass writes each gradient once. Labels and
// weights are read once per anchor and chunk. Deterministic: chunks do not depend on the number of
// threads, each is summed in a fixed order, and an image adds the sums of its chunks in order.
#include <algorithm>

#include "common/huge_pages.h"
#include "dense_focal_loss.h"
#include "focal_loss_cpu_strips.h"

namespace retinanet {
namespace {

// Elements [begin, end) of a channels_last level, or cells [begin, end) of anchor `anchor` of a
// contiguous level.
struct Chunk {
  int level;
  int64_t anchor, begin, end;
};

// The chunks of one image.
template <typename T>
std::vector<Chunk> chunks_of(const HeadLevels<T>& levels, int64_t num_classes) {
  std::vector<Chunk> chunks;
  for (int l = 0; l < levels.count; ++l) {
    const HeadLevel<T>& level = levels.level[l];
    if (level.channels_last) {
      for (int64_t begin = 0; begin < level.size(); begin += kChunk)
        chunks.push_back({l, 0, begin, std::min(level.size(), begin + kChunk)});
      continue;
    }
    for (int64_t a = 0; a < level.channels / num_classes; ++a)
      for (int64_t begin = 0; begin < level.area; begin += kStrip)
        chunks.push_back({l, a, begin, std::min(level.area, begin + kStrip)});
  }
  return chunks;
}

// Calls f(i, image, chunk) for every chunk of every image, on several threads. i counts the chunks
// of all images.
template <typename F>
void for_chunks(const std::vector<Chunk>& chunks, int64_t images, F&& f) {
  const int64_t per_image = int64_t(chunks.size());
  torch::stable::parallel_for(0, images * per_image, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i, i / per_image, chunks[i % per_image]);
  });
}

// Calls f(offset, size, strip) for every strip of the chunk, with its targets set. `offset` is the
// position in the level's memory. If the next strip is not adjacent in memory, calls
// fetch(offset, size) for it first, because the hardware prefetcher cannot predict the jump.
template <typename T, typename Prefetch, typename F>
void for_strips(const DenseFocalArguments& args, const HeadLevel<T>& level, int64_t image,
                const Chunk& chunk, Prefetch&& fetch, F&& f) {
  using C = Compute<T>;
  const int64_t num_classes = args.num_classes, first = image * level.size();
  const auto targets = args.targets<C>(image, level.first / num_classes);
  const auto smoothing = Smoothing<C>::make(args.label_smoothing);
  FocalStrip<C> strip;
  const auto call = [&](int64_t offset, int size) {
    if (args.soft()) soften(strip, smoothing.positive, smoothing.negative, size);
    f(first + offset, size, strip);
  };
  if (level.channels_last) {
    for (int64_t i = chunk.begin; i < chunk.end; i += kStrip) {
      const int size = int(std::min<int64_t>(kStrip, chunk.end - i));
      set_rows(strip, targets, i, size);
      call(i, size);
    }
    return;
  }
  // The strips of a contiguous level share their cells, so codes and weights are set once: the code
  // is the positive class, and each strip's own class is the hit.
  const int64_t per_cell = level.channels / num_classes;
  const int size = int(chunk.end - chunk.begin);
  for (int i = 0; i < size; ++i) {
    const RowTarget<C> target = targets.row((chunk.begin + i) * per_cell + chunk.anchor);
    strip.code[i] = int32_t(target.positive);
    strip.weight[i] = target.weight;
  }
  for (int64_t k = 0; k < num_classes; ++k) {
    strip.hit = int32_t(k);
    const int64_t offset = (chunk.anchor * num_classes + k) * level.area + chunk.begin;
    if (k + 1 < num_classes) fetch(first + offset + level.area, size);
    call(offset, size);
  }
}

Tensor dense_focal_loss_cpu(std::vector<Tensor> cls_logits, const Tensor& labels,
                            std::optional<Tensor> anchor_weight, int64_t num_classes, double alpha,
                            double gamma, double label_smoothing) {
  const DenseFocalArguments args(cls_logits, labels, anchor_weight, num_classes, label_smoothing,
                                 "dense_focal_loss");
  const int64_t images = args.heads.images;
  Tensor out = empty_tensor(labels, {images}, args.heads.compute_dtype());
  dispatch_floating(args.heads.dtype(), "dense_focal_loss", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const auto focal = Focal<C>::make(alpha, gamma);
    const HeadLevels<T> levels = args.heads.view<T>();
    const std::vector<Chunk> chunks = chunks_of(levels, num_classes);
    std::vector<double> partial(images * chunks.size());
    for_chunks(chunks, images, [&](int64_t i, int64_t image, const Chunk& chunk) {
      const HeadLevel<T>& level = levels.level[chunk.level];
      const T* x = level.data;
      alignas(64) C logits[kStrip], losses[kStrip];
      for_strips(
          args, level, image, chunk, [&](int64_t offset, int size) { prefetch(x + offset, size); },
          [&](int64_t offset, int size, const FocalStrip<C>& strip) {
            focal_losses(focal, strip, widened(x + offset, size, logits), size, losses);
            partial[i] += pairwise_sum_in_place(losses, size);
          });
    });
    for (int64_t n = 0; n < images; ++n) {
      double sum = 0;
      for (size_t i = 0; i < chunks.size(); ++i) sum += partial[n * chunks.size() + i];
      data<C>(out)[n] = C(sum);
    }
  });
  return out;
}

std::vector<Tensor> dense_focal_loss_backward_cpu(const Tensor& grad,
                                                  std::vector<Tensor> cls_logits,
                                                  const Tensor& labels,
                                                  std::optional<Tensor> anchor_weight,
                                                  int64_t num_classes, double alpha, double gamma,
                                                  double label_smoothing) {
  const DenseFocalArguments args(cls_logits, labels, anchor_weight, num_classes, label_smoothing,
                                 "dense_focal_loss_backward");
  args.heads.check_grad(grad, "dense_focal_loss_backward");
  const Tensor scales = contiguous_aligned(grad);
  std::vector<Tensor> out = args.heads.empty_like();
  for (Tensor& t : out) advise_huge_pages(t);
  dispatch_floating(args.heads.dtype(), "dense_focal_loss_backward", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const auto focal = Focal<C>::make(alpha, gamma);
    const HeadLevels<T> levels = args.heads.view<T>();
    const std::vector<Chunk> chunks = chunks_of(levels, num_classes);
    for_chunks(chunks, args.heads.images, [&](int64_t, int64_t image, const Chunk& chunk) {
      const HeadLevel<T>& level = levels.level[chunk.level];
      const T* x = level.data;
      T* to = data<T>(out[chunk.level]);
      const C scale = data<C>(scales)[image];
      alignas(64) C logits[kStrip];
      for_strips(
          args, level, image, chunk,
          [&](int64_t offset, int size) {
            prefetch(x + offset, size);
            prefetch(to + offset, size);
          },
          [&](int64_t offset, int size, FocalStrip<C>& strip) {
            const C* in = widened(x + offset, size, logits);
            write(to + offset, size,
                  [&](C* values) { focal_gradients(focal, strip, in, scale, size, values); });
          });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("dense_focal_loss", TORCH_BOX(&dense_focal_loss_cpu));
  m.impl("dense_focal_loss_backward", TORCH_BOX(&dense_focal_loss_backward_cpu));
}

}  // namespace retinanet
