// NMS of the candidates of one image on the CPU.
#pragma once

#include <algorithm>
#include <unordered_map>

#include "nms_cpu_kept.h"

namespace retinanet {

// Writes the indices of the kept candidates and returns their number. Sets `truncated` to whether a
// cap dropped a candidate that no kept box suppresses.
template <typename T>
ALWAYS_INLINE inline int64_t nms_image(const NmsRules<T>& rules, const Box<T>* boxes,
                                       const int64_t* order, const int64_t* labels,
                                       int64_t candidates, int64_t count, int64_t* index,
                                       bool* truncated) {
  KeptBoxes<T> kept(rules, std::min(count, rules.max_detections));
  std::unordered_map<int64_t, int64_t> kept_of_class;
  int64_t size = 0;
  *truncated = false;
  for (int64_t c = 0; c < count; ++c) {
    const int64_t i = order ? order[c] : c;
    if (i < 0 || i >= candidates) continue;
    // Boxes with the same `rival_label` suppress each other.
    const int64_t label = labels ? labels[i] : 0, rival_label = rules.class_agnostic ? 0 : label;
    if (kept.suppress(boxes[i], rival_label)) continue;
    if (rules.max_per_class > 0 && kept_of_class[label] >= rules.max_per_class) {
      *truncated = true;
      continue;
    }
    if (size == rules.max_detections) {
      *truncated = true;
      break;
    }
    if (rules.max_per_class > 0) ++kept_of_class[label];
    kept.keep(boxes[i], rival_label);
    index[size++] = i;
  }
  return size;
}

}  // namespace retinanet
