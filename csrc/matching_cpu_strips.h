// Strips of anchors on the CPU: how the anchors of an image are cut into strips, and how a ground
// truth visits the anchors of a strip.
//
// One loop over the ground truths processes a strip, whose state fits in a core's cache.
//
//   explicit anchors     | strip: 1024 | 1024 | 1024 | rest |
//                        Each ground truth visits a whole strip in one vectorised loop.
//
//   a level of a grid    +------------------+
//      y                 | strip            |  whole rows of cells, up to 8192 anchors
//      |                 +------------------+
//      +-- x             | strip   [xxxx]   |  Of each row, a ground truth visits only the cells
//                        |          [xxxx]  |  within its reach (matching_grid_reach.h).
//                        +------------------+
#pragma once

#include <algorithm>

#include "common/simd.h"
#include "matching.h"
#include "matching_grid_reach.h"

namespace retinanet {

constexpr int64_t kBoxStrip = 1024;   // explicit anchors; also the capacity of BoxColumns
constexpr int64_t kGridStrip = 8192;  // anchors of a grid, unless one row of cells has more

// Anchors [begin, end) of an image. On a grid, they are the anchors in `rows` of a level's cells.
struct AnchorStrip {
  int64_t begin, end;
  int level;
  Span rows;
};

// The strips of one image.
inline std::vector<AnchorStrip> strips_of(const AnchorArgument& anchors) {
  std::vector<AnchorStrip> strips;
  const Grid& grid = anchors.grid;
  for (int l = 0; l < grid.levels; ++l) {
    const int64_t row = grid.width[l] * grid.per_cell[l];  // anchors in a row of cells
    if (row == 0) continue;
    const int64_t step = std::max<int64_t>(1, kGridStrip / row);
    for (int64_t y = 0; y < grid.height[l]; y += step) {
      const int64_t end = std::min(grid.height[l], y + step);
      strips.push_back({grid.first[l] + y * row, grid.first[l] + end * row, l, {y, end}});
    }
  }
  for (int64_t begin = 0; grid.levels == 0 && begin < anchors.count; begin += kBoxStrip)
    strips.push_back({begin, std::min(anchors.count, begin + kBoxStrip), 0, {0, 0}});
  return strips;
}

// The AnchorMatch of each anchor of a strip, as columns for vectorised loops.
template <typename T>
struct StripState {
  std::vector<T> best_iou;
  std::vector<int> best, promoted;
  bool visited;  // true if any anchor has been visited

  void reset(int64_t size) {
    best_iou.assign(size, T(-1));
    best.assign(size, kBackground);
    promoted.assign(size, kBackground);
    visited = false;
  }

  AnchorMatch<T> operator[](int64_t i) const { return {best_iou[i], best[i], promoted[i]}; }
};

// A valid ground truth.
template <typename T>
struct GroundTruth {
  Box<T> box;
  T area;
  int index;  // in the gt_boxes of its image
};

// Up to kBoxStrip boxes as columns for vectorised loops, and the smallest box that encloses them.
template <typename T>
struct BoxColumns {
  alignas(64) T x1[kBoxStrip], y1[kBoxStrip], x2[kBoxStrip], y2[kBoxStrip], area[kBoxStrip];
  Box<T> bounds;
  int size = 0;

  BoxColumns() {
    constexpr T kMax = std::numeric_limits<T>::max();
    bounds = {kMax, kMax, -kMax, -kMax};
  }

  void push_back(const Box<T>& b) {
    x1[size] = b.x1;
    y1[size] = b.y1;
    x2[size] = b.x2;
    y2[size] = b.y2;
    area[size] = retinanet::area(b);
    ++size;
    // A NaN coordinate leaves the bounds as they are.
    bounds = {min_of(bounds.x1, b.x1), min_of(bounds.y1, b.y1), max_of(bounds.x2, b.x2),
              max_of(bounds.y2, b.y2)};
  }

  // False if the box cannot overlap any of the boxes.
  bool touches(const Box<T>& b) const {
    return b.x1 < bounds.x2 && b.x2 > bounds.x1 && b.y1 < bounds.y2 && b.y2 > bounds.y1;
  }

