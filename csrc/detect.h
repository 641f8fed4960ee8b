// Candidates of dense detection: which logits pass, how they rank, and where they come from; for
// both backends.
//
// A candidate is one (anchor, class) pair of one image.  Candidates rank by (float32 logit
// descending, index ascending), where index = anchor * K + class counts through all levels.  A key
// holds both, so that a larger key ranks higher and no two keys are equal: the logit's bits in the
// upper half, mapped to order like integers, and ~index in the lower.
#pragma once

#include <array>
#include <cstring>

#include "box_coding.h"
#include "heads.h"

namespace retinanet {

constexpr int64_t kNoKey = std::numeric_limits<int64_t>::min();  // below every candidate's key

HOST_DEVICE int32_t float_bits(float v) {
#ifdef __CUDA_ARCH__
  return __float_as_int(v);
#else
  int32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
#endif
}

HOST_DEVICE float bits_float(int32_t bits) {
#ifdef __CUDA_ARCH__
  return __int_as_float(bits);
#else
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
#endif
}

// Its own inverse: maps float bits to integers of the same order, and back.
HOST_DEVICE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

HOST_DEVICE int64_t candidate_key(float logit, uint32_t index) {
  const int32_t rank = ordered(float_bits(logit + 0.0f));  // + 0 turns -0 into 0: they tie
  return int64_t((uint64_t(uint32_t(rank)) << 32) | uint32_t(~index));
}

HOST_DEVICE float key_logit(int64_t key) { return bits_float(ordered(int32_t(key >> 32))); }
HOST_DEVICE uint32_t key_index(int64_t key) { return ~uint32_t(key); }

HOST_DEVICE float sigmoid(float x) {
  const float e = std::exp(-std::abs(x));
  return x < 0 ? e / (1 + e) : 1 / (1 + e);
}

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
inline std::vector<int64_t> candidate_slots(const HeadArgument& heads, int64_t topk) {
  std::vector<int64_t> result;
  for (const Tensor& t : heads.tensors)
    result.push_back(std::min<int64_t>(topk, t.size(1) * t.size(2) * t.size(3)));
  return result;
}

inline void check_select_candidates(const HeadArgument& heads, int64_t num_classes, int64_t topk) {
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
  const T* image_sizes;  // [N, 2] height, width
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
    return {clip(box, image_sizes[2 * image], image_sizes[2 * image + 1]), sigmoid(key_logit(key)),
            index - anchor * num_classes, anchor};
  }
};

inline void check_decode_candidates(const Tensor& keys, const HeadArgument& deltas,
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
