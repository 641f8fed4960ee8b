// Candidates of dense detection: which logits pass, how they rank, and where they come from; for
// both backends.
//
// A candidate is one (anchor, class) pair of one image.  Candidates rank by (float32 logit
// descending, index ascending), where index = anchor * K + class counts through all levels, as
// their keys do.
#pragma once

#include <array>

#include "box_coding.h"
#include "common/elementary.h"
#include "common/heads.h"
#include "common/ranking_key.h"

namespace retinanet {

constexpr int64_t kNoKey = std::numeric_limits<int64_t>::min();  // below every candidate's key

// The least float32 logit whose exact sigmoid, rounded to float32, is above the threshold (rounded
// to float32); NaN, with which no comparison holds, if there is none.
inline float logit_limit(double score_threshold) {
  const float threshold = float(score_threshold), inf = std::numeric_limits<float>::infinity();
  if (!(threshold < 1.f)) return std::numeric_limits<float>::quiet_NaN();
  if (threshold < 0.f) return -inf;
  // sigmoid(x) rounds to a float above the threshold from the midpoint of the two floats on.  No
  // float's sigmoid lies on a midpoint but that of 0, and 1/2 is a float itself.
  const float next = std::nextafter(threshold, inf);
  const double middle = 0.5 * (double(threshold) + double(next));
  float limit = float(std::log(middle) - std::log1p(-middle));
  const auto passes = [&](float x) { return 1.0 / (1.0 + std::exp(-double(x))) > middle; };
  while (passes(limit)) limit = std::nextafter(limit, -inf);
  while (!passes(limit)) limit = std::nextafter(limit, inf);
  return limit;
}

// Slots of each level's candidates when every level may give at most `topk`.
inline std::vector<int64_t> candidate_slots(const HeadTensors& heads, int64_t topk) {
  std::vector<int64_t> result;
  for (const Tensor& t : heads.tensors)
    result.push_back(std::min<int64_t>(topk, t.size(1) * t.size(2) * t.size(3)));
  return result;
}

inline void check_select_candidates(const HeadTensors& heads, int64_t num_classes, int64_t topk) {
  check(num_classes > 0, "select_candidates: num_classes must be positive, got ", num_classes);
  check(topk > 0, "select_candidates: topk must be positive, got ", topk);
  check(heads.elements < (int64_t(1) << 32),
        "select_candidates: expected fewer than 2^32 logits per image, got ", heads.elements);
  for (const Tensor& t : heads.tensors)
    check(t.size(1) % num_classes == 0, "select_candidates: cls_logits ", shape(t), " do not fit ",
          num_classes, " classes");
}

// The keys of each image, best first.  Keys are unique but for kNoKey, so the result does not
// depend on the order in which the kernels found them.
inline Tensor sorted(const Tensor& keys) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(keys),
                                    torch::stable::detail::from(int64_t(1)),
                                    torch::stable::detail::from(true)};  // dim, descending
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[1]);  // takes ownership of the indices, to release them
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// What a candidate's key decodes to.
template <typename T>
struct Candidate {
  Box<T> box;
  float score;  // -inf for an empty slot
  int64_t label, anchor;
};

template <typename T, typename Delta>
struct CandidateDecoder {
  HeadLevels<Delta> deltas;
  Anchors<T> anchors;
  BoxCoder<T> coder;
  const T* image_sizes;  // [N, 2] height, width; null: boxes are not clipped
  int64_t num_classes, num_anchors;

  HOST_DEVICE Candidate<T> operator()(int64_t image, int64_t key) const {
    const int64_t index = key_index(key), anchor = index / num_classes;
    // An anchor out of range is no candidate: a caller's key may hold any number.
    if (key == kNoKey || anchor >= num_anchors)
      return {{0, 0, 0, 0}, -std::numeric_limits<float>::infinity(), -1, -1};
    const HeadLevel<Delta>& level = deltas.level[deltas.level_of(4 * anchor)];
    const int64_t element = 4 * anchor - level.first, cell = element / level.channels,
                  channel = element - cell * level.channels;
    const Box<T> delta = {T(level.at(image, cell, channel)), T(level.at(image, cell, channel + 1)),
                          T(level.at(image, cell, channel + 2)),
                          T(level.at(image, cell, channel + 3))};
    const Box<T> box = coder.decode(delta, anchors(image, anchor));
    return {image_sizes ? clip(box, image_sizes[2 * image], image_sizes[2 * image + 1]) : box,
            sigmoid(key_value(key)), index - anchor * num_classes, anchor};
  }
};

// The dtype of the decoded boxes: that of explicit anchors, which the wrapper has converted; with a
// grid, the compute dtype of the deltas.
inline ScalarType candidate_dtype(const HeadTensors& deltas, const AnchorArgument& anchors) {
  if (anchors.grid.levels == 0) return anchors.tensor.scalar_type();
  return deltas.tensors[0].scalar_type() == ScalarType::Double ? ScalarType::Double
                                                               : ScalarType::Float;
}

inline void check_decode_candidates(const Tensor& keys, const HeadTensors& deltas,
                                    const AnchorArgument& anchors, int64_t num_classes) {
  check(num_classes > 0, "decode_candidates: num_classes must be positive, got ", num_classes);
  for (const Tensor& t : deltas.tensors)
    check(t.size(1) % 4 == 0, "decode_candidates: box_deltas ", shape(t),
          " must have 4 channels per anchor");
  check(keys.dim() == 2 && keys.size(0) == deltas.images, "decode_candidates: keys ", shape(keys),
        " do not fit ", deltas.images, " images");
  check_dtype(keys, ScalarType::Long, "decode_candidates", "keys");
  check(anchors.count * 4 == deltas.elements, "decode_candidates: expected ", anchors.count * 4,
        " deltas per image, got ", deltas.elements);
  check(!anchors.batched || anchors.tensor.size(0) == deltas.images, "decode_candidates: anchors ",
        shape(anchors.tensor), " do not fit ", deltas.images, " images");
}

}  // namespace retinanet
