// Soft-NMS on CUDA.
//
// Work: one block per image, whose threads stride over the image's candidates once per detection.
// That pass lowers the scores by the box that was taken last, and finds the best of the candidates
// that are left:
//
//     detection 0    find the best of all candidates
//     detection 1    lower the scores by detection 0's box, find the best of the rest
//     detection 2    lower the scores by detection 1's box, find the best of the rest
//     ...            until no score is above min_score or all slots are taken
//
// Bytes moved: each detection reads the box, class and score of each candidate and writes the
// score, mostly in the cache. Deterministic: there are no atomics. Ties go to the lower index, so
// the best candidate does not depend on the order in which threads compare them.
#include "common/cuda.h"
#include "soft_nms.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;

// The best candidate that a thread has seen.
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

// Returns the best candidate of all threads, in every thread. All threads must call this function.
template <typename T>
__device__ __forceinline__ Best<T> block_best(Best<T> best) {
  __shared__ T scores[kThreads / kWarp];
  __shared__ int indices[kThreads / kWarp];
  // Reduce within each warp, to its lane 0.
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T score = __shfl_down_sync(kFullMask, best.score, offset);
    const int index = __shfl_down_sync(kFullMask, best.index, offset);
    best.meet(score, index);
  }
  __syncthreads();  // an earlier call may still be reading `scores` and `indices`
  if (threadIdx.x % kWarp == 0) {
    scores[threadIdx.x / kWarp] = best.score;
    indices[threadIdx.x / kWarp] = best.index;
  }
  __syncthreads();
  // Every thread reduces over the warps.
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
  // Advance the pointers to this block's image.
  const int64_t image = blockIdx.x;
  boxes += image * candidates;
  scores += image * candidates;
  if (labels) labels += image * candidates;
  index += image * rules.max_detections;
  taken_scores += image * rules.max_detections;
  int64_t count = candidates;
  if (counts && counts[image] < count) count = counts[image];

  int last = -1;  // the candidate taken last
  int64_t size = 0;
  for (; size < rules.max_detections; ++size) {
    Best<T> best{rules.min_score, candidates};
    const Box<T> box = last < 0 ? Box<T>{0, 0, 0, 0} : boxes[last];
    const T box_area = area(box);
    const int64_t label = labels && last >= 0 ? labels[last] : 0;
    // Lower the scores by the box taken last, and find the thread's best candidate. Each thread
    // reads and writes the scores of its own candidates only, so this needs no barrier.
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
    // Take the block's best candidate, or stop if no thread has one.
    best = block_best(best);
    if (best.index == candidates) break;
    last = best.index;
    if (threadIdx.x == 0) {
      index[size] = best.index;
      taken_scores[size] = best.score;
    }
  }
  // Mark the unused slots, and write the number of taken candidates.
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
  const CudaScope scope("soft_nms", boxes, scores, labels, counts);
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
