// The outputs of a detector's heads as they are: one tensor [N, channels, H, W] per level of the
// feature pyramid, contiguous or channels_last. Ops read them without a permute or a concatenation.
#pragma once

#include "checks.h"

namespace retinanet {

// One level of the outputs. Its elements have two orders: the order in memory, and the anchor order
// (cell, channel), in which the logits or deltas of an anchor are consecutive.
template <typename T>
struct HeadLevel {
  const T* data;
  int64_t channels, area;  // area = H * W cells
  int64_t first;           // elements of the levels before this one, in one image
  bool channels_last;

  // Elements of one image.
  HOST_DEVICE int64_t size() const { return channels * area; }

  // The index in anchor order of the element at `offset` in the memory of its image.
  HOST_DEVICE int64_t anchor_order_of_offset(int64_t offset) const {
    if (channels_last) return offset;
    const int64_t channel = offset / area;
    return (offset - channel * area) * channels + channel;
  }

  // The element of an image at a given cell and channel.
  HOST_DEVICE T at(int64_t image, int64_t cell, int64_t channel) const {
    return data[image * size() +
                (channels_last ? cell * channels + channel : channel * area + cell)];
  }
};

// All levels of the outputs.
template <typename T>
struct HeadLevels {
  int count = 0;
  HeadLevel<T> level[kMaxLevels];

  // The level of an element, given its index in anchor order among all levels of an image.
  HOST_DEVICE int level_of(int64_t element) const {
    int l = 0;
    while (l + 1 < count && element >= level[l + 1].first) ++l;
    return l;
  }
};

// Pointers to the result tensors, one per level, each in the layout of its level.
template <typename T>
struct LevelOutputs {
  T* data[kMaxLevels] = {nullptr};
};

// The tensors of a schema's Tensor[] argument, checked, and copied where their layout is neither
// contiguous nor channels_last.
struct HeadTensors {
  std::vector<Tensor> tensors;
  int64_t images = 0, elements = 0;  // elements of one image, over all levels

  // `name` is the argument's name, for messages.
  HeadTensors(const std::vector<Tensor>& levels, const char* op, const char* name) {
    check(!levels.empty() && levels.size() <= size_t(kMaxLevels), op, ": expected 1 to ",
          kMaxLevels, " levels of ", name, ", got ", levels.size());
    for (const Tensor& t : levels) {
      check(t.dim() == 4, op, ": ", name, " must have shape [N, channels, H, W], got ", shape(t));
      check(t.size(0) == levels[0].size(0) && t.scalar_type() == levels[0].scalar_type(), op,
            ": all levels of ", name, " must agree in batch size and dtype");
      // New tensors, such as the results, are aligned. Align the inputs too, so that an offset is
      // aligned in both or in neither.
      tensors.push_back(is_channels_last(t) ? aligned(t) : contiguous_aligned(t));
      elements += t.size(1) * t.size(2) * t.size(3);
    }
    images = levels[0].size(0);
  }

  // True if a tensor is channels_last and not contiguous as well.
  static bool is_channels_last(const Tensor& t) {
    const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
    return !t.is_contiguous() && t.stride(1) == 1 && t.stride(3) == c && t.stride(2) == w * c &&
           t.stride(0) == h * w * c;
  }

  ScalarType dtype() const { return tensors[0].scalar_type(); }
  // The dtype of the per-image losses and of the tensors that accompany them (grad, weights,
  // gt_boxes): float64 for float64 heads, else float32.
  ScalarType compute_dtype() const {
    return dtype() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  // Uninitialised results, one per level, each in the layout of its level.
  std::vector<Tensor> empty_like() const {
    std::vector<Tensor> result;
    for (const Tensor& t : tensors) result.push_back(empty_tensor_like(t));
    return result;
  }

  // Checks the gradient of the per-image losses.
  void check_grad(const Tensor& grad, const char* op) const {
    check_shape(grad, {images}, op, "grad");
    check_dtype(grad, compute_dtype(), op, "grad");
  }

  // The levels for a kernel. `tensors` must have dtype T.
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
