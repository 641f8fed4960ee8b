// Soft-NMS on the CPU: images in parallel. Each detection takes one pass over the image's
// candidates that finds the best and one that lowers the scores of the others.
#include <algorithm>

#include "soft_nms.h"
#include "soft_nms_cpu_scores.h"

namespace retinanet {
namespace {

// Multiplies the scores of the candidates in the class of candidate `taken` by their factors.
template <bool kGaussian, typename T>
VECTORISED void lower_scores(const SoftNmsRules<T> rules, const Box<T>* boxes,
                             const int64_t* labels, int64_t count, int64_t taken, T* scores) {
  const Box<T> box = boxes[taken];
  const T box_area = area(box);
  const int64_t label = labels ? labels[taken] : 0;
  for (int64_t c = 0; c < count; ++c) {
    const T factor = rules.template factor<kGaussian>(iou(box, box_area, boxes[c], area(boxes[c])));
    const bool rival = !labels || labels[c] == label;
    scores[c] *= rival ? factor : T(1);
  }
}

// Takes candidates until none is above `min_score` or `max_detections` are taken. Returns the
// number of taken candidates. Overwrites `scores`.
template <bool kGaussian, typename T>
VECTORISED int64_t soft_nms_image(const SoftNmsRules<T> rules, const Box<T>* boxes,
                                  const int64_t* labels, int64_t count, T* scores, int64_t* index,
                                  T* taken_scores) {
  for (int64_t d = 0; d < rules.max_detections; ++d) {
    T best = rules.min_score;
    for (int64_t c = 0; c < count; ++c) best = max_of(best, scores[c]);
    if (!(best > rules.min_score)) return d;
    const int64_t taken = std::find(scores, scores + count, best) - scores;
    index[d] = taken;
    taken_scores[d] = best;
    scores[taken] = 0;
    lower_scores<kGaussian>(rules, boxes, labels, count, taken, scores);
  }
  return rules.max_detections;
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_cpu(const Tensor& boxes, const Tensor& scores,
                                                std::optional<Tensor> labels,
                                                std::optional<Tensor> counts, std::string method,
                                                double iou_threshold, double sigma,
                                                double min_score, int64_t max_detections) {
  const char* op = "soft_nms";
  const SoftNmsArguments args(op, boxes, scores, labels, counts, min_score, max_detections);
  Tensor index = empty_tensor(boxes, {args.images, max_detections}, ScalarType::Long);
  Tensor taken_scores = empty_tensor(boxes, {args.images, max_detections});
  Tensor taken = empty_tensor(boxes, {args.images}, ScalarType::Long);
  dispatch_compute(boxes.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto gaussian, const SoftNmsRules<T>& rules) {
      const int64_t candidates = args.candidates;
      torch::stable::parallel_for(0, args.images, 1, [&](int64_t first, int64_t last) {
        std::vector<T> lowered(candidates);
        for (int64_t n = first; n < last; ++n) {
          const T* given = data<T>(args.scores) + n * candidates;
          const Box<T>* image = data<Box<T>>(args.boxes) + n * candidates;
          const int64_t* classes =
              args.labels ? data<int64_t>(args.labels) + n * candidates : nullptr;
          int64_t* row = data<int64_t>(index) + n * max_detections;
          T* row_scores = data<T>(taken_scores) + n * max_detections;
          const int64_t count =
              args.counts ? std::clamp<int64_t>(data<int64_t>(args.counts)[n], 0, candidates)
                          : candidates;
          std::copy(given, given + count, lowered.begin());
          int64_t size = 0;
          vectorised([&, image, classes](auto) ALWAYS_INLINE {
            size = soft_nms_image<decltype(gaussian)::value>(rules, image, classes, count,
                                                             lowered.data(), row, row_scores);
          });
          std::fill(row + size, row + max_detections, -1);
          std::fill(row_scores + size, row_scores + max_detections, T(0));
          data<int64_t>(taken)[n] = size;
        }
      });
    };
    dispatch_soft_nms<T>(op, method, iou_threshold, sigma, min_score, max_detections, run);
  });
  return {index, taken_scores, taken};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("soft_nms", TORCH_BOX(&soft_nms_cpu));
  m.impl("soft_nms_scores", TORCH_BOX(&soft_nms_scores_cpu));
}

}  // namespace retinanet
