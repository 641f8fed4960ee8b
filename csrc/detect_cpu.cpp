// Dense detection on the CPU: one pass over the logits in memory order, in blocks that threads
// share; each thread keeps the best of its blocks of an (image, level), of which the best remain.
// Whoever has found more than topk candidates of a level raises the limit for all that follows
// there: nothing below can be among the best.  Keys are unique, so the result depends neither on
// the blocks nor on who raised the limit when.
#include <algorithm>
#include <atomic>
#include <functional>

#include "common/half.h"
#include "detect.h"

namespace retinanet {
namespace {

constexpr int64_t kBlock = 1 << 16;  // logits
constexpr int64_t kRun = 64;         // logits that one test may pass over

// The least logit that may still be among the best of a level, and whether more than topk passed.
struct Limit {
  std::atomic<float> logit;
  std::atomic<bool> exceeded{false};

  void raise(float to) {
    float now = logit.load(std::memory_order_relaxed);
    while (now < to && !logit.compare_exchange_weak(now, to, std::memory_order_relaxed)) {
    }
  }
};

// Leaves the topk best.
void keep_best(std::vector<int64_t>& keys, int64_t topk, Limit& limit) {
  if (int64_t(keys.size()) <= topk) return;
  std::nth_element(keys.begin(), keys.begin() + (topk - 1), keys.end(), std::greater<>());
  keys.resize(topk);
  limit.exceeded = true;
  limit.raise(key_value(keys.back()));
}

template <typename T>
ALWAYS_INLINE inline void select_block(const HeadLevel<T>& level, const T* x, int64_t begin,
                                       int64_t end, int64_t topk, Limit& limit,
                                       std::vector<int64_t>& keys) {
  float least = limit.logit.load(std::memory_order_relaxed);
  for (int64_t first = begin; first < end; first += kRun) {
    const int count = int(std::min(kRun, end - first));
    int passing = 0;
    for (int j = 0; j < count; ++j) passing += float(widen(x[first + j])) >= least;
    if (passing == 0) continue;
    for (int j = 0; j < count; ++j) {
      const float logit = float(widen(x[first + j]));
      if (logit >= least)
        keys.push_back(
            ranking_key(logit, uint32_t(level.first + level.anchor_order_of_offset(first + j))));
    }
    // Pruning at twice the size keeps the memory bounded and the cost per candidate constant.
    if (int64_t(keys.size()) < 2 * topk) continue;
    keep_best(keys, topk, limit);
    least = limit.logit.load(std::memory_order_relaxed);
  }
}

std::tuple<Tensor, Tensor> select_candidates_cpu(std::vector<Tensor> cls_logits,
                                                 int64_t num_classes, double score_threshold,
                                                 int64_t topk) {
  const HeadTensors heads(cls_logits, "select_candidates", "cls_logits");
  check_select_candidates(heads, num_classes, topk);
  const std::vector<int64_t> slots = candidate_slots(heads, topk);
  int64_t width = 0;
  for (const int64_t s : slots) width += s;
  Tensor keys = torch::stable::new_empty(cls_logits[0], {heads.images, width}, ScalarType::Long);
  Tensor truncated = torch::stable::new_empty(cls_logits[0], {heads.images, int64_t(slots.size())},
                                              ScalarType::Bool);
  dispatch_floating(cls_logits[0].scalar_type(), "select_candidates", [&](auto zero) {
    using T = decltype(zero);
    const HeadLevels<T> levels = heads.view<T>();
    struct Work {
      int level;
      int64_t begin, end;
    };
    std::vector<Work> work;
    for (int l = 0; l < levels.count; ++l)
      for (int64_t begin = 0; begin < levels.level[l].size(); begin += kBlock)
        work.push_back({l, begin, std::min(levels.level[l].size(), begin + kBlock)});
    const int64_t per_image = int64_t(work.size());
    std::vector<std::vector<int64_t>> found(heads.images * per_image);
    std::vector<Limit> limits(heads.images * levels.count);
    for (Limit& limit : limits) limit.logit = logit_limit(score_threshold);
    torch::stable::parallel_for(0, heads.images * per_image, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const Work w = work[b % per_image];
        const int64_t image = b / per_image;
        const HeadLevel<T>& level = levels.level[w.level];
        const T* x = level.data + image * level.size();
        vectorised([&, x](auto) ALWAYS_INLINE {
          select_block(level, x, w.begin, w.end, std::min(topk, level.size()),
                       limits[image * levels.count + w.level], found[b]);
        });
        // The level's next block goes on from here.
        const int64_t next = b + 1;
        if (next < last && next % per_image != 0 && work[next % per_image].level == w.level)
          found[next].swap(found[b]);
      }
    });
    for (int64_t n = 0; n < heads.images; ++n) {
      int64_t* row = data<int64_t>(keys) + n * width;
      int64_t b = n * per_image;
      for (int l = 0; l < levels.count; ++l) {
        Limit& limit = limits[n * levels.count + l];
        std::vector<int64_t> best;
        for (; b < (n + 1) * per_image && work[b % per_image].level == l; ++b)
          for (const int64_t key : found[b])
            if (key_value(key) >= limit.logit) best.push_back(key);
        keep_best(best, topk, limit);
        data<bool>(truncated)[n * levels.count + l] = limit.exceeded;
        std::fill(std::copy(best.begin(), best.end(), row), row + slots[l], kNoKey);
        row += slots[l];
      }
    }
  });
  return {sorted(keys), truncated};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> decode_candidates_cpu(
    const Tensor& keys, std::vector<Tensor> box_deltas, const Tensor& anchors,
    std::vector<int64_t> grid_sizes, std::vector<double> grid_steps, const Tensor& image_sizes,
    int64_t num_classes, std::vector<double> weights, double min_log_ratio, double max_log_ratio,
    double offset) {
  const HeadTensors heads(box_deltas, "decode_candidates", "box_deltas");
  const AnchorArgument argument(anchors, grid_sizes, grid_steps, "decode_candidates");
  check_decode_candidates(keys, heads, argument, num_classes);
  check_image_sizes(image_sizes, heads.images, image_sizes.scalar_type(), "decode_candidates");
  const Tensor packed_keys = contiguous_aligned(keys), sizes = contiguous_aligned(image_sizes);
  const int64_t images = keys.size(0), slots = keys.size(1);
  Tensor boxes = torch::stable::new_empty(keys, {images, slots, 4}, image_sizes.scalar_type());
  Tensor scores = torch::stable::new_empty(keys, {images, slots}, ScalarType::Float);
  Tensor labels = torch::stable::empty_like(packed_keys),
         anchor_index = torch::stable::empty_like(packed_keys);
  dispatch_floating(box_deltas[0].scalar_type(), "decode_candidates", [&](auto zero) {
    using Delta = decltype(zero);
    dispatch_compute(image_sizes.scalar_type(), "decode_candidates", [&](auto compute_zero) {
      using T = decltype(compute_zero);
      const CandidateDecoder<T, Delta> decode{
          heads.view<Delta>(),
          argument.view<T>("decode_candidates"),
          box_coder<T>(weights, min_log_ratio, max_log_ratio, offset, "decode_candidates"),
          data<T>(sizes),
          num_classes,
          argument.count};
      for (int64_t i = 0; i < images * slots; ++i) {
        const Candidate<T> c = decode(i / slots, data<int64_t>(packed_keys)[i]);
        data<Box<T>>(boxes)[i] = c.box;
        data<float>(scores)[i] = c.score;
        data<int64_t>(labels)[i] = c.label;
        data<int64_t>(anchor_index)[i] = c.anchor;
      }
    });
  });
  return {boxes, scores, labels, anchor_index};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("select_candidates", TORCH_BOX(&select_candidates_cpu));
  m.impl("decode_candidates", TORCH_BOX(&decode_candidates_cpu));
}

}  // namespace retinanet
