// Runs of anchors on the CPU: which anchors one thread takes at a time, and how it visits them with
// a ground truth.
#pragma once

#include <algorithm>

#include "common/simd.h"
#include "matching.h"
#include "matching_grid_reach.h"

namespace retinanet {

constexpr int64_t kBoxRun = 1024;   // explicit anchors of a run
constexpr int64_t kGridRun = 8192;  // anchors of a run of grid rows, about

// Anchors begin .. end - 1; on a grid they fill these rows of a level.
struct Run {
  int64_t begin, end;
  int level;
  Span rows;
};

inline std::vector<Run> runs_of(const AnchorArgument& anchors) {
  std::vector<Run> runs;
  const Grid& grid = anchors.grid;
  for (int l = 0; l < grid.levels; ++l) {
    const int64_t row = grid.width[l] * grid.per_cell[l];
    if (row == 0) continue;
    const int64_t step = std::max<int64_t>(1, kGridRun / row);
    for (int64_t y = 0; y < grid.height[l]; y += step) {
      const int64_t end = std::min(grid.height[l], y + step);
      runs.push_back({grid.first[l] + y * row, grid.first[l] + end * row, l, {y, end}});
    }
  }
  for (int64_t begin = 0; grid.levels == 0 && begin < anchors.count; begin += kBoxRun)
    runs.push_back({begin, std::min(anchors.count, begin + kBoxRun), 0, {0, 0}});
  return runs;
}

// The AnchorMatch of each anchor of a run, in columns.
template <typename T>
struct RunState {
  std::vector<T> best_iou;
  std::vector<int> best, promoted;
  bool visited;

  void reset(int64_t size) {
    best_iou.assign(size, T(-1));
    best.assign(size, kBackground);
    promoted.assign(size, kBackground);
    visited = false;
  }

  AnchorMatch<T> operator[](int64_t i) const { return {best_iou[i], best[i], promoted[i]}; }
};

// A ground truth that can match.
template <typename T>
struct GroundTruth {
  Box<T> box;
  T area;
  int index;  // position in the padded list
};

// Some boxes in columns, as vectorised loops read them, and what bounds them.
template <typename T>
struct BoxColumns {
  alignas(64) T x1[kBoxRun], y1[kBoxRun], x2[kBoxRun], y2[kBoxRun], area[kBoxRun];
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
    // NaN stays out.
    bounds = {min_of(bounds.x1, b.x1), min_of(bounds.y1, b.y1), max_of(bounds.x2, b.x2),
              max_of(bounds.y2, b.y2)};
  }

  // False if the box overlaps none.
  bool touches(const Box<T>& b) const {
    return b.x1 < bounds.x2 && b.x2 > bounds.x1 && b.y1 < bounds.y2 && b.y2 > bounds.y1;
  }

