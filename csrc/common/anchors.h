// Anchors as kernels see them: a tensor of boxes, or a grid (AnchorGrid in Python) whose boxes are
// computed where they are needed.
#pragma once

#include "boxes.h"
#include "checks.h"
#include "division.h"

namespace retinanet {

// A level of a grid has fewer anchors than this, so that kernels number them with 32 bits.
constexpr int64_t kMaxLevelAnchors = int64_t(1) << 31;

// The anchors of a feature pyramid. Anchors are numbered by level, then by y, x and base anchor.
struct Grid {
  int levels = 0;
  int64_t first[kMaxLevels + 1] = {0};  // each level's first anchor, then the number of anchors
  int64_t height[kMaxLevels], width[kMaxLevels];  // in cells
  int per_cell[kMaxLevels];                       // base anchors of the level
  int base[kMaxLevels];                           // the level's first base anchor
  float stride_y[kMaxLevels], stride_x[kMaxLevels], offset_y[kMaxLevels], offset_x[kMaxLevels];
  Divisor by_per_cell[kMaxLevels], by_width[kMaxLevels];  // of a level without cells: 1

  // A cell of a level.
  struct Cell {
    uint32_t y, x;
  };

  // The level of an anchor.
  HOST_DEVICE int level_of(int64_t anchor) const {
    int level = 0;
    while (level + 1 < levels && anchor >= first[level + 1]) ++level;
    return level;
  }

  // A level's cell number `cell`, counted by rows.
  HOST_DEVICE Cell cell_of(int level, uint32_t cell) const {
    const uint32_t y = by_width[level].quotient(cell);
    return {y, cell - y * uint32_t(width[level])};
  }

  // The box of an anchor, in float32.
  HOST_DEVICE Box<float> box(const float* base_anchors, int64_t anchor) const {
    const int level = level_of(anchor);
    return box_in_level(level, base_anchors, uint32_t(anchor - first[level]));
  }

  // The box of a level's anchor number `in_level`.
  HOST_DEVICE Box<float> box_in_level(int level, const float* base_anchors,
                                      uint32_t in_level) const {
    const uint32_t number = by_per_cell[level].quotient(in_level);
    const Cell cell = cell_of(level, number);
    const uint32_t b = uint32_t(base[level]) + (in_level - number * uint32_t(per_cell[level]));
    return box(level, base_anchors + 4 * int64_t(b), cell.y, cell.x);
  }

  // The box of base anchor `b` (4 floats, aligned to 16 bytes) of a level in cell (y, x). Each
  // coordinate is (index * stride + offset) + base, in this order of operations.
  HOST_DEVICE Box<float> box(int level, const float* b, int64_t y, int64_t x) const {
    const float cx = centre_x(level, x), cy = centre_y(level, y);
    const Box<float> base_box = *reinterpret_cast<const Box<float>*>(b);
    return {add(cx, base_box.x1), add(cy, base_box.y1), add(cx, base_box.x2), add(cy, base_box.y2)};
  }

  // The point of a cell to which the base anchors are added. An index fits in an int.
  HOST_DEVICE float centre_x(int level, int64_t x) const {
    return add(mul(float(int(x)), stride_x[level]), offset_x[level]);
  }
  HOST_DEVICE float centre_y(int level, int64_t y) const {
    return add(mul(float(int(y)), stride_y[level]), offset_y[level]);
  }
};

// The anchors of a batch, in compute dtype T.
template <typename T>
struct Anchors {
  const void* data;      // explicit boxes, Box<T>; or the base anchors of a grid, in float32
  int64_t image_stride;  // boxes from one image to the next; 0 if all images share them
  Grid grid;             // without levels if the boxes are explicit

  HOST_DEVICE Box<T> operator()(int64_t image, int64_t anchor) const {
    if (grid.levels == 0) return static_cast<const Box<T>*>(data)[image * image_stride + anchor];
    const Box<float> b = grid.box(static_cast<const float*>(data), anchor);
    return {T(b.x1), T(b.y1), T(b.x2), T(b.y2)};
  }
};

// The three anchor arguments of a schema (see library.cpp), checked. The result of view() points
// into `tensor`.
struct AnchorArgument {
  Tensor tensor;
  Grid grid;
  int64_t count;  // anchors of one image
  bool batched;   // true if each image has explicit anchors of its own

  AnchorArgument(const Tensor& anchors, const std::vector<int64_t>& sizes,
                 const std::vector<double>& steps, const char* op)
      : tensor(contiguous_aligned(anchors)) {
    const int64_t levels = int64_t(sizes.size()) / 3;
    check((anchors.dim() == 2 || anchors.dim() == 3) && anchors.size(anchors.dim() - 1) == 4, op,
          ": anchors must have shape [A, 4] or [N, A, 4], got ", shape(anchors));
    if (sizes.empty() && steps.empty()) {
      count = anchors.size(anchors.dim() - 2);
      batched = anchors.dim() == 3;
      return;
    }
    check(levels > 0 && levels <= kMaxLevels && sizes.size() == size_t(3 * levels) &&
              steps.size() == size_t(4 * levels),
          op, ": grid_sizes and grid_steps must hold 3 and 4 numbers for each of 1 to ", kMaxLevels,
          " levels, got ", sizes.size(), " and ", steps.size());
    for (const int64_t size : sizes)
      check(size >= 0 && size < (int64_t(1) << 31), op, ": grid_sizes must be 0 to 2^31 - 1, got ",
            size);
    check_dtype(anchors, ScalarType::Float, op, "base anchors");
    // Number the anchors and the base anchors, level by level.
    grid.levels = int(levels);
    int64_t base = 0;
    for (int l = 0; l < grid.levels; ++l) {
      const int64_t cells = sizes[3 * l] * sizes[3 * l + 1], per_cell = sizes[3 * l + 2];
      check(cells == 0 || per_cell <= (kMaxLevelAnchors - 1) / cells, op,
            ": a level of a grid must have fewer than 2^31 anchors, got more in level ", l);
      check(base + per_cell < (int64_t(1) << 31), op,
            ": a grid must have fewer than 2^31 base anchors, got ", base + per_cell,
            " up to level ", l);
      grid.height[l] = sizes[3 * l];
      grid.width[l] = sizes[3 * l + 1];
      grid.per_cell[l] = int(per_cell);
      grid.base[l] = int(base);
      grid.by_per_cell[l] = Divisor(std::max<int64_t>(per_cell, 1));
      grid.by_width[l] = Divisor(std::max<int64_t>(sizes[3 * l + 1], 1));
      base += per_cell;
      grid.first[l + 1] = grid.first[l] + cells * per_cell;
      grid.stride_y[l] = float(steps[4 * l]);
      grid.stride_x[l] = float(steps[4 * l + 1]);
      grid.offset_y[l] = float(steps[4 * l + 2]);
      grid.offset_x[l] = float(steps[4 * l + 3]);
    }
    check(anchors.dim() == 2 && anchors.size(0) == base, op, ": expected ", base,
          " base anchors, got ", shape(anchors));
    count = grid.first[grid.levels];
    batched = false;
  }

  // The anchors for a kernel. Explicit boxes must have dtype T; `op` is for the message.
  template <typename T>
  Anchors<T> view(const char* op) const {
    if (grid.levels == 0)
      check_dtype(tensor, std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float, op,
                  "anchors");
    return {tensor.const_data_ptr(), batched ? count : 0, grid};
  }
};

}  // namespace retinanet
