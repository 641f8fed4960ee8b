// NMS on the CPU: images in parallel. Within an image, candidates are visited in the given order.
// Each is compared with the kept boxes of its class that are near it.
#include <algorithm>

#include "nms_cpu_image.h"
#include "nms_cpu_rank.h"

namespace retinanet {
namespace {

std::tuple<Tensor, Tensor, Tensor> nms_sorted_cpu(const Tensor& boxes, std::optional<Tensor> order,
                                                  const Tensor& count, std::optional<Tensor> labels,
                                                  double iou_threshold, int64_t max_detections,
                                                  int64_t max_per_class, bool class_agnostic) {
  const NmsArguments args(boxes, order, count, labels, max_detections);
  Tensor index = torch::stable::new_empty(boxes, {args.images, max_detections}, ScalarType::Long);
  Tensor kept = torch::stable::new_empty(boxes, {args.images}, ScalarType::Long);
  Tensor truncated = torch::stable::new_empty(boxes, {args.images}, ScalarType::Bool);
  dispatch_compute(boxes.scalar_type(), "nms_sorted", [&](auto zero) {
    using T = decltype(zero);
    const NmsRules<T> rules{T(iou_threshold), max_detections, max_per_class, class_agnostic};
    const int64_t candidates = args.candidates;
    const int64_t *counts = data<int64_t>(args.count), *orders = data<int64_t>(args.order),
                  *classes = data<int64_t>(args.labels);
    torch::stable::parallel_for(0, args.images, 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        int64_t* row = data<int64_t>(index) + n * max_detections;
        const int64_t valid = std::clamp<int64_t>(counts[n], 0, candidates);
        const Box<T>* image = data<Box<T>>(args.boxes) + n * candidates;
        const int64_t* order = orders ? orders + n * candidates : nullptr;
        const int64_t* labels = classes ? classes + n * candidates : nullptr;
        bool* cut = data<bool>(truncated) + n;
        int64_t size = 0;
        vectorised([&](auto) ALWAYS_INLINE {
          size = nms_image(rules, image, order, labels, candidates, valid, row, cut);
        });
        std::fill(row + size, row + max_detections, -1);
        data<int64_t>(kept)[n] = size;
      }
    });
  });
  return {index, kept, truncated};
}

std::tuple<Tensor, Tensor> rank_scores_cpu(const Tensor& scores, std::optional<Tensor> counts) {
  const RankArguments args(scores, counts);
  const int64_t images = args.images, candidates = args.candidates;
  Tensor order = torch::stable::new_empty(scores, {images, candidates}, ScalarType::Long);
  Tensor valid = torch::stable::new_empty(scores, {images}, ScalarType::Long);
  dispatch_floating(scores.scalar_type(), "rank_scores", [&](auto zero) {
    using T = decltype(zero);
    const int64_t* limits = data<int64_t>(args.counts);
    torch::stable::parallel_for(0, images, 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const int64_t count = limits ? std::clamp<int64_t>(limits[n], 0, candidates) : candidates;
        data<int64_t>(valid)[n] = rank_scores(data<T>(args.scores) + n * candidates, candidates,
                                              count, data<int64_t>(order) + n * candidates);
      }
    });
  });
  return {order, valid};
}

std::tuple<Tensor, Tensor> batched_nms_padded_cpu(const Tensor& boxes, const Tensor& scores,
                                                  std::optional<Tensor> labels,
                                                  std::optional<Tensor> counts,
                                                  double iou_threshold, int64_t max_detections) {
  const PaddedNmsArguments args(boxes, scores, labels, counts, max_detections);
  const auto [order, valid] = rank_scores_cpu(args.scores, args.counts);
  auto [index, count, truncated] = nms_sorted_cpu(args.boxes, order, valid, args.labels,
                                                  iou_threshold, max_detections, 0, false);
  return {index, count};
}

Tensor nms_cpu(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> labels,
               double iou_threshold) {
  const auto as_batch = [](const Tensor& t) { return torch::stable::unsqueeze(t, 0); };
  const auto [order, valid] = rank_scores_cpu(as_batch(scores), std::nullopt);
  if (labels) labels = as_batch(*labels);
  const auto [index, count, truncated] =
      nms_sorted_cpu(as_batch(boxes), order, valid, labels, iou_threshold, boxes.size(0), 0, false);
  Tensor kept = torch::stable::new_empty(index, {*data<int64_t>(count)});
  std::copy_n(data<int64_t>(index), kept.size(0), data<int64_t>(kept));
  return kept;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("rank_scores", TORCH_BOX(&rank_scores_cpu));
  m.impl("nms_sorted", TORCH_BOX(&nms_sorted_cpu));
  m.impl("batched_nms_padded", TORCH_BOX(&batched_nms_padded_cpu));
  m.impl("nms", TORCH_BOX(&nms_cpu));
}

}  // namespace retinanet
