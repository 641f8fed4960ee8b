// Finds the anchors of a grid that can overlap a box by a given amount, and visits no others.
//
// The result may hold too many cells but never lacks one. Every bound below is widened by more than
// float32 rounding can move an edge of an anchor, an edge of the box or an IoU. The result is the
// whole level where no bound holds: if the amount is not positive, or if a base anchor or the box
// is degenerate or huge.
//
// Along one axis, the anchors of a base anchor have the same size and are one stride apart, so the
// cells whose anchors cover at least `need` of the box are consecutive:
//
//   box                  low |================| high
//   cell 0          |-------|
//   cell 1              |-------|                    covers less than `need`
//   cell 2                  |-------|                begin
//   cell 3                      |-------|
//   cell 4                          |-------|
//   cell 5                              |-------|    end: covers less than `need`
#pragma once

#include "common/anchors.h"

namespace retinanet {

// Pixels by which float32 rounding may change the length of an anchor's side or of an overlap: a
// bound on 16 roundings (16 * 2^-24 = 2^-20) at the largest coordinates involved.
HOST_DEVICE float rounding_slack(float extent_x, float extent_y) {
  return (extent_x + extent_y) * 0x1p-20f;
}

// Cells [begin, end) of a row or a column.
struct Span {
  int64_t begin, end;
};

// The cells of some rows and columns.
struct CellRange {
  Span rows, columns;
};

// The anchors of one base anchor along one axis. The anchor of cell i spans `size` pixels from
// first + i * stride.
struct AxisReach {
  float first, size, stride;
  int64_t cells;
  float extent;  // bounds the magnitude of every coordinate and of the numbers it is computed from

  HOST_DEVICE AxisReach(float low, float high, float offset, float stride_, int64_t cells_)
      : first(low + offset),
        size(high - low),
        stride(stride_),
        cells(cells_),
        extent(std::abs(float(cells_) * stride_) + std::abs(offset) + std::abs(low) +
               std::abs(high)) {}

  // An upper bound of the length of [low, high] that the anchor of cell i covers.
  HOST_DEVICE float cover(int64_t i, float low, float high, float slack) const {
    const float edge = float(i) * stride + first;
    return min_of(edge + size, high) - max_of(edge, low) + slack;
  }

  // The cells whose anchors may cover `need` of [low, high].
  HOST_DEVICE Span reach(float low, float high, float need, float slack) const {
    const float from = (low + need - slack - size - first) / stride;
    const float to = (high - need + slack - first) / stride;
    if (!(from < float(cells)) || !(to >= 0.f)) return {0, 0};
    return {from > 0.f ? int64_t(std::ceil(from)) : 0,
            to < float(cells - 1) ? int64_t(to) + 1 : cells};
  }

  // The cell whose anchor has its centre closest to that of [low, high].
  HOST_DEVICE int64_t nearest(float low, float high) const {
    const float i = std::rint((0.5f * (low + high) - 0.5f * size - first) / stride);
    return i > 0.f ? (i < float(cells - 1) ? int64_t(i) : cells - 1) : 0;
  }
};

// The anchors of one base anchor of a level, in all cells.
struct BaseReach {
  AxisReach x, y;

  HOST_DEVICE BaseReach(const Grid& grid, int level, const float* base)
      : x(base[0], base[2], grid.offset_x[level], grid.stride_x[level], grid.width[level]),
        y(base[1], base[3], grid.offset_y[level], grid.stride_y[level], grid.height[level]) {}
};

// The same anchors, compared with a box.
struct BoxReach {
  const BaseReach& base;
  float x1, y1, x2, y2;
  float slack;  // see rounding_slack
  bool known;  // false if the base anchor or the box is too small or too large to rule out any cell

