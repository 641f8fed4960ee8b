// The scores that one pass of Soft-NMS leaves, on the CPU: ranges of candidates in parallel. Every
// candidate of the image lowers the scores of the range in turn.
#pragma once

#include <algorithm>

#include "soft_nms.h"

namespace retinanet {

constexpr int64_t kScoresRange = 1024;  // candidates whose scores a thread lowers at a time

// The candidates of one image.
template <typename T>
struct ScoredCandidates {
  const Box<T>* boxes;
  const T* scores;
  const int64_t* labels;  // null if all have one class
};

// Multiplies the scores of the candidates [begin, end) that rank after candidate `by`, in its
// class. All of them have lower indices than `by`, or all have higher ones: the loop compares no
// indices, which would be wider than the scores.
template <bool kGaussian, bool kHasLowerIndex, typename T>
VECTORISED void lower_scores_after(const SoftNmsRules<T> rules, const ScoredCandidates<T> image,
                                   int64_t by, int64_t begin, int64_t end,
                                   T* __restrict__ lowered) {
  const Box<T> box = image.boxes[by];
  const T box_area = area(box), score = image.scores[by];
  const Box<T>* boxes = image.boxes;
  const T* scores = image.scores;
  const int64_t* labels = image.labels;
  const int64_t label = labels ? labels[by] : 0;
  for (int64_t c = begin; c < end; ++c) {
    const T factor = rules.template factor<kGaussian>(iou(box, box_area, boxes[c], area(boxes[c])));
    const bool rival = !labels || labels[c] == label;
    const T of_rival = rival ? factor : T(1);
    lowered[c] *= ranks_before(score, scores[c], kHasLowerIndex) ? of_rival : T(1);
  }
}

inline Tensor soft_nms_scores_cpu(const Tensor& boxes, const Tensor& scores,
                                  std::optional<Tensor> labels, std::optional<Tensor> counts,
                                  std::string method, double iou_threshold, double sigma) {
  const char* op = "soft_nms_scores";
  const SoftNmsArguments args(op, boxes, scores, labels, counts, 0, 0);
  Tensor lowered = empty_tensor_like(args.scores);
  dispatch_compute(boxes.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto gaussian, const SoftNmsRules<T>& rules) {
      const int64_t candidates = args.candidates,
                    ranges = (candidates + kScoresRange - 1) / kScoresRange;
      const int64_t *classes = data<int64_t>(args.labels), *limits = data<int64_t>(args.counts);
      torch::stable::parallel_for(0, args.images * ranges, 1, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
          const int64_t n = r / ranges, begin = r % ranges * kScoresRange;
          const ScoredCandidates<T> image{data<Box<T>>(args.boxes) + n * candidates,
                                          data<T>(args.scores) + n * candidates,
                                          classes ? classes + n * candidates : nullptr};
          T* to = data<T>(lowered) + n * candidates;
          std::copy_n(image.scores + begin, std::min(kScoresRange, candidates - begin), to + begin);
          const int64_t count = limits ? std::clamp<int64_t>(limits[n], 0, candidates) : candidates;
          const int64_t end = std::clamp(count, begin, begin + kScoresRange);
          vectorised([&, to](auto) ALWAYS_INLINE {
            constexpr bool kGaussian = decltype(gaussian)::value;
            for (int64_t by = 0; by < count; ++by) {
              const int64_t lower = std::clamp(by, begin, end);
              const int64_t higher = std::clamp(by + 1, begin, end);
              lower_scores_after<kGaussian, false>(rules, image, by, begin, lower, to);
              lower_scores_after<kGaussian, true>(rules, image, by, higher, end, to);
            }
          });
        }
      });
    };
    dispatch_soft_nms<T>(op, method, iou_threshold, sigma, 0, 0, run);
  });
  return lowered;
}

}  // namespace retinanet
