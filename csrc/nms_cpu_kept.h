// The kept boxes of one image on the CPU, and the search for those that may suppress a candidate.
//
// A class with few boxes keeps them in a list. A class with more keeps them in a hashed
// hierarchical grid: a level holds the boxes whose longer side is in [U / 2, U), U a power of two,
// and files each box under the cell of that level which contains its centre:
//
//     level of U = 64         level of U = 32
//     +-------+-------+       +---+---+---+---+
//     |     b |       |       |   | c |   |   |    A candidate visits the levels whose boxes are
//     |       |       |       +---+---+---+---+    neither too large nor too small for it, and on
//     +-------+-------+       |   | d |   | e |    each level the cells near its own centre. There
//     |       |       |       +---+---+---+---+    it is compared with every box of its class.
//     |       | a     |       |   |   |   |   |
//     +-------+-------+       +---+---+---+---+
//
// IoU > t requires an intersection above t / (1 + t) of the sum of both areas. The boxes' overlap
// in x is therefore above that share of the sum of both widths, and their overlap in y above that
// share of the sum of both heights. This bounds the sides of the other box, which selects the
// levels, and the distance between the centres, which selects the cells. The boxes in those cells
// are compared by their exact IoU. The bounds hold in real arithmetic. A margin above the rounding
// error of an IoU makes them safe for computed IoUs, so no suppression is missed.
#pragma once

#include <algorithm>
#include <bit>
#include <unordered_map>
#include <utility>

#include "common/simd.h"
#include "nms.h"

namespace retinanet {

template <typename T>
class KeptBoxes {
 public:
  KeptBoxes(const NmsRules<T>& rules, int64_t max_kept)
      : rules_(rules),
        // Lower the threshold by a relative 1e-5, so that the bounds below stay conservative. Below
        // 1e-6, a relative margin would not cover the rounding of an IoU, so use 0.
        threshold_(rules.iou_threshold < T(1e-6) ? 0. : double(rules.iou_threshold) * (1 - 1e-5)),
        cells_(std::bit_ceil(uint64_t(std::clamp<int64_t>(2 * max_kept, 16, 1 << 22))), kNone) {
    // Reserve room for boxes that are each alone in their cells, and for the lists that their
    // classes had before. Reserved memory that is never written takes no pages, whereas a growing
    // vector would take half as much memory again.
    groups_.reserve(max_kept + max_kept / kLanes + 1);
  }

  // Whether a kept box of class `label` suppresses the candidate. If NMS is class-agnostic, the
  // caller passes the same label for all boxes.
  ALWAYS_INLINE bool suppress(const Box<T>& box, int64_t label) const {
    if (never_overlaps(box)) return false;
    const auto entry = classes_.find(label);
    if (entry == classes_.end()) return false;
    const T box_area = area(box);
    const Class& rivals = entry->second;
    if (!rivals.uses_grid) return any_in_list(rivals.first, box, box_area, label);
    if (!is_bounded(box)) return any_in_all(box, box_area, label);
    if (any_in_list(rivals.first, box, box_area, label)) return true;
    const Extent e(box);
    for (const Level& level : levels_) {
      // Skip the level if its boxes are all too small or all too large.
      const double upper = level.upper, longest = std::max(e.w, e.h);
      if (upper < threshold_ * longest || upper / 2 * threshold_ > longest) continue;
      const double x = reach(e.w, upper) + e.slack, y = reach(e.h, upper) + e.slack;
      const int64_t left = cell(e.x - x, level), right = cell(e.x + x, level),
                    top = cell(e.y - y, level), bottom = cell(e.y + y, level);
      // If there are more cells than groups, going through all groups is cheaper.
      if (double(right - left + 1) * double(bottom - top + 1) > double(groups_.size()))
        return any_in_all(box, box_area, label);
      for (int64_t cy = top; cy <= bottom; ++cy)
        for (int64_t cx = left; cx <= right; ++cx) {
          const int32_t first = cells_[slot(level.exponent, cx, cy, label)];
          if (any_in_list(first, box, box_area, label)) return true;
        }
    }
    return false;
  }

  void keep(const Box<T>& box, int64_t label) {
    if (never_overlaps(box)) return;
    Class& rivals = classes_[label];
    if (rivals.uses_grid) return keep_in_grid(rivals, box, label);
    append(rivals.first, box, label);
    if (++rivals.size < kMaxListed) return;
    // Move the class to the grid. The bounds do not hold for a negative threshold, but every IoU is
    // above it, so a class keeps one box and never gets here.
    int32_t g = std::exchange(rivals.first, kNone);
    rivals.uses_grid = true;
    for (; g != kNone; g = groups_[g].next)
      for (int k = 0; k < groups_[g].count; ++k) keep_in_grid(rivals, groups_[g].box(k), label);
  }

 private:
  static constexpr int kLanes = 32 / sizeof(T);
  static constexpr int kMaxListed = 512;      // a class of this many boxes moves to the grid
  static constexpr double kCellsPerSide = 2;  // cells across a box of side U
  static constexpr int32_t kNone = -1;

  // Boxes of one class that one vectorised loop compares with a candidate. The list of a class or
  // of a cell is a chain of such groups.
  struct LaneGroup {
    T x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes];
    int64_t label;
    int32_t next, count;

