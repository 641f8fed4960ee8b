// Dense detection on the CPU: one pass over the logits in memory order, in chunks that are shared
// out among the threads. Each thread keeps the best candidates of its chunks of an (image, level),
// and the best of those are selected at the end.
//
// Once a thread holds twice `topk` candidates of a level, it drops all but its topk best and raises
// the level's limit to the lowest logit among those. Later logits below the limit cannot reach the
// top k. Keys are unique, so the result depends neither on the chunks nor on when a thread raises
// the limit. `detect` then shares out the images among the threads: each is sorted, decoded,
// filtered by NMS and written to its slots by one thread.
#include <algorithm>
#include <atomic>
#include <functional>

#include "common/half.h"
#include "detect_slots.h"
#include "nms_cpu_image.h"
#include "nms_cpu_rank.h"

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

// The selected candidates of a batch.
struct Selection {
  std::vector<std::vector<int64_t>> keys;  // of each image, best first
  std::vector<char> truncated;             // [N, L]: the level has more than topk candidates
};

// Sorts keys in descending order.
void sort_best_first(std::vector<int64_t>& keys) {
  if (keys.size() < 512) return std::sort(keys.begin(), keys.end(), std::greater<>());
  // Flip all bits but the sign. As unsigned numbers, the keys then ascend from the best to the
  // worst. Sort them by their upper halves, and then each run of equal upper halves.
  constexpr uint64_t kFlip = ~uint64_t(0) >> 1;
  std::vector<uint64_t> flipped(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) flipped[i] = uint64_t(keys[i]) ^ kFlip;
  radix_sort_upper(flipped);
  for (size_t begin = 0, end = 0; begin < keys.size(); begin = end) {
    while (end < keys.size() && flipped[end] >> 32 == flipped[begin] >> 32) ++end;
    if (end - begin > 1) std::sort(flipped.begin() + begin, flipped.begin() + end);
  }
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = int64_t(flipped[i] ^ kFlip);
}

Selection select(const HeadTensors& heads, double score_threshold, int64_t topk) {
  Selection result;
  dispatch_floating(heads.dtype(), "select_candidates", [&](auto zero) {
    using T = decltype(zero);
    const HeadLevels<T> levels = heads.view<T>();
    const std::vector<Chunk> chunks = chunks_of(levels);
    const int64_t per_image = int64_t(chunks.size());
    std::vector<std::vector<int64_t>> chunk_keys(heads.images * per_image);
    std::vector<Limit> limits(heads.images * levels.count);
    const float least = logit_limit(score_threshold);
    for (Limit& limit : limits) limit.logit = least;
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
    // Select the best of each level's chunks, and sort the best of all levels.
    result.keys.resize(heads.images);
    result.truncated.resize(heads.images * levels.count);
    torch::stable::parallel_for(0, heads.images, 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        int64_t c = n * per_image;
        for (int l = 0; l < levels.count; ++l) {
          Limit& limit = limits[n * levels.count + l];
          std::vector<int64_t> best;
          for (; c < (n + 1) * per_image && chunks[c % per_image].level == l; ++c)
            for (const int64_t key : chunk_keys[c])
              if (key_value(key) >= limit.logit) best.push_back(key);
          keep_best(best, topk, limit);
          result.truncated[n * levels.count + l] = limit.exceeded;
          result.keys[n].insert(result.keys[n].end(), best.begin(), best.end());
        }
        sort_best_first(result.keys[n]);
      }
    });
  });
  return result;
}

std::tuple<Tensor, Tensor> select_candidates_cpu(std::vector<Tensor> cls_logits,
                                                 int64_t num_classes, double score_threshold,
                                                 int64_t topk) {
  const HeadTensors heads(cls_logits, "select_candidates", "cls_logits");
  check_select_candidates(heads, num_classes, topk, "select_candidates");
  int64_t width = 0;
  for (const int64_t slots : candidate_slots(heads, topk)) width += slots;
  Tensor keys = torch::stable::new_empty(cls_logits[0], {heads.images, width}, ScalarType::Long);
  Tensor truncated = torch::stable::new_empty(
      cls_logits[0], {heads.images, int64_t(cls_logits.size())}, ScalarType::Bool);
  const Selection selection = select(heads, score_threshold, topk);
  for (int64_t n = 0; n < heads.images; ++n) {
    int64_t* row = data<int64_t>(keys) + n * width;
    const std::vector<int64_t>& best = selection.keys[n];
    std::fill(std::copy(best.begin(), best.end(), row), row + width, kNoKey);
  }
  std::copy(selection.truncated.begin(), selection.truncated.end(), data<bool>(truncated));
  return {keys, truncated};
}

