// Matching on the CPU.
//
// 1. If the low-quality rule or the statistics ask for it, find the best IoU of each ground truth.
// 2. Assign the anchors strip by strip (matching_cpu_strips.h). One thread takes all ground truths
//    through a strip, whose state stays in the thread's cache.
// 3. By SSD's rule, let each ground truth of an image, one after the other, take its best anchor.
//
// On a grid, a ground truth visits only the anchors that matching_grid_reach.h cannot rule out.
// With explicit anchors, it skips the strips whose anchors it cannot touch, and visits every other
// strip in one vectorised loop. No result depends on the number of threads.
#include <atomic>

#include "matching_cpu_strips.h"

namespace retinanet {
namespace {

// The state of one call of the op.
template <typename T>
class Assignment {
 public:
  Assignment(const MatchArguments& args, const MatchRules<T>& rules)
      : args_(args),
        rules_(rules),
        anchors_(args.anchors.view<T>("assign_targets")),
        grid_{args.anchors.grid, static_cast<const float*>(anchors_.data)},
        strips_(strips_of(args.anchors)),
        gts_(args.images),
        gt_columns_(args.images),
        best_(args.images * args.max_gt, T(0)),
        best_anchor_(args.takes_best ? args.images * args.max_gt : 0, kBackground) {
    if (args.takes_best && !on_grid())
      best_in_strip_.resize(args.images * int64_t(strips_.size()) * args.max_gt);
    // List the valid ground truths of each image, as records and as columns.
    for (int64_t n = 0; n < args.images; ++n) {
      const Box<T>* boxes = gt_boxes(n);
      const int64_t count = clamp_count(data<int64_t>(args.gt_count)[n], args.max_gt);
      for (int64_t i = 0; i < count; ++i) {
        if (!is_valid(boxes[i])) continue;
        if (gts_[n].size() % kBoxStrip == 0) gt_columns_[n].emplace_back();
        gts_[n].push_back({boxes[i], area(boxes[i]), int(i)});
        gt_columns_[n].back().push_back(boxes[i]);
      }
    }
  }

  // Writes all results.
  void run(const MatchOutputs<T>& out) {
    if ((rules_.low_quality != LowQuality::kOff || out.best_ious) && !args_.takes_best) find_best();
    const int64_t strips = int64_t(strips_.size());
    std::vector<int> positive(args_.images * strips, 0);
    torch::stable::parallel_for(0, args_.images * strips, 1, [&](int64_t first, int64_t last) {
      StripState<T> state;
      for (int64_t i = first; i < last; ++i)
        positive[i] = assign(i / strips, strips_[i % strips], state, out);
    });
    if (args_.takes_best) find_best_anchors();
    if (out.best_ious) std::copy(best_.begin(), best_.end(), out.best_ious);
    for (int64_t n = 0; n < args_.images; ++n) {
      out.num_positive[n] = 0;
      for (int64_t i = n * strips; i < (n + 1) * strips; ++i) out.num_positive[n] += positive[i];
      if (args_.takes_best) out.num_positive[n] += take_best_anchors(n, out);
      if (out.gt_positives) count_positives(n, out);
    }
  }

 private:
  const MatchArguments& args_;
  const MatchRules<T>& rules_;
  const Anchors<T> anchors_;
  const GridAnchors<T> grid_;
  const std::vector<AnchorStrip> strips_;
  std::vector<std::vector<GroundTruth<T>>> gts_;        // the valid ones of each image
  std::vector<std::vector<BoxColumns<T>>> gt_columns_;  // the same boxes, kBoxStrip per element
  std::vector<T> best_;  // [N, M]: the best IoU of each ground truth over all anchors, or 0
  // For SSD's rule only: the best IoU of each ground truth in each strip of explicit anchors,
  // [N, strips, M], and its best anchor, [N, M].
  std::vector<T> best_in_strip_;
  std::vector<int64_t> best_anchor_;

  bool on_grid() const { return grid_.grid.levels > 0; }
  const Box<T>* gt_boxes(int64_t image) const {
    return data<Box<T>>(args_.gt_boxes) + image * args_.max_gt;
  }
  T& best(int64_t image, const GroundTruth<T>& gt) {
    return best_[image * args_.max_gt + gt.index];
  }
  T& best_in_strip(int64_t image, const AnchorStrip& strip, const GroundTruth<T>& gt) {
    const int64_t s = &strip - strips_.data();
    return best_in_strip_[(image * int64_t(strips_.size()) + s) * args_.max_gt + gt.index];
  }
  BoxColumns<T> boxes_of(int64_t image, const AnchorStrip& strip) const {
    BoxColumns<T> boxes;
    for (int64_t a = strip.begin; a < strip.end; ++a) boxes.push_back(anchors_(image, a));
    return boxes;
  }

