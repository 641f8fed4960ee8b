// Dense detection on the CPU: one pass over the logits in memory order, in blocks that threads
// share; each block keeps at most its topk best, then each (image, level) the best of its blocks.
// Keys are unique, so the result does not depend on the blocks.
#include <algorithm>
#include <functional>

#include "detect.h"

namespace retinanet {
namespace {

constexpr int64_t kBlock = 1 << 18;  // logits

void keep_best(std::vector<int64_t>& keys, int64_t topk) {
  if (int64_t(keys.size()) <= topk) return;
  std::nth_element(keys.begin(), keys.begin() + topk, keys.end(), std::greater<>());
  keys.resize(topk);
}

struct Block {
  std::vector<int64_t> keys;
  int64_t passed = 0;
};

template <typename T>
Block select_block(const HeadLevel<T>& level, int64_t image, int64_t begin, int64_t end,
                   float limit, int64_t topk) {
  Block block;
  const T* x = level.data + image * level.size();
  for (int64_t i = begin; i < end; ++i) {
    const float logit = float(x[i]);
    if (!(logit >= limit)) continue;
    ++block.passed;
    block.keys.push_back(candidate_key(logit, uint32_t(level.first + level.element(i))));
    // Pruning at twice the size keeps the memory bounded and the cost per candidate constant.
    if (int64_t(block.keys.size()) >= 2 * topk) keep_best(block.keys, topk);
  }
  keep_best(block.keys, topk);
  return block;
}

std::tuple<Tensor, Tensor> select_candidates_cpu(std::vector<Tensor> cls_logits,
                                                 int64_t num_classes, double score_threshold,
                                                 int64_t topk) {
  const HeadArgument heads(cls_logits, "select_candidates", "cls_logits");
  check_select_candidates(heads, num_classes, topk);
  const float limit = logit_limit(score_threshold);
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
    std::vector<Block> blocks(heads.images * per_image);
    torch::stable::parallel_for(0, heads.images * per_image, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const Work& w = work[b % per_image];
        blocks[b] = select_block(levels.level[w.level], b / per_image, w.begin, w.end, limit, topk);
      }
    });
    for (int64_t n = 0; n < heads.images; ++n) {
      int64_t* row = data<int64_t>(keys) + n * width;
      int64_t b = n * per_image;
      for (int l = 0; l < levels.count; ++l) {
        std::vector<int64_t> best;
        int64_t passed = 0;
        for (; b < (n + 1) * per_image && work[b % per_image].level == l; ++b) {
          best.insert(best.end(), blocks[b].keys.begin(), blocks[b].keys.end());
          passed += blocks[b].passed;
        }
        keep_best(best, topk);
        data<bool>(truncated)[n * levels.count + l] = passed > topk;
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
    int64_t num_classes, std::vector<double> weights, double max_log_ratio, double offset) {
  const HeadArgument heads(box_deltas, "decode_candidates", "box_deltas");
  const AnchorArgument argument(anchors, grid_sizes, grid_steps, "decode_candidates");
  check_decode_candidates(keys, heads, argument, num_classes);
  check_image_sizes(image_sizes, heads.images, image_sizes.scalar_type(), "decode_candidates");
  const Tensor packed_keys = packed(keys), sizes = packed(image_sizes);
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
          box_coder<T>(weights, -std::numeric_limits<double>::infinity(), max_log_ratio, offset,
                       "decode_candidates"),
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