DecodeResults decode_candidates_cpu(const Tensor& keys, std::vector<Tensor> box_deltas,
                                    const Tensor& anchors, std::vector<int64_t> grid_sizes,
                                    std::vector<double> grid_steps,
                                    std::optional<Tensor> image_sizes, int64_t num_classes,
                                    std::vector<double> coder_weights,
                                    std::optional<double> min_log_ratio,
                                    std::optional<double> max_log_ratio, double offset) {
  const DecodeArguments args(box_deltas, anchors, grid_sizes, grid_steps, image_sizes, num_classes,
                             "decode_candidates");
  const Tensor rows = args.checked_keys(keys);
  const int64_t slots = rows.size(1);
  DecodeResults results = args.empty_results(rows);
  dispatch_floating(args.deltas.dtype(), args.op, [&](auto zero) {
    using Delta = decltype(zero);
    dispatch_compute(args.box_dtype, args.op, [&](auto compute_zero) {
      using T = decltype(compute_zero);
      const CandidateDecoder<T, Delta> decode = args.decoder<T, Delta>(
          box_coder<T>(coder_weights, min_log_ratio, max_log_ratio, offset, args.op));
      const DecodeOutputs<T> out = args.outputs<T>(results);
      for (int64_t i = 0; i < args.images * slots; ++i)
        out.write(i, decode(i / slots, data<int64_t>(rows)[i]));
    });
  });
  return results;
}

// Decodes the candidates of an image, `keys`, runs NMS on their boxes, and writes the detections.
// `truncated` says whether a level has dropped a candidate.
template <typename T, typename Delta>
void detect_image(const CandidateDecoder<T, Delta>& decode, const NmsRules<T>& rules, int64_t image,
                  const std::vector<int64_t>& keys, bool truncated, const DetectionSlots<T>& out) {
  const int64_t count = int64_t(keys.size());
  std::vector<Box<T>> boxes(count);
  std::vector<int64_t> labels(count), index(std::min(count, rules.max_detections));
  for (int64_t c = 0; c < count; ++c) {
    const int64_t element = key_index(keys[c]), anchor = element / decode.num_classes;
    boxes[c] = decode.box(image, anchor);
    labels[c] = element - anchor * decode.num_classes;
  }
  int64_t size = 0;
  bool capped = false;
  vectorised([&](auto) ALWAYS_INLINE {
    size = nms_image<T>(rules, boxes.data(), nullptr, labels.data(), count, count, index.data(),
                        &capped);
  });
  for (int64_t slot = 0; slot < size; ++slot)
    out.write(image, slot, boxes[index[slot]], keys[index[slot]]);
  for (int64_t slot = size; slot < out.slots; ++slot) out.clear(image, slot);
  out.count[image] = size;
  out.truncated[image] = truncated || capped;
}

DetectResults detect_cpu(std::vector<Tensor> cls_logits, std::vector<Tensor> box_deltas,
                         const Tensor& anchors, std::vector<int64_t> grid_sizes,
                         std::vector<double> grid_steps, const Tensor& image_sizes,
                         double score_threshold, int64_t topk, double iou_threshold,
                         int64_t max_detections, int64_t max_per_class, bool class_agnostic,
                         std::vector<double> coder_weights, std::optional<double> min_log_ratio,
                         std::optional<double> max_log_ratio, double offset, bool clip_after_nms) {
  const DetectArguments args(cls_logits, box_deltas, anchors, grid_sizes, grid_steps, image_sizes,
                             topk, max_detections, clip_after_nms);
  DetectResults results = args.empty_results();
  const Selection selection = select(args.logits, score_threshold, topk);
  const int64_t levels = int64_t(cls_logits.size());
  dispatch_floating(args.decode.deltas.dtype(), args.decode.op, [&](auto zero) {
    using Delta = decltype(zero);
    dispatch_compute(args.decode.box_dtype, args.decode.op, [&](auto compute_zero) {
      using T = decltype(compute_zero);
      const CandidateDecoder<T, Delta> decode = args.decode.decoder<T, Delta>(
          box_coder<T>(coder_weights, min_log_ratio, max_log_ratio, offset, args.decode.op));
      const NmsRules<T> rules{T(iou_threshold), max_detections, max_per_class, class_agnostic};
      const DetectionSlots<T> slots = args.slots<T>(results);
      torch::stable::parallel_for(0, args.logits.images, 1, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n) {
          const char* flags = selection.truncated.data() + n * levels;
          const bool truncated = std::count(flags, flags + levels, char(true)) > 0;
          detect_image(decode, rules, n, selection.keys[n], truncated, slots);
        }
      });
    });
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("detect", TORCH_BOX(&detect_cpu));
  m.impl("select_candidates", TORCH_BOX(&select_candidates_cpu));
  m.impl("decode_candidates", TORCH_BOX(&decode_candidates_cpu));
}

}  // namespace retinanet
