// Candidates of dense detection: from a candidate's key to its box, score and class, for both
// backends.
#pragma once

#include "box_coding.h"
#include "common/elementary.h"
#include "detect.h"

namespace retinanet {

template <typename T>
struct DecodedCandidate {
  Box<T> box;
  float score;  // -inf for an empty slot
  int64_t label, anchor;
};

// Decodes one key in compute dtype T, from box deltas of dtype Delta.
template <typename T, typename Delta>
struct CandidateDecoder {
  HeadLevels<Delta> deltas;
  Anchors<T> anchors;
  BoxCoder<T> coder;
  const T* image_sizes;  // [N, 2] height, width; null: boxes are not clipped
  int64_t num_classes, num_anchors;

  HOST_DEVICE DecodedCandidate<T> operator()(int64_t image, int64_t key) const {
    const int64_t index = key_index(key), anchor = index / num_classes;
    // In a direct call of the op a key may hold any number, so an anchor out of range is no
    // candidate.
    if (key == kNoKey || anchor >= num_anchors)
      return {{0, 0, 0, 0}, -std::numeric_limits<float>::infinity(), -1, -1};
    return {box(image, anchor), sigmoid(key_value(key)), index - anchor * num_classes, anchor};
  }

  // The decoded box of an anchor, clipped if there are image sizes.
  HOST_DEVICE Box<T> box(int64_t image, int64_t anchor) const {
    // Find the anchor's first delta in its level, and read the four.
    const HeadLevel<Delta>& level = deltas.level[deltas.level_of(4 * anchor)];
    const int64_t element = 4 * anchor - level.first, cell = element / level.channels,
                  channel = element - cell * level.channels;
    const Box<T> delta = {T(level.at(image, cell, channel)), T(level.at(image, cell, channel + 1)),
                          T(level.at(image, cell, channel + 2)),
                          T(level.at(image, cell, channel + 3))};
    const Box<T> decoded = coder.decode(delta, anchors(image, anchor));
    return image_sizes ? clip(decoded, image_sizes[2 * image], image_sizes[2 * image + 1])
                       : decoded;
  }
};

// What decode_candidates returns: boxes [N, S, 4], scores, labels and anchor_index [N, S].
using DecodeResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The results as pointers, with boxes in compute dtype T.
template <typename T>
struct DecodeOutputs {
  Box<T>* boxes;
  float* scores;
  int64_t* labels;
  int64_t* anchor_index;

  HOST_DEVICE void write(int64_t i, const DecodedCandidate<T>& candidate) const {
    boxes[i] = candidate.box;
    scores[i] = candidate.score;
    labels[i] = candidate.label;
    anchor_index[i] = candidate.anchor;
  }
};

// The arguments from which boxes are decoded, checked once for both backends and all ops that
// decode.
struct DecodeArguments {
  const char* op;
  HeadTensors deltas;
  AnchorArgument anchors;
  std::optional<Tensor> image_sizes;
  int64_t images, num_classes;
  // Dtype of the boxes: the dtype of explicit anchors, which the caller has converted to the
  // compute dtype of anchors and deltas. With a grid, it is the compute dtype of the deltas.
  ScalarType box_dtype;

  DecodeArguments(const std::vector<Tensor>& box_deltas, const Tensor& anchors,
                  const std::vector<int64_t>& grid_sizes, const std::vector<double>& grid_steps,
                  const std::optional<Tensor>& image_sizes, int64_t num_classes, const char* op)
      : op(op),
        deltas(box_deltas, op, "box_deltas"),
        anchors(anchors, grid_sizes, grid_steps, op),
        image_sizes(contiguous_aligned(image_sizes)),
        images(deltas.images),
        num_classes(num_classes),
        box_dtype(this->anchors.grid.levels == 0 ? anchors.scalar_type() : deltas.compute_dtype()) {
    check(num_classes > 0, op, ": num_classes must be positive, got ", num_classes);
    for (const Tensor& t : deltas.tensors)
      check(t.size(1) % 4 == 0, op, ": box_deltas ", shape(t), " must have 4 channels per anchor");
    check(this->anchors.count * 4 == deltas.elements, op, ": expected ", this->anchors.count * 4,
          " deltas per image, got ", deltas.elements);
    check(!this->anchors.batched || anchors.size(0) == images, op, ": anchors ", shape(anchors),
          " do not fit ", images, " images");
    if (image_sizes) check_image_sizes(*image_sizes, images, box_dtype, op);
  }

  // The keys [N, S] of decode_candidates, checked.
  Tensor checked_keys(const Tensor& keys) const {
    check(keys.dim() == 2 && keys.size(0) == images, op, ": keys ", shape(keys), " do not fit ",
          images, " images");
    check_dtype(keys, ScalarType::Long, op, "keys");
    return contiguous_aligned(keys);
  }

  // Uninitialised results of decode_candidates.
  DecodeResults empty_results(const Tensor& keys) const {
    return {torch::stable::new_empty(keys, {images, keys.size(1), 4}, box_dtype),
            torch::stable::new_empty(keys, {images, keys.size(1)}, ScalarType::Float),
            torch::stable::empty_like(keys), torch::stable::empty_like(keys)};
  }

  template <typename T>
  DecodeOutputs<T> outputs(DecodeResults& results) const {
    auto& [boxes, scores, labels, anchor_index] = results;
    return {data<Box<T>>(boxes), data<float>(scores), data<int64_t>(labels),
            data<int64_t>(anchor_index)};
  }

  template <typename T, typename Delta>
  CandidateDecoder<T, Delta> decoder(const BoxCoder<T>& coder) const {
    return {deltas.view<Delta>(), anchors.view<T>(op), coder,
            data<T>(image_sizes), num_classes,         anchors.count};
  }
};

}  // namespace retinanet