  // The highest IoU of the boxes with `box`.
  T best_iou(const Box<T>& box, T box_area) const {
    // No IoU is negative, so the bits order as the IoUs do. A maximum of integers vectorises.
    using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    Bits best = 0;
    vectorised([&best, box, box_area, this](auto) ALWAYS_INLINE {
      Bits most = 0;
      for (int i = 0; i < size; ++i)
        most = std::max(most, std::bit_cast<Bits>(iou_of(i, box, box_area)));
      best = most;
    });
    return std::bit_cast<T>(best);
  }

  // The index of the first box whose IoU with `box` is `target`, or `size` if there is none.
  int first_with(T target, const Box<T>& box, T box_area) const {
    int first = size;
    vectorised([&first, target, box, box_area, this](auto) ALWAYS_INLINE {
      int lowest = size;
      for (int i = 0; i < size; ++i)
        lowest = std::min(lowest, iou_of(i, box, box_area) == target ? i : size);
      first = lowest;
    });
    return first;
  }

  // Updates `state` with a ground truth. The boxes are the anchors that `state` belongs to.
  void visit(const GroundTruth<T>& gt, T promoting_iou, StripState<T>& state) const {
    T* __restrict__ best_iou = state.best_iou.data();
    int* __restrict__ best = state.best.data();
    int* __restrict__ promoted = state.promoted.data();
    vectorised([gt, promoting_iou, best_iou, best, promoted, this](auto) ALWAYS_INLINE {
      for (int i = 0; i < size; ++i) {
        const T pair_iou = iou_of(i, gt.box, gt.area);
        AnchorMatch<T> match{best_iou[i], best[i], promoted[i]};
        match.visit(gt.index, pair_iou);
        match.promote(gt.index, pair_iou, promoting_iou);
        best_iou[i] = match.best_iou;
        best[i] = match.best;
        promoted[i] = match.promoted;
      }
    });
    state.visited = true;
  }

  // As `visit` without promotion. Also returns the highest IoU of the boxes with the ground truth.
  T visit_and_find_best(const GroundTruth<T>& gt, StripState<T>& state) const {
    using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;  // as in best_iou
    T* __restrict__ best_iou = state.best_iou.data();
    int* __restrict__ best = state.best.data();
    Bits highest = 0;
    vectorised([&highest, gt, best_iou, best, this](auto) ALWAYS_INLINE {
      Bits most = 0;
      for (int i = 0; i < size; ++i) {
        const T pair_iou = iou_of(i, gt.box, gt.area);
        most = std::max(most, std::bit_cast<Bits>(pair_iou));
        AnchorMatch<T> match{best_iou[i], best[i]};
        match.visit(gt.index, pair_iou);
        best_iou[i] = match.best_iou;
        best[i] = match.best;
      }
      highest = most;
    });
    state.visited = true;
    return std::bit_cast<T>(highest);
  }

  // Calls f(i, box) for the boxes that may overlap b: for all of them or for none.
  template <typename F>
  void for_overlapping(const Box<T>& b, F&& f) const {
    if (!touches(b)) return;
    for (int i = 0; i < size; ++i) f(i, Box<T>{x1[i], y1[i], x2[i], y2[i]});
  }

 private:
  ALWAYS_INLINE inline T iou_of(int i, const Box<T>& box, T box_area) const {
    return iou(box, box_area, Box<T>{x1[i], y1[i], x2[i], y2[i]}, area[i]);
  }
};

// The anchors of a grid, which are found by their cells.
template <typename T>
struct GridAnchors {
  const Grid& grid;
  const float* base_anchors;

  // The anchor of a level's base anchor number b in cell (y, x).
  Box<T> box(int level, int b, int64_t y, int64_t x) const {
    const Box<float> a = grid.box(level, base_anchors + 4 * int64_t(grid.base[level] + b), y, x);
    return {T(a.x1), T(a.y1), T(a.x2), T(a.y2)};
  }

  // The index of this anchor in its image.
  int64_t number(int level, int b, int64_t y, int64_t x) const {
    return grid.first[level] + (y * grid.width[level] + x) * grid.per_cell[level] + b;
  }

