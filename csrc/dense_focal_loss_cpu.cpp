// Focal loss of the heads' own tensors on the CPU: one pass over the logits in memory order, in
// tasks that threads share.  A task is a run of rows of a channels_last level, or some cells of one
// anchor of a contiguous one, through all classes; what a task sums does not depend on the threads.
#include <algorithm>

#include "common/huge_pages.h"
#include "dense_focal_loss.h"
#include "focal_loss_cpu_strips.h"

namespace retinanet {
namespace {

// Elements begin .. end - 1 of a level whose channels come last; or its cells begin .. end - 1, of
// anchor `anchor`.
struct Task {
  int level;
  int64_t anchor, begin, end;
};

// The tasks of one image.
template <typename T>
std::vector<Task> tasks_of(const HeadLevels<T>& levels, int64_t num_classes) {
  std::vector<Task> tasks;
  for (int l = 0; l < levels.count; ++l) {
    const HeadLevel<T>& level = levels.level[l];
    if (level.channels_last) {
      for (int64_t begin = 0; begin < level.size(); begin += kChunk)
        tasks.push_back({l, 0, begin, std::min(level.size(), begin + kChunk)});
      continue;
    }
    for (int64_t a = 0; a < level.channels / num_classes; ++a)
      for (int64_t begin = 0; begin < level.area; begin += kBlock)
        tasks.push_back({l, a, begin, std::min(level.area, begin + kBlock)});
  }
  return tasks;
}

// Calls f(task, image, first, last) ... over all tasks of all images.
template <typename F>
void for_tasks(const std::vector<Task>& tasks, int64_t images, F&& f) {
  const int64_t per_image = int64_t(tasks.size());
  torch::stable::parallel_for(0, images * per_image, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i, i / per_image, tasks[i % per_image]);
  });
}

// Calls f(offset, size, block) for blocks of consecutive elements of the task's level, with their
// targets set.  Calls fetch(offset, size) before it where the next block does not follow in memory,
// which the hardware would not foresee.
template <typename T, typename Prefetch, typename F>
void for_blocks(const DenseFocalArguments& args, const HeadLevel<T>& level, int64_t image,
                const Task& task, Prefetch&& fetch, F&& f) {
  using C = Compute<T>;
  const int64_t num_classes = args.num_classes, first = image * level.size();
  const auto targets = args.targets<C>(image, level.first / num_classes);
  FocalBlock<C> block;
  const auto call = [&](int64_t offset, int size) {
    const Smoothing& smoothing = args.smoothing;
    if (!smoothing.none()) soften(block, C(smoothing.positive), C(smoothing.negative), size);
    f(first + offset, size, block);
  };
  if (level.channels_last) {
    for (int64_t i = task.begin; i < task.end; i += kBlock) {
      const int size = int(std::min<int64_t>(kBlock, task.end - i));
      set_rows(block, targets, i, size);
      call(i, size);
    }
    return;
  }
  const int64_t per_cell = level.channels / num_classes;
  const int size = int(task.end - task.begin);
  for (int i = 0; i < size; ++i) {
    const RowTarget<C> target = targets.row((task.begin + i) * per_cell + task.anchor);
    block.code[i] = target.dead ? kDead : target.positive;
    block.weight[i] = target.weight;
  }
  for (int64_t k = 0; k < num_classes; ++k) {
    block.hit = int32_t(k);
    const int64_t offset = (task.anchor * num_classes + k) * level.area + task.begin;
    if (k + 1 < num_classes) fetch(first + offset + level.area, size);
    call(offset, size);
  }
}

Tensor dense_focal_loss_cpu(std::vector<Tensor> cls_logits, const Tensor& labels,
                            std::optional<Tensor> weight, int64_t num_classes, double alpha,
                            double gamma, double label_smoothing) {
  const DenseFocalArguments args(cls_logits, labels, weight, num_classes, label_smoothing,
                                 "dense_focal_loss");
  const int64_t images = args.heads.images;
  Tensor out = torch::stable::new_empty(labels, {images}, args.heads.compute_dtype());
  dispatch_floating(args.heads.dtype(), "dense_focal_loss", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const auto focal = Focal<C>::make(alpha, gamma);
    const HeadLevels<T> levels = args.heads.view<T>();
    const std::vector<Task> tasks = tasks_of(levels, num_classes);
    std::vector<double> partial(images * tasks.size());
    for_tasks(tasks, images, [&](int64_t i, int64_t image, const Task& task) {
      const HeadLevel<T>& level = levels.level[task.level];
      const T* x = level.data;
      alignas(64) C logits[kBlock], losses[kBlock];
      for_blocks(
          args, level, image, task, [&](int64_t offset, int size) { prefetch(x + offset, size); },
          [&](int64_t offset, int size, const FocalBlock<C>& block) {
            focal_losses(focal, block, widened(x + offset, size, logits), size, losses);
            partial[i] += block_sum(losses, size);
          });
    });
    for (int64_t n = 0; n < images; ++n) {
      double sum = 0;
      for (size_t i = 0; i < tasks.size(); ++i) sum += partial[n * tasks.size() + i];
      data<C>(out)[n] = C(sum);
    }
  });
  return out;
}

std::vector<Tensor> dense_focal_loss_backward_cpu(const Tensor& grad,
                                                  std::vector<Tensor> cls_logits,
                                                  const Tensor& labels,
                                                  std::optional<Tensor> weight, int64_t num_classes,
                                                  double alpha, double gamma,
                                                  double label_smoothing) {
  const DenseFocalArguments args(cls_logits, labels, weight, num_classes, label_smoothing,
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
    const std::vector<Task> tasks = tasks_of(levels, num_classes);
    for_tasks(tasks, args.heads.images, [&](int64_t, int64_t image, const Task& task) {
      const HeadLevel<T>& level = levels.level[task.level];
      const T* x = level.data;
      T* to = data<T>(out[task.level]);
      const C scale = data<C>(scales)[image];
      alignas(64) C logits[kBlock];
      for_blocks(
          args, level, image, task,
          [&](int64_t offset, int size) {
            prefetch(x + offset, size);
            prefetch(to + offset, size);
          },
          [&](int64_t offset, int size, FocalBlock<C>& block) {
            const C* in = widened(x + offset, size, logits);
            write(to + offset, size,
                  [&](C* values) { focal_gradients(focal, block, in, scale, size, values); });
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
