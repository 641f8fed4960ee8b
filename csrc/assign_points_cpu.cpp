// Assignment of points on the CPU.
//
// The ground truths of an image take their points one after the other, by ascending priority, so
// that the last one to take a point is the one that keeps it.
//
//   a level of a grid   A ground truth visits only the cells that it can reach: those of the square
//                       of centre sampling, as far as it lies in the box. With the usual radius of
//                       1.5, these are at most 16 cells of a level, however large the box is.
//   explicit anchors    Strips of 1024 points. A ground truth skips the strips that it cannot
//                       reach, and visits every other strip in one vectorised loop.
//
// Levels and strips of all images are processed in parallel, and no result depends on the number of
// threads.
#include <algorithm>

#include "assign_points.h"
#include "common/simd.h"
#include "matching_grid_reach.h"

namespace retinanet {
namespace {

constexpr int64_t kStrip = 1024;  // points

// A ground truth and its index in the gt_boxes of its image.
template <typename T>
struct RankedTarget {
  PointTarget<T> target;
  int index;
};

// The points of a strip as columns for vectorised loops.
template <typename T>
struct PointColumns {
  alignas(64) T x[kStrip], y[kStrip], reach[kStrip], low[kStrip], high[kStrip];
  PointBounds<T> bounds;
  int size = 0;

  PointColumns() {
    constexpr T kMax = std::numeric_limits<T>::max();
    bounds = {kMax, kMax, -kMax, -kMax, -kMax};
  }

  void push_back(const Point<T>& p) {
    x[size] = p.x;
    y[size] = p.y;
    reach[size] = p.reach;
    low[size] = p.low;
    high[size] = p.high;
    ++size;
    // A NaN leaves the bounds as they are.
    bounds = {min_of(bounds.x1, p.x), min_of(bounds.y1, p.y), max_of(bounds.x2, p.x),
              max_of(bounds.y2, p.y), max_of(bounds.reach, p.reach)};
  }

  // Gives the points that the ground truth may take to it.
  void give(const RankedTarget<T>& gt, int* __restrict__ matches) const {
    vectorised([gt, matches, this](auto) ALWAYS_INLINE {
      for (int i = 0; i < size; ++i) {
        const bool taken = gt.target.may_take({x[i], y[i], reach[i], low[i], high[i]});
        matches[i] = taken ? gt.index : matches[i];
      }
    });
  }
};

// The state of one call of the op.
template <typename T>
class PointAssignment {
 public:
  PointAssignment(const PointArguments& args, const PointRules<T>& rules)
      : args_(args),
        rules_(rules),
        anchors_(args.anchors.view<T>("assign_points")),
        targets_(args.images) {
    for (int64_t n = 0; n < args.images; ++n) {
      const Box<T>* boxes = data<Box<T>>(args.gt_boxes) + n * args.max_gt;
      const int64_t count = clamp_count(data<int64_t>(args.gt_count)[n], args.max_gt);
      for (int64_t i = 0; i < count; ++i) {
        const PointTarget<T> target(boxes[i]);
        if (target.takes_points()) targets_[n].push_back({target, int(i)});
      }
      // At equal priority the lowest index comes last, and keeps the point.
      std::sort(targets_[n].begin(), targets_[n].end(), [](const auto& a, const auto& b) {
        if (a.target.priority != b.target.priority) return a.target.priority < b.target.priority;
        return a.index > b.index;
      });
    }
  }

  // Writes all results.
  void run(int* matches, int* labels, int* num_positive) {
    const Grid& grid = anchors_.grid;
    const int64_t count = args_.anchors.count;
    const int64_t parts = grid.levels > 0 ? grid.levels : (count + kStrip - 1) / kStrip;
    std::vector<int> positive(args_.images * parts, 0);
    torch::stable::parallel_for(0, args_.images * parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t n = i / parts, part = i % parts;
        const int64_t begin = grid.levels > 0 ? grid.first[part] : part * kStrip;
        const int64_t end =
            grid.levels > 0 ? grid.first[part + 1] : std::min(count, begin + kStrip);
        int* part_matches = matches + n * count + begin;
        std::fill(part_matches, part_matches + (end - begin), kBackground);
        if (grid.levels > 0)
          assign_level(n, int(part), part_matches);
        else
          assign_strip(n, begin, end, part_matches);
        positive[i] = write_labels(n, part_matches, end - begin, labels + n * count + begin);
      }
    });
    for (int64_t n = 0; n < args_.images; ++n) {
      num_positive[n] = 0;
      for (int64_t i = n * parts; i < (n + 1) * parts; ++i) num_positive[n] += positive[i];
    }
  }

 private:
  const PointArguments& args_;
  const PointRules<T>& rules_;
  const Anchors<T> anchors_;
  std::vector<std::vector<RankedTarget<T>>> targets_;  // of each image, by ascending priority

