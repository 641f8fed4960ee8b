// Which anchors of a grid can overlap a box by so much, without visiting the others.
//
// The answer may hold too many cells but never lacks one: every bound below is widened by more than
// float32 rounding can move an anchor's edges, a box's edges or an IoU.  Where nothing can be said
// (no positive bound, a degenerate or huge base anchor or box), it is the whole level.
#pragma once

#include "common/anchors.h"

namespace retinanet {

// Cells begin .. end - 1 of a row or a column.
struct Span {
  int64_t begin, end;
};

// The anchors of one base anchor along one axis: cell i spans first + i * stride, of length size.
struct AxisReach {
  float first, size, stride;
  int64_t cells;
  float extent;  // no coordinate is larger in magnitude, nor is what one is computed from

  HOST_DEVICE AxisReach(float low, float high, float offset, float stride_, int64_t cells_)
      : first(low + offset),
        size(high - low),
        stride(stride_),
        cells(cells_),
        extent(std::abs(float(cells_) * stride_) + std::abs(offset) + std::abs(low) +
               std::abs(high)) {}

  // At most so much of [low, high] does cell i cover.
  HOST_DEVICE float cover(int64_t i, float low, float high, float slack) const {
    const float edge = float(i) * stride + first;
    return min_of(edge + size, high) - max_of(edge, low) + slack;
  }

  // The cells that may cover `need` of [low, high].
  HOST_DEVICE Span reach(float low, float high, float need, float slack) const {
    const float from = (low + need - slack - size - first) / stride;
    const float to = (high - need + slack - first) / stride;
    if (!(from < float(cells)) || !(to >= 0.f)) return {0, 0};
    return {from > 0.f ? int64_t(std::ceil(from)) : 0,
            to < float(cells - 1) ? int64_t(to) + 1 : cells};
  }

  // The cell whose anchor lies most evenly on [low, high].
  HOST_DEVICE int64_t nearest(float low, float high) const {
    const float i = std::rint((0.5f * (low + high) - 0.5f * size - first) / stride);
    return i > 0.f ? (i < float(cells - 1) ? int64_t(i) : cells - 1) : 0;
  }
};

// One base anchor of one level, in all cells.
struct BaseReach {
  AxisReach x, y;

  HOST_DEVICE BaseReach(const Grid& grid, int level, const float* base)
      : x(base[0], base[2], grid.offset_x[level], grid.stride_x[level], grid.width[level]),
        y(base[1], base[3], grid.offset_y[level], grid.stride_y[level], grid.height[level]) {}
};

// A base anchor's cells against a box.
struct BoxReach {
  const BaseReach& base;
  float x1, y1, x2, y2;
  float slack;  // pixels by which rounding may widen an overlap
  bool known;

  template <typename T>
  HOST_DEVICE BoxReach(const BaseReach& base_, const Box<T>& b)
      : base(base_), x1(float(b.x1)), y1(float(b.y1)), x2(float(b.x2)), y2(float(b.y2)) {
    const float extent_x = base.x.extent + std::abs(x1) + std::abs(x2);
    const float extent_y = base.y.extent + std::abs(y1) + std::abs(y2);
    // So small that its area would not be a normal number.
    const float tiny = max_of(slack_of(extent_x, extent_y), 1e-15f);
    slack = slack_of(extent_x, extent_y);
    known = base.x.stride > 0.f && base.y.stride > 0.f && base.x.size > tiny &&
            base.y.size > tiny && base.x.cells > 0 && base.y.cells > 0 && extent_x < 1e6f &&
            extent_y < 1e6f;
  }

  // An anchor's intersection that an IoU of `iou` takes; negative if that says nothing.
  HOST_DEVICE float intersection_for_iou(float iou) const {
    return iou > 0.f ? kMargin * iou / (1.f + iou) * (least_anchor_area() + least_area()) : -1.f;
  }

  // ... that `share` of the anchor's area takes; any at all if that is 0.
  HOST_DEVICE float intersection_for_share(float share) const {
    return max_of(kMargin * share * least_anchor_area(), 0.f);
  }

  // Row and column of the anchor with about the largest overlap; false if that says nothing.
  HOST_DEVICE bool nearest(int64_t& row, int64_t& column) const {
    if (!known) return false;
    row = base.y.nearest(y1, y2);
    column = base.x.nearest(x1, x2);
    return true;
  }

  // Calls f(row, columns) for the rows in `rows`, with the cells whose anchors may have such an
  // intersection with the box.
  template <typename F>
  HOST_DEVICE void for_rows(float intersection, Span rows, F&& f) const {
    if (!known || !(intersection >= 0.f)) {
      for (int64_t y = rows.begin; y < rows.end; ++y) f(y, Span{0, base.x.cells});
      return;
    }
    const float widest = min_of(base.x.size, x2 - x1) + slack;
    const float highest = min_of(base.y.size, y2 - y1) + slack;
    if (intersection > widest * highest) return;
    const Span reach = base.y.reach(y1, y2, intersection / widest, slack);
    const int64_t end = min_of(rows.end, reach.end);
    for (int64_t y = max_of(rows.begin, reach.begin); y < end; ++y) {
      const float height = min_of(base.y.cover(y, y1, y2, slack), highest);
      if (!(height > 0.f)) continue;
      const Span columns = base.x.reach(x1, x2, intersection / height, slack);
      if (columns.begin < columns.end) f(y, columns);
    }
  }

 private:
  // Of 16 roundings.
  HOST_DEVICE static float slack_of(float extent_x, float extent_y) {
    return (extent_x + extent_y) * 0x1p-20f;
  }

  static constexpr float kMargin = 1.f - 1e-4f;

  HOST_DEVICE float least_anchor_area() const {
    return max_of(base.x.size - slack, 0.f) * max_of(base.y.size - slack, 0.f);
  }
  HOST_DEVICE float least_area() const {
    return max_of(x2 - x1 - slack, 0.f) * max_of(y2 - y1 - slack, 0.f);
  }
};

}  // namespace retinanet
