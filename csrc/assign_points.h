// Assignment of points to ground truths (Tian et al., "FCOS", 2019): the rule of one pair and the
// input check of both backends.
//
// A point is the centre of an anchor. A ground truth may take it if
//   1. the point is less than `radius` anchor widths from the centre of the box, in x and in y;
//   2. the point lies inside the box;
//   3. the largest distance from the point to a side of the box is in the range of its level.
// If several may take the point, the smallest one does, at a tie the one with the lowest index.
//
// The order of operations is torchvision's, and no product is contracted into a fused multiply-add
// (boxes.h), so assignments have the same bits on every backend.
#pragma once

#include "matching.h"

namespace retinanet {

// The options of a call, in the compute dtype T.
template <typename T>
struct PointRules {
  T radius;     // in anchor widths; infinite without centre sampling
  T low, high;  // the range of a level, in anchor widths
  int64_t
      end_of_first;  // anchors before this one belong to the first level, which has no lower bound
  int64_t
      begin_of_last;  // anchors from this one on belong to the last level, which has no upper bound
};

// A point and its bounds, all of which are exclusive.
template <typename T>
struct Point {
  T x, y;
  T reach;      // of the distance to the centre of a box, in x and in y
  T low, high;  // of the largest distance to a side
};

template <typename T>
HOST_DEVICE Point<T> point_of(const Box<T>& anchor, int64_t index, const PointRules<T>& rules) {
  const T width = add(anchor.x2, -anchor.x1);
  return {
      mul(add(anchor.x1, anchor.x2), T(0.5)), mul(add(anchor.y1, anchor.y2), T(0.5)),
      mul(rules.radius, width), index < rules.end_of_first ? T(0) : mul(width, rules.low),
      index >= rules.begin_of_last ? std::numeric_limits<T>::infinity() : mul(width, rules.high)};
}

// A ground truth that points are compared with.
template <typename T>
struct PointTarget {
  Box<T> box;
  T x, y;  // the centre
  // Smaller boxes have higher priority. torchvision ranks boxes by 1e8 - area, in which float32
  // areas that differ by less than 4 may be equal.
  T priority;

  PointTarget() = default;
  HOST_DEVICE explicit PointTarget(const Box<T>& b)
      : box(b),
        x(mul(add(b.x1, b.x2), T(0.5))),
        y(mul(add(b.y1, b.y2), T(0.5))),
        priority(add(T(1e8), -area(b))) {}

  // False if the ground truth is too large to take a point, as in torchvision. That includes a box
  // with an infinite side. Inside any other degenerate box, there is no point.
  HOST_DEVICE bool takes_points() const { return priority >= T(1e-5); }

  // True if the ground truth may take the point. Without branches, for loops that the compiler
  // vectorises. A NaN makes it false.
  HOST_DEVICE bool may_take(const Point<T>& p) const {
    const T left = add(p.x, -box.x1), right = add(box.x2, -p.x);
    const T top = add(p.y, -box.y1), bottom = add(box.y2, -p.y);
    const T largest = higher(higher(left, right), higher(top, bottom));
    return (std::abs(add(p.x, -x)) < p.reach) & (std::abs(add(p.y, -y)) < p.reach) & (left > T(0)) &
           (top > T(0)) & (right > T(0)) & (bottom > T(0)) & (largest > p.low) & (largest < p.high);
  }
};

// A box that encloses points, and the largest of their reaches. Points with a NaN may lie outside,
// because no ground truth may take them.
template <typename T>
struct PointBounds {
  T x1, y1, x2, y2, reach;

  // False if the ground truth may take none of the points. Rounding is monotonic, so the distance
  // to the closest bound is at most that to any point.
  HOST_DEVICE bool may_hold(const PointTarget<T>& gt) const {
    return (x2 > gt.box.x1) & (gt.box.x2 > x1) & (y2 > gt.box.y1) & (gt.box.y2 > y1) &
           (add(gt.x, -x2) < reach) & (add(x1, -gt.x) < reach) & (add(gt.y, -y2) < reach) &
           (add(y1, -gt.y) < reach);
  }
};

// The results of the op, in the order of its schema: matches and labels [N, A], num_positive [N].
using PointResults = std::tuple<Tensor, Tensor, Tensor>;

// The arguments of the op, checked once for both backends.
struct PointArguments {
  AnchorArgument anchors;
  Tensor gt_boxes, gt_labels, gt_count;
  int64_t images, max_gt;
  int64_t end_of_first, begin_of_last;  // see PointRules

  PointArguments(const Tensor& anchors, const std::vector<int64_t>& grid_sizes,
                 const std::vector<double>& grid_steps, const std::vector<int64_t>& level_sizes,
                 const Tensor& gt_boxes, const Tensor& gt_labels, const Tensor& gt_count)
      : anchors(anchors, grid_sizes, grid_steps, "assign_points"),
        gt_boxes(contiguous_aligned(gt_boxes)),
        gt_labels(contiguous_aligned(gt_labels)),
        gt_count(contiguous_aligned(gt_count)) {
    const char* op = "assign_points";
    check(gt_boxes.dim() == 3, op, ": gt_boxes must have shape [N, M, 4], got ", shape(gt_boxes));
    images = gt_boxes.size(0);
    max_gt = gt_boxes.size(1);
    check(max_gt < (int64_t(1) << 30), op, ": expected fewer than 2^30 ground truths, got ",
          max_gt);
    check_shape(gt_boxes, {images, max_gt, 4}, op, "gt_boxes");
    check_shape(gt_labels, {images, max_gt}, op, "gt_labels");
    check_dtype(gt_labels, ScalarType::Long, op, "gt_labels");
    check_shape(gt_count, {images}, op, "gt_count");
    check_dtype(gt_count, ScalarType::Long, op, "gt_count");
    const int64_t count = this->anchors.count;
    if (this->anchors.batched) check_shape(anchors, {images, count, 4}, op, "anchors");
    // Without sizes, explicit anchors form one level.
    const Grid& grid = this->anchors.grid;
    end_of_first = grid.levels > 0 ? grid.first[1] : count;
    begin_of_last = grid.levels > 0 ? grid.first[grid.levels - 1] : 0;
    if (level_sizes.empty()) return;
    int64_t sum = 0;
    for (const int64_t size : level_sizes) {
      check(size >= 0 && size <= count - sum, op, ": level_sizes must add up to the ", count,
            " anchors");
      sum += size;
    }
    check(grid.levels == 0 && sum == count, op, ": level_sizes must add up to the ", count,
          " anchors, and be empty with a grid");
    end_of_first = level_sizes.front();
    begin_of_last = count - level_sizes.back();
  }

  template <typename T>
  PointRules<T> rules(std::optional<double> radius, double low, double high) const {
    return {radius ? T(*radius) : std::numeric_limits<T>::infinity(), T(low), T(high), end_of_first,
            begin_of_last};
  }

  // Uninitialised results.
  PointResults empty_results() const {
    const auto empty = [&](torch::headeronly::IntHeaderOnlyArrayRef sizes) {
      return empty_tensor(gt_boxes, sizes, ScalarType::Int);
    };
    return {empty({images, anchors.count}), empty({images, anchors.count}), empty({images})};
  }
};

}  // namespace retinanet
