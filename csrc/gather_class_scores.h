// The scores of all classes of selected anchors: the score of one class and the argument checks,
// for both backends.
#pragma once

#include "common/elementary.h"
#include "common/heads.h"

namespace retinanet {

// Reads the score of one class of one anchor from the heads' own tensors. The score is 0 if the
// anchor is out of range, as the anchor -1 of an unused detection slot is.
template <typename T>
struct ClassScores {
  HeadLevels<T> levels;
  int64_t num_classes, num_anchors;

  HOST_DEVICE float operator()(int64_t image, int64_t anchor, int64_t label) const {
    if (anchor < 0 || anchor >= num_anchors) return 0;
    // `index` is the anchor's first logit in anchor order, which gives its level, cell and channel.
    const int64_t index = anchor * num_classes;
    const HeadLevel<T>& level = levels.level[levels.level_of(index)];
    const int64_t element = index - level.first, cell = element / level.channels;
    return sigmoid(float(level.at(image, cell, element - cell * level.channels + label)));
  }
};

inline void check_class_scores(const HeadTensors& heads, const Tensor& anchor_index,
                               int64_t num_classes) {
  check(num_classes > 0, "gather_class_scores: num_classes must be positive, got ", num_classes);
  for (const Tensor& t : heads.tensors)
    check(t.size(1) % num_classes == 0, "gather_class_scores: cls_logits ", shape(t),
          " do not fit ", num_classes, " classes");
  check(anchor_index.dim() == 2 && anchor_index.size(0) == heads.images,
        "gather_class_scores: anchor_index ", shape(anchor_index), " does not fit ", heads.images,
        " images");
  check_dtype(anchor_index, ScalarType::Long, "gather_class_scores", "anchor_index");
}

}  // namespace retinanet