  template <typename T>
  HOST_DEVICE BoxReach(const BaseReach& base_, const Box<T>& b)
      : base(base_), x1(float(b.x1)), y1(float(b.y1)), x2(float(b.x2)), y2(float(b.y2)) {
    const float extent_x = base.x.extent + std::abs(x1) + std::abs(x2);
    const float extent_y = base.y.extent + std::abs(y1) + std::abs(y2);
    // With a side of this size or less, a base anchor's area might not be a normal number.
    slack = rounding_slack(extent_x, extent_y);
    const float tiny = max_of(slack, 1e-15f);
    known = base.x.stride > 0.f && base.y.stride > 0.f && base.x.size > tiny &&
            base.y.size > tiny && base.x.cells > 0 && base.y.cells > 0 && extent_x < 1e6f &&
            extent_y < 1e6f;
  }

  // A lower bound of the intersection that an IoU of `iou` needs, or -1 if `iou` is not positive.
  //
  // intersection = iou * union = iou / (1 + iou) * (area of the anchor + area of the box)
  HOST_DEVICE float intersection_for_iou(float iou) const {
    return iou > 0.f ? kMargin * iou / (1.f + iou) * (min_anchor_area() + min_box_area()) : -1.f;
  }

  // A lower bound of the intersection that covers `share` of an anchor's area. It is 0, any overlap
  // at all, for a share of 0.
  HOST_DEVICE float intersection_for_share(float share) const {
    return max_of(kMargin * share * min_anchor_area(), 0.f);
  }

  // Sets row and column to the anchor whose centre is closest to the box's. Its overlap is close to
  // the largest. Returns false and sets nothing if `known` is false.
  HOST_DEVICE bool nearest(int64_t& row, int64_t& column) const {
    if (!known) return false;
    row = base.y.nearest(y1, y2);
    column = base.x.nearest(x1, x2);
    return true;
  }

  // Rows and columns that hold every cell whose anchor may intersect the box by `intersection` or
  // more. Without such a cell, a span may end before it begins.
  HOST_DEVICE CellRange range(float intersection) const {
    if (!known || !(intersection >= 0.f)) return {{0, base.y.cells}, {0, base.x.cells}};
    const float widest = this->widest(), highest = this->highest();
    if (intersection > widest * highest) return {{0, 0}, {0, 0}};
    // The intersection, divided by the width, is the height that an anchor must cover, and the
    // other way round.
    return {base.y.reach(y1, y2, intersection / widest, slack),
            base.x.reach(x1, x2, intersection / highest, slack)};
  }

  // Calls f(row, columns) for each of `rows` that has such cells, with the columns of these cells.
  // A row may have fewer cells than range() says, because it has bounds of its own.
  template <typename F>
  HOST_DEVICE void for_rows(float intersection, Span rows, F&& f) const {
    const CellRange all = range(intersection);
    const int64_t end = min_of(rows.end, all.rows.end);
    for (int64_t y = max_of(rows.begin, all.rows.begin); y < end; ++y) {
      if (!known || !(intersection >= 0.f)) {
        f(y, all.columns);
        continue;
      }
      // The intersection, divided by the height that this row's anchors cover, is the width needed.
      const float height = min_of(base.y.cover(y, y1, y2, slack), highest());
      if (!(height > 0.f)) continue;
      const Span columns = base.x.reach(x1, x2, intersection / height, slack);
      if (columns.begin < columns.end) f(y, columns);
    }
  }

 private:
  // Allows for the rounding of an IoU and of the bounds themselves.
  static constexpr float kMargin = 1.f - 1e-4f;

  // No anchor overlaps the box by more than this width and height.
  HOST_DEVICE float widest() const { return min_of(base.x.size, x2 - x1) + slack; }
  HOST_DEVICE float highest() const { return min_of(base.y.size, y2 - y1) + slack; }

  // Lower bounds of the area of every anchor, and of the area of the box.
  HOST_DEVICE float min_anchor_area() const {
    return max_of(base.x.size - slack, 0.f) * max_of(base.y.size - slack, 0.f);
  }
  HOST_DEVICE float min_box_area() const {
    return max_of(x2 - x1 - slack, 0.f) * max_of(y2 - y1 - slack, 0.f);
  }
};

}  // namespace retinanet