  T best_iou(const Box<T>& box, T box_area) const {
    // IoUs are not negative: their bits order as they do, and a maximum of integers vectorises.
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

  // The first of the boxes that have this IoU with the box.
  int first_with(T wanted, const Box<T>& box, T box_area) const {
    int first = size;
    vectorised([&first, wanted, box, box_area, this](auto) ALWAYS_INLINE {
      int found = size;
      for (int i = 0; i < size; ++i)
        found = std::min(found, iou_of(i, box, box_area) == wanted ? i : size);
      first = found;
    });
    return first;
  }

  // Visits all boxes, which are anchors, with a ground truth.
  void visit(const GroundTruth<T>& gt, T promoting_iou, RunState<T>& state) const {
    T* __restrict__ best_iou = state.best_iou.data();
    int* __restrict__ best = state.best.data();
    int* __restrict__ promoted = state.promoted.data();
    vectorised([gt, promoting_iou, best_iou, best, promoted, this](auto) ALWAYS_INLINE {
      for (int i = 0; i < size; ++i) {
        const T overlap = iou_of(i, gt.box, gt.area);
        AnchorMatch<T> match{best_iou[i], best[i], promoted[i]};
        match.visit(gt.index, overlap);
        match.promote(gt.index, overlap, promoting_iou);
        best_iou[i] = match.best_iou;
        best[i] = match.best;
        promoted[i] = match.promoted;
      }
    });
    state.visited = true;
  }

  // Calls f(i, box) for the boxes that may overlap the one given.
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

// The anchors of a grid, by their cells.
template <typename T>
struct GridAnchors {
  const Grid& grid;
  const float* base_anchors;

  Box<T> box(int level, int b, int64_t y, int64_t x) const {
    const Box<float> a = grid.box(level, base_anchors + 4 * (grid.base[level] + b), y, x);
    return {T(a.x1), T(a.y1), T(a.x2), T(a.y2)};
  }

  T best_iou(const GroundTruth<T>& gt) const {
    T best = 0;
    const auto visit = [&](int level, int b, int64_t y, int64_t x) {
      const Box<T> anchor = box(level, b, y, x);
      best = max_of(best, iou(gt.box, gt.area, anchor, area(anchor)));
    };
    for (int l = 0; l < grid.levels; ++l) {
      for_bases(l, gt.box, [&](int b, const BoxReach& reach) {
        int64_t y, x;
        if (reach.nearest(y, x)) visit(l, b, y, x);
      });
    }
    // That is about the best; no anchor out of its reach is better.
    const float found = max_of(float(best), std::numeric_limits<float>::min());
    for (int l = 0; l < grid.levels; ++l) {
      for_bases(l, gt.box, [&](int b, const BoxReach& reach) {
        reach.for_rows(reach.intersection_for_iou(found), {0, grid.height[l]},
                       [&](int64_t y, Span columns) {
                         for (int64_t x = columns.begin; x < columns.end; ++x) visit(l, b, y, x);
                       });
      });
    }
    return best;
  }

  // Visits the anchors of the run that may have an IoU of `relevant_iou` or more; all of them if it
  // is not positive.
  void visit(const Run& run, const GroundTruth<T>& gt, T promoting_iou, T relevant_iou,
             RunState<T>& state) const {
    for_bases(run.level, gt.box, [&](int b, const BoxReach& reach) {
      for_run(run, b, reach, reach.intersection_for_iou(float(relevant_iou)),
              [&](int64_t i, const Box<T>& anchor) {
                const T overlap = iou(gt.box, gt.area, anchor, area(anchor));
                AnchorMatch<T> match = state[i];
                match.visit(gt.index, overlap);
                match.promote(gt.index, overlap, promoting_iou);
                state.best_iou[i] = match.best_iou;
                state.best[i] = match.best;
                state.promoted[i] = match.promoted;
                state.visited = true;
              });
    });
  }

  // Calls f(i, anchor) for the anchors of the run of which the box may cover such a share.
  template <typename F>
  void for_covered(const Run& run, const Box<T>& box, T share, F&& f) const {
    for_bases(run.level, box, [&](int b, const BoxReach& reach) {
      for_run(run, b, reach, reach.intersection_for_share(float(share)), f);
    });
  }

 private:
  template <typename F>
  void for_bases(int level, const Box<T>& box, F&& f) const {
    for (int b = 0; b < grid.per_cell[level]; ++b) {
      const BaseReach base(grid, level, base_anchors + 4 * (grid.base[level] + b));
      f(b, BoxReach(base, box));
    }
  }

  template <typename F>
  void for_run(const Run& run, int b, const BoxReach& reach, float intersection, F&& f) const {
    reach.for_rows(intersection, run.rows, [&](int64_t y, Span columns) {
      const int64_t row = (y - run.rows.begin) * grid.width[run.level];
      for (int64_t x = columns.begin; x < columns.end; ++x)
        f((row + x) * grid.per_cell[run.level] + b, box(run.level, b, y, x));
    });
  }
};

}  // namespace retinanet