  // Computes best_, the best IoU of each ground truth.
  void find_best() {
    if (on_grid()) return find_best_on_grid();
    const int64_t strips = int64_t(strips_.size());
    std::vector<std::atomic<T>> best(best_.size());
    torch::stable::parallel_for(0, args_.images * strips, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t n = i / strips;
        const BoxColumns<T> strip = boxes_of(n, strips_[i % strips]);
        for (const GroundTruth<T>& gt : gts_[n]) {
          if (!strip.touches(gt.box)) continue;
          const T strip_best = strip.best_iou(gt.box, gt.area);
          // Take the maximum atomically. It does not depend on the order of the strips.
          std::atomic<T>& gt_best = best[n * args_.max_gt + gt.index];
          T old = gt_best.load(std::memory_order_relaxed);
          while (old < strip_best && !gt_best.compare_exchange_weak(old, strip_best)) {
          }
        }
      }
    });
    for (size_t i = 0; i < best.size(); ++i) best_[i] = best[i];
  }

  void find_best_on_grid() {
    std::vector<std::pair<T*, const GroundTruth<T>*>> all;
    for (int64_t n = 0; n < args_.images; ++n)
      for (const GroundTruth<T>& gt : gts_[n]) all.emplace_back(&best(n, gt), &gt);
    torch::stable::parallel_for(0, int64_t(all.size()), 4, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) *all[i].first = grid_.best_iou(*all[i].second);
    });
  }

  // Computes best_ and best_anchor_, after `assign` has computed best_in_strip_.
  void find_best_anchors() {
    const int64_t strips = int64_t(strips_.size()), max_gt = args_.max_gt;
    torch::stable::parallel_for(0, args_.images, 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; strips > 0 && n < last; ++n) {
        for (const GroundTruth<T>& gt : gts_[n]) {
          T& most = best(n, gt);
          int64_t& anchor = best_anchor_[n * max_gt + gt.index];
          if (on_grid()) {
            most = grid_.best_iou(gt);
            anchor = grid_.first_with(most, gt);
            continue;
          }
          // Find the first of the best strips, and its first anchor that has the best IoU.
          const T* of_gt = best_in_strip_.data() + n * strips * max_gt + gt.index;
          int64_t s = 0;
          for (int64_t i = 1; i < strips; ++i)
            if (of_gt[i * max_gt] > of_gt[s * max_gt]) s = i;
          most = of_gt[s * max_gt];
          anchor = strips_[s].begin;
          for (Box<T> box = anchors_(n, anchor); iou(gt.box, gt.area, box, area(box)) != most;)
            box = anchors_(n, ++anchor);
        }
      }
    });
  }

  // Matches best anchors to their ground truths, and returns how many of them were negative before.
  int take_best_anchors(int64_t image, const MatchOutputs<T>& out) {
    int gained = 0;
    for (const GroundTruth<T>& gt : gts_[image]) {
      const T best_iou = best(image, gt);
      const int64_t row = image * args_.max_gt + gt.index, anchor = best_anchor_[row];
      if (anchor < 0 || !(best_iou > rules_.min_iou)) continue;
      const int64_t i = image * args_.anchors.count + anchor;
      gained += out.matches[i] < 0;
      out.matches[i] = gt.index;
      if (out.labels) out.labels[i] = int(data<int64_t>(*args_.gt_labels)[row]);
      if (out.ious) out.ious[i] = best_iou;
    }
    return gained;
  }

  // Writes the results of a strip and returns the number of its positives.
  int assign(int64_t image, const AnchorStrip& strip, StripState<T>& state,
             const MatchOutputs<T>& out) {
    const int64_t size = strip.end - strip.begin;
    state.reset(size);
    std::optional<BoxColumns<T>> boxes;
    if (!on_grid()) boxes.emplace(boxes_of(image, strip));
    // Let each ground truth visit the anchors whose result it may change.
    for (const GroundTruth<T>& gt : gts_[image]) {
      const T promoting_iou = rules_.promoting_iou(best(image, gt));
      const T relevant_iou = rules_.relevant_iou(promoting_iou);
      if (on_grid()) {
        grid_.visit(strip, gt, promoting_iou, relevant_iou, state);
      } else if (boxes->touches(gt.box) || !(relevant_iou > T(0))) {
        if (args_.takes_best)
          best_in_strip(image, strip, gt) = boxes->visit_and_find_best(gt, state);
        else
          boxes->visit(gt, promoting_iou, state);
      }
    }
    // Decide the matches, which are all the same if no anchor was visited.
    int* matches = out.matches + image * args_.anchors.count + strip.begin;
    if (!state.visited) {
      std::fill(matches, matches + size, AnchorMatch<T>{}.match(rules_));
    } else {
      rescan_own_best(image, strip, state);
      for (int64_t i = 0; i < size; ++i) matches[i] = state[i].match(rules_);
    }
    if (args_.crowd_boxes) ignore_crowds(image, strip, boxes ? &*boxes : nullptr, matches);
    return write(image, strip, state, matches, out);
  }

  // Finds the best ground truth of promoted anchors, where the visits may have missed it.
  //
  // By torchvision's rule, a promoted anchor is matched to the ground truth of its own highest IoU.
  // Visits may skip pairs with a low IoU (below bg_iou on a grid, of 0 elsewhere), so that ground
  // truth may not have visited the anchor.
  void rescan_own_best(int64_t image, const AnchorStrip& strip, StripState<T>& state) const {
    if (rules_.low_quality != LowQuality::kTorchvision) return;
    // Every ground truth with an IoU of at least this has visited the anchor.
    const T always_visited = on_grid() ? rules_.bg_iou : std::numeric_limits<T>::denorm_min();
    for (int64_t i = 0; i < strip.end - strip.begin; ++i) {
      if (state.promoted[i] < 0 || state.best_iou[i] >= always_visited) continue;
      const Box<T> anchor = anchors_(image, strip.begin + i);
      const T anchor_area = area(anchor);
      T best = -1;
      for (size_t c = 0; c < gt_columns_[image].size(); ++c) {
        const BoxColumns<T>& gts = gt_columns_[image][c];
        const T column_best = gts.best_iou(anchor, anchor_area);
        if (!(column_best > best)) continue;
        best = column_best;
        const int first = gts.first_with(column_best, anchor, anchor_area);
        state.best[i] = gts_[image][c * kBoxStrip + first].index;
      }
      state.best_iou[i] = best;
    }
  }

  // Turns background anchors that a crowd box covers into ignored ones. `boxes` are the anchors of
  // the strip, or null on a grid.
  void ignore_crowds(int64_t image, const AnchorStrip& strip, const BoxColumns<T>* boxes,
                     int* matches) const {
    const Box<T>* crowds = data<Box<T>>(*args_.crowd_boxes) + image * args_.max_crowd;
    const int64_t count = clamp_count(data<int64_t>(*args_.crowd_count)[image], args_.max_crowd);
    for (int64_t k = 0; k < count; ++k) {
      if (!is_valid(crowds[k])) continue;
      const auto visit = [&](int64_t i, const Box<T>& anchor) {
        if (matches[i] == kBackground && in_crowd(anchor, crowds[k], rules_.crowd_ioa))
          matches[i] = kIgnored;
      };
      if (boxes)
        boxes->for_overlapping(crowds[k], visit);
      else
        grid_.for_covered(strip, crowds[k], rules_.crowd_ioa, visit);
    }
  }

  // Writes the labels and statistics of a strip, and returns the number of its positives.
  int write(int64_t image, const AnchorStrip& strip, const StripState<T>& state, const int* matches,
            const MatchOutputs<T>& out) const {
    const int64_t size = strip.end - strip.begin, first = image * args_.anchors.count + strip.begin;
    int positive = 0;
    for (int64_t i = 0; i < size; ++i) positive += matches[i] >= 0;
    if (out.labels) {
      int* labels = out.labels + first;
      std::copy(matches, matches + size, labels);
      const int64_t* gt_labels = data<int64_t>(*args_.gt_labels) + image * args_.max_gt;
      for (int64_t i = 0; positive > 0 && i < size; ++i)
        if (matches[i] >= 0) labels[i] = int(gt_labels[matches[i]]);
    }
    if (out.ious) {
      for (int64_t i = 0; i < size; ++i)
        out.ious[first + i] =
            state.visited ? state[i].matched_iou(rules_, best_.data() + image * args_.max_gt)
                          : T(0);
    }
    return positive;
  }

  // Counts the positives of each ground truth of an image.
  void count_positives(int64_t image, const MatchOutputs<T>& out) const {
    const int* matches = out.matches + image * args_.anchors.count;
    int* counts = out.gt_positives + image * args_.max_gt;
    std::fill(counts, counts + args_.max_gt, 0);
    for (int64_t a = 0; a < args_.anchors.count; ++a)
      if (matches[a] >= 0) ++counts[matches[a]];
  }
};

MatchResults assign_targets_cpu(const Tensor& anchors, std::vector<int64_t> grid_sizes,
                                std::vector<double> grid_steps, const Tensor& gt_boxes,
                                std::optional<Tensor> gt_labels, const Tensor& gt_count,
                                std::optional<Tensor> crowd_boxes,
                                std::optional<Tensor> crowd_count, double fg_iou, double bg_iou,
                                std::string low_quality, double low_quality_min_iou,
                                double crowd_ioa, bool statistics) {
  const MatchArguments args(anchors, grid_sizes, grid_steps, gt_boxes, gt_labels, gt_count,
                            crowd_boxes, crowd_count, low_quality, "assign_targets");
  MatchResults results = args.empty_results(statistics);
  dispatch_compute(gt_boxes.scalar_type(), "assign_targets", [&](auto zero) {
    using T = decltype(zero);
    const MatchRules<T> rules{T(fg_iou), T(bg_iou), T(low_quality_min_iou), T(crowd_ioa),
                              args.low_quality};
    Assignment<T>(args, rules).run(args.outputs<T>(results, statistics));
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("assign_targets", TORCH_BOX(&assign_targets_cpu));
}

}  // namespace retinanet