    Box<T> box(int k) const { return {x1[k], y1[k], x2[k], y2[k]}; }
  };
  struct Class {
    int32_t first = kNone;  // first group of the list; with a grid, of the unbounded boxes
    int32_t size = 0;       // boxes in the list, until the class moves to the grid
    bool uses_grid = false;
  };
  struct Level {
    int exponent;      // U = 2^exponent
    double upper;      // U
    double per_pixel;  // cells per pixel
  };
  struct Extent {
    double w, h, x, y;  // sides and centre
    double slack;       // more than the rounding error of the centre
    explicit Extent(const Box<T>& b)
        : w(double(b.x2) - double(b.x1)),
          h(double(b.y2) - double(b.y1)),
          x(double(b.x1) / 2 + double(b.x2) / 2),
          y(double(b.y1) / 2 + double(b.y2) / 2),
          slack(0x1p-50 * (std::abs(double(b.x1)) + std::abs(double(b.x2)) +
                           std::abs(double(b.y1)) + std::abs(double(b.y2)))) {}
  };

  // Whether no box can have an IoU above the threshold with this one. This is so if a side or the
  // area is not positive and finite, so that every IoU is 0, and the threshold is not negative.
  bool never_overlaps(const Box<T>& box) const {
    return rules_.iou_threshold >= T(0) &&
           !(is_valid(box) && area(box) > T(0) && area(box) < std::numeric_limits<T>::infinity());
  }

  // Whether the bounds of real arithmetic hold for the computed IoUs of this box. Its area must be
  // far enough from underflow to have full precision, and nothing computed from its coordinates may
  // overflow.
  static bool is_bounded(const Box<T>& box) {
    constexpr T kLeast = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
    constexpr T kMost = std::numeric_limits<T>::max() / 8;
    return area(box) >= kLeast && std::abs(box.x1) < kMost && std::abs(box.y1) < kMost &&
           std::abs(box.x2) < kMost && std::abs(box.y2) < kMost;
  }

  // The largest distance along one axis between the centres of two boxes with IoU > t, where one
  // has side `side` and the other at most `upper`. The distance is half the sum of both sides minus
  // their overlap, and the overlap is at least t / (1 + t) of that sum.
  double reach(double side, double upper) const {
    const double other = std::min(upper, side / threshold_);
    return (side + other) * (1 - threshold_) / (2 * (1 + threshold_));
  }

  // The index of the cell at coordinate x. The clamp keeps the conversion defined. No box is 2^60
  // cells of its own level away from 0, because coordinates are at most 2^53 times the sides.
  static int64_t cell(double x, const Level& level) {
    return int64_t(std::clamp(std::floor(x * level.per_pixel), -0x1p60, 0x1p60));
  }

  // The index in `cells_` of a class's cell. Cells that collide share a list, in which every group
  // holds boxes of one class.
  uint64_t slot(int exponent, int64_t x, int64_t y, int64_t label) const {
    const uint64_t key = uint64_t(x) * 0x9e3779b97f4a7c15u + uint64_t(y) * 0xc2b2ae3d27d4eb4fu +
                         uint64_t(exponent) * 0x165667b19e3779f9u + uint64_t(label);
    return ((key ^ key >> 29) * 0x9e3779b97f4a7c15u >> 32) & (cells_.size() - 1);
  }

  void keep_in_grid(Class& rivals, const Box<T>& box, int64_t label) {
    if (!is_bounded(box)) return append(rivals.first, box, label);
    const Extent e(box);
    const Level& level = level_of(std::max(e.w, e.h));
    append(cells_[slot(level.exponent, cell(e.x, level), cell(e.y, level), label)], box, label);
  }

  // Adds a box to the list that starts at group `first`, in a new first group if there is no room.
  void append(int32_t& first, Box<T> box, int64_t label) {
    if (first == kNone || groups_[first].label != label || groups_[first].count == kLanes) {
      groups_.push_back({});
      groups_.back().label = label;
      groups_.back().next = first;
      first = int32_t(groups_.size()) - 1;
    }
    LaneGroup& group = groups_[first];
    const int lane = group.count++;
    group.x1[lane] = box.x1;
    group.y1[lane] = box.y1;
    group.x2[lane] = box.x2;
    group.y2[lane] = box.y2;
    group.area[lane] = area(box);
  }

  ALWAYS_INLINE bool any_in_list(int32_t first, const Box<T>& box, T box_area,
                                 int64_t label) const {
    for (int32_t g = first; g != kNone; g = groups_[g].next)
      if (any_in_group(groups_[g], box, box_area, label)) return true;
    return false;
  }

  ALWAYS_INLINE bool any_in_all(const Box<T>& box, T box_area, int64_t label) const {
    for (const LaneGroup& group : groups_)
      if (any_in_group(group, box, box_area, label)) return true;
    return false;
  }

  ALWAYS_INLINE bool any_in_group(const LaneGroup& group, const Box<T>& box, T box_area,
                                  int64_t label) const {
    if (group.label != label) return false;
    const int count = group.count;
    int hits = 0;
    for (int k = 0; k < kLanes; ++k)
      hits |= (k < count) & rules_.suppresses(group.box(k), group.area[k], box, box_area);
    return hits != 0;
  }

  // The level of boxes whose longer side is `side`: a positive double with exponent field E is in
  // [2^(E - 1023), 2^(E - 1022)).
  const Level& level_of(double side) {
    const int exponent = int(std::bit_cast<uint64_t>(side) >> 52) - 1022;
    for (const Level& level : levels_)
      if (level.exponent == exponent) return level;
    const double upper = std::ldexp(1., exponent);
    levels_.push_back({exponent, upper, kCellsPerSide / upper});
    return levels_.back();
  }

  const NmsRules<T>& rules_;
  const double threshold_;
  std::vector<int32_t> cells_;  // first group of each cell's list
  std::vector<LaneGroup> groups_;
  std::vector<Level> levels_;
  std::unordered_map<int64_t, Class> classes_;
};

}  // namespace retinanet
