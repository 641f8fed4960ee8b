// Dense detection on the CPU: one pass over the logits in memory order, in chunks that are shared
// out among the threads. Each thread keeps the best candidates of its chunks of an (image, level),
// and the best of those are selected at the end.
//
// Once a thread holds twice `topk` candidates of a level, it drops all but its topk best and raises
// the level's limit to the lowest logit among those. Later logits below the limit cannot reach the
// top k. Keys are unique, so the result depends neither on the chunks nor on when a thread raises
// the limit.
#include <algorithm>
#include <atomic>
#include <functional>

#include "common/half.h"
#include "common/sort_rows.h"
#include "detect_decode.h"

namespace retinanet {
namespace {

constexpr int64_t kChunk = 1 << 16;  // logits of one level of one image
constexpr int64_t kSkip = 64;        // logits that are skipped together if none passes

// What all threads share about one level of one image.
struct Limit {
  std::atomic<float> logit;           // the lowest that may still be among the topk best
  std::atomic<bool> exceeded{false};  // more than topk candidates passed

  void raise(float to) {
    float now = logit.load(std::memory_order_relaxed);
    while (now < to && !logit.compare_exchange_weak(now, to, std::memory_order_relaxed)) {
    }
  }
};

// Reduces the keys to the topk best, and raises the limit to the lowest logit among them.
void keep_best(std::vector<int64_t>& keys, int64_t topk, Limit& limit) {
  if (int64_t(keys.size()) <= topk) return;
  std::nth_element(keys.begin(), keys.begin() + (topk - 1), keys.end(), std::greater<>());
  keys.resize(topk);
  limit.exceeded = true;
  limit.raise(key_value(keys.back()));
}

// Logits [begin, end) of a level, in memory order. Every image has the same chunks.
struct Chunk {
  int level;
  int64_t begin, end;
};

template <typename T>
std::vector<Chunk> chunks_of(const HeadLevels<T>& levels) {
  std::vector<Chunk> chunks;
  for (int l = 0; l < levels.count; ++l)
    for (int64_t begin = 0; begin < levels.level[l].size(); begin += kChunk)
      chunks.push_back({l, begin, std::min(levels.level[l].size(), begin + kChunk)});
  return chunks;
}

// Adds the keys of a chunk's passing logits to `keys`. `x` is the level's data of one image.
template <typename T>
ALWAYS_INLINE inline void select_in_chunk(const HeadLevel<T>& level, const T* x, const Chunk chunk,
                                          int64_t topk, Limit& limit, std::vector<int64_t>& keys) {
  float least = limit.logit.load(std::memory_order_relaxed);
  for (int64_t first = chunk.begin; first < chunk.end; first += kSkip) {
    const int count = int(std::min(kSkip, chunk.end - first));
    // Few logits pass, so first test without branches whether any of these does.
    int passing = 0;
    for (int j = 0; j < count; ++j) passing += float(widen(x[first + j])) >= least;
    if (passing == 0) continue;
    for (int j = 0; j < count; ++j) {
      const float logit = float(widen(x[first + j]));
      if (logit >= least)
        keys.push_back(
            ranking_key(logit, uint32_t(level.first + level.anchor_order_of_offset(first + j))));
    }
    // Pruning at twice topk bounds the memory, and keeps the cost per candidate constant.
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
    const std::vector<Chunk> chunks = chunks_of(levels);
    const int64_t per_image = int64_t(chunks.size());
    std::vector<std::vector<int64_t>> chunk_keys(heads.images * per_image);
    std::vector<Limit> limits(heads.images * levels.count);
    for (Limit& limit : limits) limit.logit = logit_limit(score_threshold);
    torch::stable::parallel_for(0, heads.images * per_image, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        const Chunk chunk = chunks[c % per_image];
        const int64_t image = c / per_image;
        const HeadLevel<T>& level = levels.level[chunk.level];
        const T* x = level.data + image * level.size();
        vectorised([&, x](auto) ALWAYS_INLINE {
          select_in_chunk(level, x, chunk, std::min(topk, level.size()),
                          limits[image * levels.count + chunk.level], chunk_keys[c]);
        });
        // If this thread also takes the level's next chunk, hand the keys on to it.
        const int64_t next = c + 1;
        if (next < last && next % per_image != 0 && chunks[next % per_image].level == chunk.level)
          chunk_keys[next].swap(chunk_keys[c]);
      }
    });
    // Select the best of each level's chunks.
    for (int64_t n = 0; n < heads.images; ++n) {
      int64_t* row = data<int64_t>(keys) + n * width;
      int64_t c = n * per_image;
      for (int l = 0; l < levels.count; ++l) {
        Limit& limit = limits[n * levels.count + l];
        std::vector<int64_t> best;
        for (; c < (n + 1) * per_image && chunks[c % per_image].level == l; ++c)
          for (const int64_t key : chunk_keys[c])
            if (key_value(key) >= limit.logit) best.push_back(key);
        keep_best(best, topk, limit);
        data<bool>(truncated)[n * levels.count + l] = limit.exceeded;
        std::fill(std::copy(best.begin(), best.end(), row), row + slots[l], kNoKey);
        row += slots[l];
      }
    }
  });
  return {sorted_descending(keys), truncated};
}

DecodeResults decode_candidates_cpu(const Tensor& keys, std::vector<Tensor> box_deltas,
                                    const Tensor& anchors, std::vector<int64_t> grid_sizes,
                                    std::vector<double> grid_steps,
                                    std::optional<Tensor> image_sizes, int64_t num_classes,
                                    std::vector<double> coder_weights,
                                    std::optional<double> min_log_ratio,
                                    std::optional<double> max_log_ratio, double offset) {
  const DecodeArguments args(keys, box_deltas, anchors, grid_sizes, grid_steps, image_sizes,
                             num_classes);
  DecodeResults results = args.empty_results();
  dispatch_floating(args.deltas.dtype(), args.kOp, [&](auto zero) {
    using Delta = decltype(zero);
    dispatch_compute(args.box_dtype, args.kOp, [&](auto compute_zero) {
      using T = decltype(compute_zero);
      const CandidateDecoder<T, Delta> decode = args.decoder<T, Delta>(
          box_coder<T>(coder_weights, min_log_ratio, max_log_ratio, offset, args.kOp));
      const DecodeOutputs<T> out = args.outputs<T>(results);
      const int64_t* rows = data<int64_t>(args.keys);
      for (int64_t i = 0; i < args.images * args.slots; ++i)
        out.write(i, decode(i / args.slots, rows[i]));
    });
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("select_candidates", TORCH_BOX(&select_candidates_cpu));
  m.impl("decode_candidates", TORCH_BOX(&decode_candidates_cpu));
}

}  // namespace retinanet