  // The highest IoU of a ground truth with any anchor.
  T best_iou(const GroundTruth<T>& gt) const {
    T best = 0;
    const auto visit = [&](int level, int b, int64_t y, int64_t x) {
      const Box<T> anchor = box(level, b, y, x);
      best = max_of(best, iou(gt.box, gt.area, anchor, area(anchor)));
    };
    // First visit, for each base anchor, the cell whose anchor is closest to the ground truth by
    // centre. The best of these IoUs is close to the best of all.
    for (int l = 0; l < grid.levels; ++l) {
      for_bases(l, gt.box, [&](int b, const BoxReach& reach) {
        int64_t y, x;
        if (reach.nearest(y, x)) visit(l, b, y, x);
      });
    }
    // Then visit every anchor that can reach this IoU. No other can be better.
    const float lower_bound = max_of(float(best), std::numeric_limits<float>::min());
    for (int l = 0; l < grid.levels; ++l) {
      for_bases(l, gt.box, [&](int b, const BoxReach& reach) {
        reach.for_rows(reach.intersection_for_iou(lower_bound), {0, grid.height[l]},
                       [&](int64_t y, Span columns) {
                         for (int64_t x = columns.begin; x < columns.end; ++x) visit(l, b, y, x);
                       });
      });
    }
    return best;
  }

  // The first anchor whose IoU with a ground truth is `best`, the highest of all.
  int64_t first_with(T best, const GroundTruth<T>& gt) const {
    if (!(best > T(0))) return 0;  // the IoU of every anchor
    int64_t first = std::numeric_limits<int64_t>::max();
    for (int l = 0; l < grid.levels; ++l) {
      for_bases(l, gt.box, [&](int b, const BoxReach& reach) {
        reach.for_rows(reach.intersection_for_iou(float(best)), {0, grid.height[l]},
                       [&](int64_t y, Span columns) {
                         for (int64_t x = columns.begin; x < columns.end; ++x) {
                           const Box<T> anchor = box(l, b, y, x);
                           if (iou(gt.box, gt.area, anchor, area(anchor)) == best)
                             first = std::min(first, number(l, b, y, x));
                         }
                       });
      });
    }
    return first;
  }

  // Updates `state` with a ground truth, for the anchors of the strip whose IoU with it may be
  // `relevant_iou` or more. These are all anchors if `relevant_iou` is not positive.
  void visit(const AnchorStrip& strip, const GroundTruth<T>& gt, T promoting_iou, T relevant_iou,
             StripState<T>& state) const {
    for_bases(strip.level, gt.box, [&](int b, const BoxReach& reach) {
      for_strip(strip, b, reach, reach.intersection_for_iou(float(relevant_iou)),
                [&](int64_t i, const Box<T>& anchor) {
                  const T pair_iou = iou(gt.box, gt.area, anchor, area(anchor));
                  AnchorMatch<T> match = state[i];
                  match.visit(gt.index, pair_iou);
                  match.promote(gt.index, pair_iou, promoting_iou);
                  state.best_iou[i] = match.best_iou;
                  state.best[i] = match.best;
                  state.promoted[i] = match.promoted;
                  state.visited = true;
                });
    });
  }

  // Calls f(i, anchor) for the anchors of the strip that the box may cover by `share` or more. i is
  // the index of the anchor in the strip.
  template <typename F>
  void for_covered(const AnchorStrip& strip, const Box<T>& box, T share, F&& f) const {
    for_bases(strip.level, box, [&](int b, const BoxReach& reach) {
      for_strip(strip, b, reach, reach.intersection_for_share(float(share)), f);
    });
  }

 private:
  // Calls f(b, reach) for each base anchor of a level, with its reach to the box.
  template <typename F>
  void for_bases(int level, const Box<T>& box, F&& f) const {
    for (int b = 0; b < grid.per_cell[level]; ++b) {
      const BaseReach base(grid, level, base_anchors + 4 * int64_t(grid.base[level] + b));
      f(b, BoxReach(base, box));
    }
  }

  // Calls f(i, anchor) for the anchors of base anchor b in the strip whose intersection with the
  // box of `reach` may be `intersection` or more.
  template <typename F>
  void for_strip(const AnchorStrip& strip, int b, const BoxReach& reach, float intersection,
                 F&& f) const {
    reach.for_rows(intersection, strip.rows, [&](int64_t y, Span columns) {
      const int64_t row = (y - strip.rows.begin) * grid.width[strip.level];
      for (int64_t x = columns.begin; x < columns.end; ++x)
        f((row + x) * grid.per_cell[strip.level] + b, box(strip.level, b, y, x));
    });
  }
};

}  // namespace retinanet
