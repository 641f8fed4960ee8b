// The whole of dense detection: the arguments of `detect`, and the slots that hold an image's
// detections, for both backends.
#pragma once

#include "detect_decode.h"
#include "nms.h"

namespace retinanet {

// What `detect` returns: boxes [N, D, 4], scores and labels [N, D], count [N], anchor_index [N, D]
// and truncated [N].
using DetectResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The results as pointers, with boxes in compute dtype T.
template <typename T>
struct DetectionSlots {
  Box<T>* boxes;
  float* scores;
  int64_t* labels;
  int64_t* count;
  int64_t* anchor_index;
  bool* truncated;
  const T*
      image_sizes;  // [N, 2] height, width, to which kept boxes are clipped; null: they are not
  int64_t slots, num_classes;  // slots of an image

  // Writes a detection of an image: the candidate with this key and this decoded box.
  HOST_DEVICE void write(int64_t image, int64_t slot, const Box<T>& box, int64_t key) const {
    const int64_t index = key_index(key), anchor = index / num_classes;
    set(image, slot, box, sigmoid(key_value(key)), index - anchor * num_classes, anchor);
  }

  // Marks a slot as unused.
  HOST_DEVICE void clear(int64_t image, int64_t slot) const {
    set(image, slot, {0, 0, 0, 0}, 0, -1, -1);
  }

 private:
  HOST_DEVICE void set(int64_t image, int64_t slot, const Box<T>& box, float score, int64_t label,
                       int64_t anchor) const {
    const int64_t i = image * slots + slot;
    boxes[i] = image_sizes ? clip(box, image_sizes[2 * image], image_sizes[2 * image + 1]) : box;
    scores[i] = score;
    labels[i] = label;
    anchor_index[i] = anchor;
  }
};

// The number of classes: the logits of an anchor, of which a cell has a quarter of its deltas.
inline int64_t classes_of(const std::vector<Tensor>& cls_logits,
                          const std::vector<Tensor>& box_deltas) {
  check(!cls_logits.empty() && cls_logits.size() == box_deltas.size(),
        "detect: expected as many levels of box_deltas as of cls_logits, ", cls_logits.size(),
        ", got ", box_deltas.size());
  int64_t num_classes = 0;
  for (size_t l = 0; l < cls_logits.size(); ++l) {
    const Tensor &logits = cls_logits[l], &deltas = box_deltas[l];
    bool fits = logits.dim() == 4 && deltas.dim() == 4;
    for (const int d : {0, 2, 3}) fits = fits && logits.size(d) == deltas.size(d);
    const int64_t anchors = fits ? deltas.size(1) / 4 : 0;
    fits = fits && anchors > 0 && deltas.size(1) % 4 == 0 && logits.size(1) % anchors == 0;
    if (l == 0 && fits) num_classes = logits.size(1) / anchors;
    check(fits && num_classes > 0 && logits.size(1) == anchors * num_classes, "detect: box_deltas[",
          l, "] ", shape(deltas), " do not fit cls_logits[", l, "] ", shape(logits));
  }
  return num_classes;
}

// The op's arguments, checked once for both backends.
struct DetectArguments {
  int64_t num_classes, topk, max_detections;
  HeadTensors logits;
  DecodeArguments decode;
  std::optional<Tensor> kept_sizes;  // to which kept boxes are clipped; none: they are not

  DetectArguments(const std::vector<Tensor>& cls_logits, const std::vector<Tensor>& box_deltas,
                  const Tensor& anchors, const std::vector<int64_t>& grid_sizes,
                  const std::vector<double>& grid_steps, const Tensor& image_sizes, int64_t topk,
                  int64_t max_detections, bool clip_after_nms)
      : num_classes(classes_of(cls_logits, box_deltas)),
        topk(topk),
        max_detections(max_detections),
        logits(cls_logits, kOp, "cls_logits"),
        decode(box_deltas, boxes_in(compute_dtype(box_deltas, anchors), anchors, grid_sizes),
               grid_sizes, grid_steps, sizes_in(compute_dtype(box_deltas, anchors), image_sizes),
               num_classes, kOp) {
    check_select_candidates(logits, num_classes, topk, kOp);
    check(max_detections >= 0, kOp, ": max_detections must not be negative, got ", max_detections);
    if (clip_after_nms) kept_sizes.swap(decode.image_sizes);
  }

  DetectResults empty_results() const {
    const Tensor& like = logits.tensors[0];
    const int64_t images[] = {logits.images, max_detections, 4};
    return {empty(like, images, 3, decode.box_dtype), empty(like, images, 2, ScalarType::Float),
            empty(like, images, 2, ScalarType::Long), empty(like, images, 1, ScalarType::Long),
            empty(like, images, 2, ScalarType::Long), empty(like, images, 1, ScalarType::Bool)};
  }

  template <typename T>
  DetectionSlots<T> slots(DetectResults& results) const {
    auto& [boxes, scores, labels, count, anchor_index, truncated] = results;
    return {data<Box<T>>(boxes),
            data<float>(scores),
            data<int64_t>(labels),
            data<int64_t>(count),
            data<int64_t>(anchor_index),
            data<bool>(truncated),
            data<T>(kept_sizes),
            max_detections,
            num_classes};
  }

 private:
  static constexpr const char* kOp = "detect";

  // The dtype of the boxes: float64 if the deltas or the explicit anchors are, else float32.
  static ScalarType compute_dtype(const std::vector<Tensor>& box_deltas, const Tensor& anchors) {
    const bool wide = box_deltas[0].scalar_type() == ScalarType::Double ||
                      anchors.scalar_type() == ScalarType::Double;
    return wide ? ScalarType::Double : ScalarType::Float;
  }

  // The anchors in a dtype. Base anchors of a grid stay as they are.
  static Tensor boxes_in(ScalarType dtype, const Tensor& anchors,
                         const std::vector<int64_t>& grid_sizes) {
    if (!grid_sizes.empty() || anchors.scalar_type() == dtype) return anchors;
    dispatch_floating(anchors.scalar_type(), kOp, [](auto) {});
    return torch::stable::to(anchors, dtype);
  }

  static Tensor sizes_in(ScalarType dtype, const Tensor& image_sizes) {
    const ScalarType given = image_sizes.scalar_type();
    if (given == dtype) return image_sizes;
    for (const ScalarType refused : {ScalarType::Bool, ScalarType::ComplexHalf,
                                     ScalarType::ComplexFloat, ScalarType::ComplexDouble})
      check(given != refused, kOp, ": image_sizes must be integers or floating-point numbers, got ",
            torch::headeronly::toString(given));
    return torch::stable::to(image_sizes, dtype);
  }
};

}  // namespace retinanet
