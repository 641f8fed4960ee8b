// The kept boxes of one image on the CPU, where a candidate finds those that may suppress it.
//
// A class of few boxes is a list, others are a hierarchical grid, hashed: a level holds the boxes
// whose longer side is in [U / 2, U), U a power of two, by the cell of their centre on a grid of
// that level.  IoU > t takes an intersection of more than t / (1 + t) of both areas' sum, and with
// it an overlap of more than that share of both widths' sum, and of both heights'; hence bounds on
// the other box's sides, which levels meet, and on the distance of the centres, which cells meet.
// Only boxes there are compared, by the exact IoU.  The bounds are those of real arithmetic with a
// margin above the rounding of an IoU, so that nothing is missed.
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
  // For at most `most` boxes.
  KeptBoxes(const NmsRules<T>& rules, int64_t most)
      : rules_(rules),
        // Below 1e-6, a margin of digits is no margin.
        threshold_(rules.iou_threshold < T(1e-6) ? 0. : double(rules.iou_threshold) * (1 - 1e-5)),
        cells_(std::bit_ceil(uint64_t(std::clamp<int64_t>(2 * most, 16, 1 << 22))), kNone) {
    // As many as boxes without neighbours take, and the lists of their classes.  What is not
    // written takes no memory, and a vector that grows takes half as much again.
    blocks_.reserve(most + most / kLanes + 1);
  }

  // Whether a kept box of this class suppresses the candidate; all of one class if class-agnostic.
  ALWAYS_INLINE bool suppress(const Box<T>& box, int64_t label) const {
    if (is_inert(box)) return false;
    const auto found = classes_.find(label);
    if (found == classes_.end()) return false;
    const T box_area = area(box);
    const Class& rivals = found->second;
    if (!rivals.by_place) return any_in_list(rivals.first, box, box_area, label);
    if (!is_bounded(box)) return any_at_all(box, box_area, label);
    if (any_in_list(rivals.first, box, box_area, label)) return true;
    const Sides s(box);
    for (const Level& level : levels_) {
      const double upper = level.upper, most = std::max(s.w, s.h);
      if (upper < threshold_ * most || upper / 2 * threshold_ > most) continue;
      const double x = reach(s.w, upper) + s.slack, y = reach(s.h, upper) + s.slack;
      const int64_t left = cell(s.x - x, level), right = cell(s.x + x, level),
                    top = cell(s.y - y, level), bottom = cell(s.y + y, level);
      // Where there are fewer boxes than cells, look at the boxes.
      if (double(right - left + 1) * double(bottom - top + 1) > double(blocks_.size()))
        return any_at_all(box, box_area, label);
      for (int64_t cy = top; cy <= bottom; ++cy)
        for (int64_t cx = left; cx <= right; ++cx) {
          const int32_t first = cells_[slot(level.exponent, cx, cy, label)];
          if (any_in_list(first, box, box_area, label)) return true;
        }
    }
    return false;
  }

  void keep(const Box<T>& box, int64_t label) {
    if (is_inert(box)) return;
    Class& rivals = classes_[label];
    if (rivals.by_place) return keep_by_place(rivals, box, label);
    append(rivals.first, box, label);
    // A negative threshold, for which there are no bounds, never comes here: it keeps one box.
    if (++rivals.size < kFew) return;
    int32_t b = std::exchange(rivals.first, kNone);
    rivals.by_place = true;
    for (; b != kNone; b = blocks_[b].next)
      for (int k = 0; k < blocks_[b].count; ++k) keep_by_place(rivals, blocks_[b].box(k), label);
  }

 private:
  static constexpr int kLanes = 32 / sizeof(T);
  static constexpr int kFew = 512;
  static constexpr double kCellsPerSide = 2;  // of a level's longest
  static constexpr int32_t kNone = -1;

  struct Block {
    T x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes];
    int64_t label;
    int32_t next, count;

    Box<T> box(int k) const { return {x1[k], y1[k], x2[k], y2[k]}; }
  };
  struct Class {
    int32_t first = kNone;  // by place: of the boxes that are not bounded
    int32_t size = 0;
    bool by_place = false;
  };
  struct Level {
    int exponent;
    double upper, per_pixel;  // U, and cells per pixel
  };
  struct Sides {
    double w, h, x, y;  // and the centre
    double slack;       // above the centre's rounding
    explicit Sides(const Box<T>& b)
        : w(double(b.x2) - double(b.x1)),
          h(double(b.y2) - double(b.y1)),
          x(double(b.x1) / 2 + double(b.x2) / 2),
          y(double(b.y1) / 2 + double(b.y2) / 2),
          slack(0x1p-50 * (std::abs(double(b.x1)) + std::abs(double(b.x2)) +
                           std::abs(double(b.y1)) + std::abs(double(b.y2)))) {}
  };

  // A box with which no IoU is above 0: one without a side, or of no finite area.
  bool is_inert(const Box<T>& box) const {
    return rules_.iou_threshold >= T(0) &&
           !(is_valid(box) && area(box) > T(0) && area(box) < std::numeric_limits<T>::infinity());
  }

  // Whether bounds of real arithmetic hold for the box's computed IoUs: its area has all its
  // digits, and nothing here overflows.
  static bool is_bounded(const Box<T>& box) {
    constexpr T kLeast = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
    constexpr T kMost = std::numeric_limits<T>::max() / 8;
    return area(box) >= kLeast && std::abs(box.x1) < kMost && std::abs(box.y1) < kMost &&
           std::abs(box.x2) < kMost && std::abs(box.y2) < kMost;
  }

  // How far apart, along one axis, the centres of boxes with IoU > t may be, of sides `side` and at
  // most `upper`: half of both sides' sum less their overlap, t / (1 + t) of it or more.
  double reach(double side, double upper) const {
    const double other = std::min(upper, side / threshold_);
    return (side + other) * (1 - threshold_) / (2 * (1 + threshold_));
  }

  // Far beyond what a level's boxes can be apart from each other, all is one cell.
  static int64_t cell(double x, const Level& level) {
    return int64_t(std::clamp(std::floor(x * level.per_pixel), -0x1p60, 0x1p60));
  }

  uint64_t slot(int exponent, int64_t x, int64_t y, int64_t label) const {
    const uint64_t key = uint64_t(x) * 0x9e3779b97f4a7c15u + uint64_t(y) * 0xc2b2ae3d27d4eb4fu +
                         uint64_t(exponent) * 0x165667b19e3779f9u + uint64_t(label);
    return ((key ^ key >> 29) * 0x9e3779b97f4a7c15u >> 32) & (cells_.size() - 1);
  }

  void keep_by_place(Class& rivals, const Box<T>& box, int64_t label) {
    if (!is_bounded(box)) return append(rivals.first, box, label);
    const Sides s(box);
    const Level& level = level_of(std::max(s.w, s.h));
    append(cells_[slot(level.exponent, cell(s.x, level), cell(s.y, level), label)], box, label);
  }

  void append(int32_t& first, Box<T> box, int64_t label) {
    if (first == kNone || blocks_[first].label != label || blocks_[first].count == kLanes) {
      blocks_.push_back({});
      blocks_.back().label = label;
      blocks_.back().next = first;
      first = int32_t(blocks_.size()) - 1;
    }
    Block& block = blocks_[first];
    const int lane = block.count++;
    block.x1[lane] = box.x1;
    block.y1[lane] = box.y1;
    block.x2[lane] = box.x2;
    block.y2[lane] = box.y2;
    block.area[lane] = area(box);
  }

  ALWAYS_INLINE bool any_in_list(int32_t first, const Box<T>& box, T box_area,
                                 int64_t label) const {
    for (int32_t b = first; b != kNone; b = blocks_[b].next)
      if (any_in_block(blocks_[b], box, box_area, label)) return true;
    return false;
  }

  ALWAYS_INLINE bool any_at_all(const Box<T>& box, T box_area, int64_t label) const {
    for (const Block& block : blocks_)
      if (any_in_block(block, box, box_area, label)) return true;
    return false;
  }

  ALWAYS_INLINE bool any_in_block(const Block& block, const Box<T>& box, T box_area,
                                  int64_t label) const {
    if (block.label != label) return false;
    const int count = block.count;
    int hits = 0;
    for (int k = 0; k < kLanes; ++k)
      hits |= (k < count) & rules_.suppresses(block.box(k), block.area[k], box, box_area);
    return hits != 0;
  }

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
  std::vector<int32_t> cells_;  // the first block of each
  std::vector<Block> blocks_;
  std::vector<Level> levels_;
  std::unordered_map<int64_t, Class> classes_;
};

}  // namespace retinanet
