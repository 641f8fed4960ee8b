// Candidates of dense detection: which logits pass and how candidates rank, for both backends.
//
// A candidate is one (anchor, class) pair of one image. Candidates rank by (float32 logit
// descending, index ascending), where index = anchor * K + class, and anchors are numbered through
// all levels. A candidate's ranking key holds both the logit and the index.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/heads.h"
#include "common/ranking_key.h"

namespace retinanet {

// The lowest float32 logit whose exact sigmoid, rounded to float32, is above the threshold (rounded
// to float32). NaN if there is none, so that `logit >= limit` is false for every logit.
inline float logit_limit(double score_threshold) {
  const float threshold = float(score_threshold), inf = std::numeric_limits<float>::infinity();
  if (!(threshold < 1.f)) return std::numeric_limits<float>::quiet_NaN();
  if (threshold < 0.f) return -inf;
  // A sigmoid rounds to a float above the threshold if it is above the midpoint between the
  // threshold and the next float. It is never equal to such a midpoint. A midpoint is
  // rational, and the sigmoid of a float is irrational except at 0, where it is 1/2, a float
  // itself.
  const float next = std::nextafter(threshold, inf);
  const double middle = 0.5 * (double(threshold) + double(next));
  // Start at the midpoint's own logit, and correct its rounding.
  float limit = float(std::log(middle) - std::log1p(-middle));
  const auto passes = [&](float x) { return 1.0 / (1.0 + std::exp(-double(x))) > middle; };
  while (passes(limit)) limit = std::nextafter(limit, -inf);
  while (!passes(limit)) limit = std::nextafter(limit, inf);
  return limit;
}

// The number of output slots of each level if each may give at most `topk` candidates.
inline std::vector<int64_t> candidate_slots(const HeadTensors& heads, int64_t topk) {
  std::vector<int64_t> slots;
  for (const Tensor& t : heads.tensors)
    slots.push_back(std::min<int64_t>(topk, t.size(1) * t.size(2) * t.size(3)));
  return slots;
}

inline void check_select_candidates(const HeadTensors& heads, int64_t num_classes, int64_t topk,
                                    const char* op) {
  check(num_classes > 0, op, ": num_classes must be positive, got ", num_classes);
  check(topk > 0, op, ": topk must be positive, got ", topk);
  check(heads.elements < (int64_t(1) << 32), op,
        ": expected fewer than 2^32 logits per image, got ", heads.elements);
  for (const Tensor& t : heads.tensors)
    check(t.size(1) % num_classes == 0, op, ": cls_logits ", shape(t), " do not fit ", num_classes,
          " classes");
}

}  // namespace retinanet
