// The heads' own outputs, a tensor [N, channels, H, W] for each level, contiguous or channels_last.
#pragma once

#include "checks.h"

namespace retinanet {

// One level of the heads' outputs: [N, channels, H, W], contiguous or channels_last.
template <typename T>
struct HeadLevel {
  const T* data;
  int64_t channels, area;  // area = H * W
  int64_t first;  // index of the level's first element among all (anchor, entry) pairs of an image
  bool channels_last;

  HOST_DEVICE int64_t size() const { return channels * area; }

  // Position in memory, within its image, to (cell, channel) order: the order of anchors and
  // classes.
  HOST_DEVICE int64_t anchor_order_of_offset(int64_t offset) const {
    if (channels_last) return offset;
    const int64_t channel = offset / area;
    return (offset - channel * area) * channels + channel;
  }

  HOST_DEVICE T at(int64_t image, int64_t cell, int64_t channel) const {
    return data[image * size() +
                (channels_last ? cell * channels + channel : channel * area + cell)];
  }
};

template <typename T>
struct HeadLevels {
  int count = 0;
  HeadLevel<T> level[kMaxLevels];

  HOST_DEVICE int level_of(int64_t element) const {
    int l = 0;
    while (l + 1 < count && element >= level[l + 1].first) ++l;
    return l;
  }
};

// Where each level's results go, in the level's layout.
template <typename T>
struct LevelOutputs {
  T* data[kMaxLevels] = {nullptr};
};

// The heads' tensors, checked and in a layout that HeadLevel can describe.
struct HeadTensors {
  std::vector<Tensor> tensors;
  int64_t images = 0, elements = 0;  // elements of one image over all levels

  HeadTensors(const std::vector<Tensor>& levels, const char* op, const char* name) {
    check(!levels.empty() && levels.size() <= size_t(kMaxLevels), op, ": expected 1 to ",
          kMaxLevels, " levels of ", name, ", got ", levels.size());
    for (const Tensor& t : levels) {
      check(t.dim() == 4, op, ": ", name, " must have shape [N, channels, H, W], got ", shape(t));
      check(t.size(0) == levels[0].size(0) && t.scalar_type() == levels[0].scalar_type(), op,
            ": all levels of ", name, " must agree in batch size and dtype");
      // Aligned as the results are, so that an offset is aligned in both or in neither.
      tensors.push_back(is_channels_last(t) ? aligned(t) : contiguous_aligned(t));
      elements += t.size(1) * t.size(2) * t.size(3);
    }
    images = levels[0].size(0);
  }

  static bool is_channels_last(const Tensor& t) {
    const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
    return !t.is_contiguous() && t.stride(1) == 1 && t.stride(3) == c && t.stride(2) == w * c &&
           t.stride(0) == h * w * c;
  }

  ScalarType dtype() const { return tensors[0].scalar_type(); }
  // Of results with one number for each image, and what goes with them.
  ScalarType compute_dtype() const {
    return dtype() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  // One tensor for each level, of its layout.
  std::vector<Tensor> empty_like() const {
    std::vector<Tensor> result;
    for (const Tensor& t : tensors) result.push_back(torch::stable::empty_like(t));
    return result;
  }

  // The gradient of one number for each image.
  void check_grad(const Tensor& grad, const char* op) const {
    check_shape(grad, {images}, op, "grad");
    check_dtype(grad, compute_dtype(), op, "grad");
  }

  template <typename T>
  HeadLevels<T> view() const {
    HeadLevels<T> levels;
    int64_t first = 0;
    for (const Tensor& t : tensors) {
      const int64_t area = t.size(2) * t.size(3);
      levels.level[levels.count++] = {data<T>(t), t.size(1), area, first, is_channels_last(t)};
      first += t.size(1) * area;
    }
    return levels;
  }
};

}  // namespace retinanet
