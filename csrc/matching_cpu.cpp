// Matching on the CPU: two passes over the anchors in chunks, the second recomputing the IoU, so
// that memory is O(A + M).  The best IoU of each ground truth is a maximum over chunks and does not
// depend on the threads.
#include <algorithm>

#include "matching.h"

namespace retinanet {
namespace {

constexpr int64_t kChunk = 4096;  // anchors

template <typename T>
struct GroundTruths {
  std::vector<Box<T>> boxes;
  std::vector<T> areas;
  std::vector<int> index;  // position in the padded list

  GroundTruths(const Box<T>* padded, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (!is_valid(padded[i])) continue;
      boxes.push_back(padded[i]);
      areas.push_back(area(padded[i]));
      index.push_back(int(i));
    }
  }
};

// Best IoU of each ground truth over all anchors of the image.
template <typename T>
std::vector<T> best_of_gts(const Anchors<T>& anchors, int64_t image, int64_t count,
                           const GroundTruths<T>& gts) {
  const size_t m = gts.boxes.size();
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  std::vector<T> partial(chunks * m, T(0));
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      T* best = partial.data() + c * m;
      for (int64_t a = c * kChunk; a < std::min(count, (c + 1) * kChunk); ++a) {
        const Box<T> anchor = anchors(image, a);
        const T anchor_area = area(anchor);
        for (size_t g = 0; g < m; ++g)
          best[g] = larger(best[g], iou(gts.boxes[g], gts.areas[g], anchor, anchor_area));
      }
    }
  });
  std::vector<T> best(m, T(0));
  for (int64_t c = 0; c < chunks; ++c)
    for (size_t g = 0; g < m; ++g) best[g] = larger(best[g], partial[c * m + g]);
  return best;
}

// `labels` is null when the caller has no labels.
template <typename T>
void assign(const MatchArguments& args, const MatchRules<T>& rules, int* matches, int* labels,
            int* num_positive) {
  const Anchors<T> anchors = args.anchors.view<T>("assign_targets");
  const int64_t count = args.anchors.count;
  for (int64_t n = 0; n < args.images; ++n) {
    const int64_t num_gt = clamp_count(data<int64_t>(args.gt_count)[n], args.max_gt);
    const GroundTruths<T> gts(data<Box<T>>(args.gt_boxes) + n * args.max_gt, num_gt);
    const int64_t* gt_labels =
        args.gt_labels ? data<int64_t>(*args.gt_labels) + n * args.max_gt : nullptr;
    const Box<T>* crowds =
        args.crowd_boxes ? data<Box<T>>(*args.crowd_boxes) + n * args.max_crowd : nullptr;
    const int64_t num_crowd =
        args.crowd_count ? clamp_count(data<int64_t>(*args.crowd_count)[n], args.max_crowd) : 0;
    std::vector<T> best(gts.boxes.size(), T(0));
    if (rules.low_quality != LowQuality::kOff) best = best_of_gts(anchors, n, count, gts);

    const int64_t chunks = (count + kChunk - 1) / kChunk;
    std::vector<int> positive(chunks, 0);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        for (int64_t a = c * kChunk; a < std::min(count, (c + 1) * kChunk); ++a) {
          const Box<T> anchor = anchors(n, a);
          const T anchor_area = area(anchor);
          AnchorMatch<T> state;
          for (size_t g = 0; g < gts.boxes.size(); ++g) {
            const T overlap = iou(gts.boxes[g], gts.areas[g], anchor, anchor_area);
            state.visit(gts.index[g], overlap);
            state.promote(gts.index[g], overlap, best[g], rules);
          }
          int match = state.match(rules);
          for (int64_t k = 0; match == kBackground && k < num_crowd; ++k)
            if (in_crowd(anchor, crowds[k], rules.crowd_ioa)) match = kIgnored;
          matches[n * count + a] = match;
          if (labels) labels[n * count + a] = match >= 0 ? int(gt_labels[match]) : match;
          positive[c] += match >= 0;
        }
      }
    });
    num_positive[n] = 0;
    for (const int p : positive) num_positive[n] += p;
  }
}

std::tuple<Tensor, Tensor, Tensor> assign_targets_cpu(
    const Tensor& anchors, std::vector<int64_t> grid_sizes, std::vector<double> grid_steps,
    const Tensor& gt_boxes, std::optional<Tensor> gt_labels, const Tensor& gt_count,
    std::optional<Tensor> crowd_boxes, std::optional<Tensor> crowd_count, double fg_iou,
    double bg_iou, std::string low_quality, double low_quality_min_iou, double crowd_ioa) {
  const MatchArguments args(anchors, grid_sizes, grid_steps, gt_boxes, gt_labels, gt_count,
                            crowd_boxes, crowd_count, low_quality, "assign_targets");
  Tensor matches =
      torch::stable::new_empty(gt_boxes, {args.images, args.anchors.count}, ScalarType::Int);
  Tensor labels = torch::stable::new_empty(
      gt_boxes, {args.images, gt_labels ? args.anchors.count : 0}, ScalarType::Int);
  Tensor num_positive = torch::stable::new_empty(gt_boxes, {args.images}, ScalarType::Int);
  dispatch_compute(gt_boxes.scalar_type(), "assign_targets", [&](auto zero) {
    using T = decltype(zero);
    const MatchRules<T> rules{T(fg_iou), T(bg_iou), T(low_quality_min_iou), T(crowd_ioa),
                              args.low_quality};
    assign(args, rules, data<int>(matches), gt_labels ? data<int>(labels) : nullptr,
           data<int>(num_positive));
  });
  return {matches, labels, num_positive};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("assign_targets", TORCH_BOX(&assign_targets_cpu));
}

}  // namespace retinanet
