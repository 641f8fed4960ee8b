// Soft-NMS on CUDA.
//
// Work: one block per image; for each detection its threads pass over the candidates once, lower
// the scores by the box that was taken last and find the best of what is left; ties go to the lower
// index.  Bytes moved: a candidate's box, class and score per detection, from the cache.
// Deterministic: no atomics; the best of a block does not depend on the order in which it is found.
#include "common/cuda.h"
#include "soft_nms.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Best {
  T score;
  int index;

  __device__ __forceinline__ void meet(T other_score, int other) {
    if (other_score > score || (other_score == score && other < index)) {
      score = other_score;
      index = other;
    }
  }
};

// The best of all threads', in every thread.
template <typename T>
__device__ __forceinline__ Best<T> block_best(Best<T> best) {
  __shared__ T scores[kThreads / kWarp];
  __shared__ int indices[kThreads / kWarp];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T score = __shfl_down_sync(kFullMask, best.score, offset);
    const int index = __shfl_down_sync(kFullMask, best.index, offset);
    best.meet(score, index);
  }
  __syncthreads();  // an earlier call may still be reading
  if (threadIdx.x % kWarp == 0) {
    scores[threadIdx.x / kWarp] = best.score;
    indices[threadIdx.x / kWarp] = best.index;
  }
  __syncthreads();
  best = {scores[0], indices[0]};
  for (int w = 1; w < kThreads / kWarp; ++w) best.meet(scores[w], indices[w]);
  return best;
}

template <typename T, bool kGaussian>
__global__ void __launch_bounds__(kThreads)
    soft_nms_kernel(const Box<T>* __restrict__ boxes, const int64_t* __restrict__ labels,
                    const int64_t* __restrict__ counts, int candidates, SoftNmsRules<T> rules,
                    T* __restrict__ scores, int64_t* __restrict__ index,
                    T* __restrict__ taken_scores, int64_t* __restrict__ taken) {
  const int64_t image = blockIdx.x;
  boxes += image * candidates;
  scores += image * candidates;
  if (labels) labels += image * candidates;
  index += image * rules.max_detections;
  taken_scores += image * rules.max_detections;
  int64_t count = candidates;
  if (counts && counts[image] < count) count = counts[image];

  int last = -1;
  int64_t size = 0;
  for (; size < rules.max_detections; ++size) {
    Best<T> best{rules.min_score, candidates};
    const Box<T> box = last < 0 ? Box<T>{0, 0, 0, 0} : boxes[last];
    const T box_area = area(box);
    const int64_t label = labels && last >= 0 ? labels[last] : 0;
    for (int c = threadIdx.x; c < count; c += kThreads) {
      T score = scores[c];
      if (last >= 0) {
        const bool rival = !labels || labels[c] == label;
        if (c == last) score = 0;
        if (rival)
          score *= rules.template factor<kGaussian>(iou(box, box_area, boxes[c], area(boxes[c])));
        scores[c] = score;
      }
      if (score > rules.min_score) best.meet(score, c);
    }
    best = block_best(best);
    if (best.index == candidates) break;
    last = best.index;
    if (threadIdx.x == 0) {
      index[size] = best.index;
      taken_scores[size] = best.score;
    }
  }
  for (int64_t slot = size + threadIdx.x; slot < rules.max_detections; slot += kThreads) {
    index[slot] = -1;
    taken_scores[slot] = 0;
  }
  if (threadIdx.x == 0) taken[image] = size;
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_cuda(const Tensor& boxes, const Tensor& scores,
                                                 std::optional<Tensor> labels,
                                                 std::optional<Tensor> counts, std::string method,
                                                 double iou_threshold, double sigma,
                                                 double min_score, int64_t max_detections) {
  const CudaScope scope(boxes);
  const SoftNmsArguments args(boxes, scores, labels, counts, min_score, max_detections);
  Tensor index = torch::stable::new_empty(boxes, {args.images, max_detections}, ScalarType::Long);
  Tensor taken_scores = torch::stable::new_empty(boxes, {args.images, max_detections});
  Tensor taken = torch::stable::new_empty(boxes, {args.images}, ScalarType::Long);
  if (args.images == 0) return {index, taken_scores, taken};
  dispatch_compute(boxes.scalar_type(), "soft_nms", [&](auto zero) {
    using T = decltype(zero);
    dispatch_soft_nms(method, [&](auto gaussian) {
      const SoftNmsRules<T> rules{T(iou_threshold), T(sigma), T(min_score), max_detections};
      check(rules.sigma > T(0), "soft_nms: sigma must be positive, got ", rules.sigma);
      Tensor lowered = torch::stable::clone(args.scores);
      launch("soft_nms_kernel", soft_nms_kernel<T, decltype(gaussian)::value>,
             unsigned(args.images), kThreads, 0, scope, data<Box<T>>(args.boxes),
             data<int64_t>(args.labels), data<int64_t>(args.counts), int(args.candidates), rules,
             data<T>(lowered), data<int64_t>(index), data<T>(taken_scores), data<int64_t>(taken));
    });
  });
  return {index, taken_scores, taken};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) { m.impl("soft_nms", TORCH_BOX(&soft_nms_cuda)); }

}  // namespace retinanet