  void assign_strip(int64_t image, int64_t begin, int64_t end, int* matches) const {
    PointColumns<T> points;
    for (int64_t a = begin; a < end; ++a) points.push_back(point_of(anchors_(image, a), a, rules_));
    for (const RankedTarget<T>& gt : targets_[image])
      if (points.bounds.may_hold(gt.target)) points.give(gt, matches);
  }

  void assign_level(int64_t image, int level, int* matches) const {
    const Grid& grid = anchors_.grid;
    const auto* base_anchors = static_cast<const float*>(anchors_.data);
    const int per_cell = grid.per_cell[level];
    for (int b = 0; b < per_cell; ++b) {
      const float* base = base_anchors + 4 * int64_t(grid.base[level] + b);
      for (const RankedTarget<T>& gt : targets_[image]) {
        const CellRange cells = reachable_cells(level, base, gt.target);
        for (int64_t y = cells.rows.begin; y < cells.rows.end; ++y)
          for (int64_t x = cells.columns.begin; x < cells.columns.end; ++x) {
            const int64_t i = (y * grid.width[level] + x) * per_cell + b;
            const Box<float> a = grid.box(level, base, y, x);
            const Box<T> anchor{T(a.x1), T(a.y1), T(a.x2), T(a.y2)};
            if (gt.target.may_take(point_of(anchor, grid.first[level] + i, rules_)))
              matches[i] = gt.index;
          }
      }
    }
  }

  // The cells whose points the ground truth may take, and perhaps a few more.
  CellRange reachable_cells(int level, const float* base, const PointTarget<T>& gt) const {
    const Grid& grid = anchors_.grid;
    const CellRange all{{0, grid.height[level]}, {0, grid.width[level]}};
    const Box<T>& b = gt.box;
    // The points of the base anchor, as anchors without width and height.
    const float x = 0.5f * (base[0] + base[2]), y = 0.5f * (base[1] + base[3]);
    const AxisReach columns(x, x, grid.offset_x[level], grid.stride_x[level], grid.width[level]);
    const AxisReach rows(y, y, grid.offset_y[level], grid.stride_y[level], grid.height[level]);
    const float extent_x = columns.extent + std::abs(base[0]) + std::abs(base[2]) +
                           std::abs(float(b.x1)) + std::abs(float(b.x2));
    const float extent_y = rows.extent + std::abs(base[1]) + std::abs(base[3]) +
                           std::abs(float(b.y1)) + std::abs(float(b.y2));
    // Rounding may move a point, a side of the box or the reach by less than this.
    const float slack = 4 * rounding_slack(extent_x, extent_y) * (1 + float(rules_.radius));
    const float reach = float(rules_.radius) * (base[2] - base[0]);
    if (!(columns.stride > 0.f) || !(rows.stride > 0.f)) return all;
    // Without centre sampling, the reach and the slack are infinite or NaN.
    const bool sampled = std::isfinite(reach) && std::isfinite(slack);
    const float margin = sampled ? slack : 4 * rounding_slack(extent_x, extent_y);
    const auto span = [&](const AxisReach& axis, T low, T high, T centre) -> Span {
      float from = float(low), to = float(high);
      if (sampled) {
        from = max_of(from, float(centre) - reach);
        to = min_of(to, float(centre) + reach);
      }
      return axis.reach(from, to, 0.f, margin);
    };
    return {span(rows, b.y1, b.y2, gt.y), span(columns, b.x1, b.x2, gt.x)};
  }

  // Writes the labels of some points, and returns how many of them are positive.
  int write_labels(int64_t image, const int* matches, int64_t size, int* labels) const {
    const int64_t* gt_labels = data<int64_t>(args_.gt_labels) + image * args_.max_gt;
    int positive = 0;
    for (int64_t i = 0; i < size; ++i) positive += matches[i] >= 0;
    std::copy(matches, matches + size, labels);
    for (int64_t i = 0; positive > 0 && i < size; ++i)
      if (matches[i] >= 0) labels[i] = int(gt_labels[matches[i]]);
    return positive;
  }
};

PointResults assign_points_cpu(const Tensor& anchors, std::vector<int64_t> grid_sizes,
                               std::vector<double> grid_steps, std::vector<int64_t> level_sizes,
                               const Tensor& gt_boxes, const Tensor& gt_labels,
                               const Tensor& gt_count, std::optional<double> radius, double low,
                               double high) {
  const PointArguments args(anchors, grid_sizes, grid_steps, level_sizes, gt_boxes, gt_labels,
                            gt_count);
  PointResults results = args.empty_results();
  auto& [matches, labels, num_positive] = results;
  dispatch_compute(gt_boxes.scalar_type(), "assign_points", [&](auto zero) {
    using T = decltype(zero);
    const PointRules<T> rules = args.rules<T>(radius, low, high);
    PointAssignment<T>(args, rules)
        .run(data<int>(matches), data<int>(labels), data<int>(num_positive));
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("assign_points", TORCH_BOX(&assign_points_cpu));
}

}  // namespace retinanet
