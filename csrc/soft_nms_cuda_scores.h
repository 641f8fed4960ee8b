// The scores that one pass of Soft-NMS leaves, on CUDA.
//
// Work: one thread per candidate, which goes through all candidates of the image. The block brings
// them to shared memory, a tile of 256 at a time:
//
//     candidates of the image    | tile 0 | tile 1 | tile 2 | ...
//     threads of a block           each lowers the score of its own candidate by those of the tile
//                                  that rank before it, in the order of their indices
//
// Bytes moved: each block reads all candidates of its image, nearly always from the cache, and each
// score is written once. No candidates x candidates matrix exists. Deterministic: each thread
// multiplies its own score in a fixed order.
#pragma once

#include "common/cuda.h"
#include "soft_nms.h"

namespace retinanet {

constexpr int kScoresThreads = 256;

// The candidates of one image that a block has in shared memory.
template <typename T>
struct CandidateTile {
  Box<T> boxes[kScoresThreads];
  int64_t labels[kScoresThreads];
  T scores[kScoresThreads];
};

template <typename T, bool kGaussian>
__global__ void __launch_bounds__(kScoresThreads)
    soft_nms_scores_kernel(const Box<T>* __restrict__ boxes, const T* __restrict__ scores,
                           const int64_t* __restrict__ labels, const int64_t* __restrict__ counts,
                           int candidates, int blocks_per_image, SoftNmsRules<T> rules,
                           T* __restrict__ lowered) {
  __shared__ CandidateTile<T> tile;
  const int64_t image = blockIdx.x / unsigned(blocks_per_image);
  boxes += image * candidates;
  scores += image * candidates;
  lowered += image * candidates;
  if (labels) labels += image * candidates;
  const int64_t given = counts ? counts[image] : candidates;
  const int count = int(min(max(given, int64_t(0)), int64_t(candidates)));

  const int block = int(blockIdx.x % unsigned(blocks_per_image));
  const int mine = block * kScoresThreads + int(threadIdx.x);
  const bool exists = mine < count;
  const Box<T> box = exists ? boxes[mine] : Box<T>{};
  const int64_t label = exists && labels ? labels[mine] : 0;
  const T box_area = area(box), score = mine < candidates ? scores[mine] : T(0);
  T result = score;
  for (int first = 0; first < count; first += kScoresThreads) {
    const int c = first + int(threadIdx.x);
    __syncthreads();  // the tile before may still be in use
    if (c < count) {
      tile.boxes[threadIdx.x] = boxes[c];
      tile.labels[threadIdx.x] = labels ? labels[c] : 0;
      tile.scores[threadIdx.x] = scores[c];
    }
    __syncthreads();
    const int size = exists ? min(kScoresThreads, count - first) : 0;
#pragma unroll 1
    for (int i = 0; i < size; ++i) {
      if (tile.labels[i] != label || !ranks_before(tile.scores[i], score, first + i < mine))
        continue;
      const Box<T> by = tile.boxes[i];
      result *= rules.template factor<kGaussian>(iou(by, area(by), box, box_area));
    }
  }
  if (mine < candidates) lowered[mine] = result;
}

inline Tensor soft_nms_scores_cuda(const Tensor& boxes, const Tensor& scores,
                                   std::optional<Tensor> labels, std::optional<Tensor> counts,
                                   std::string method, double iou_threshold, double sigma) {
  const char* op = "soft_nms_scores";
  const CudaScope scope(op, boxes, scores, labels, counts);
  const SoftNmsArguments args(op, boxes, scores, labels, counts, 0, 0);
  Tensor lowered = torch::stable::empty_like(args.scores);
  dispatch_compute(boxes.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto gaussian, const SoftNmsRules<T>& rules) {
      if (args.images * args.candidates == 0) return;
      const int64_t per_image = ceil_div(args.candidates, kScoresThreads);
      const int64_t blocks = args.images * per_image;
      check(blocks < (int64_t(1) << 31), op, ": expected fewer candidates, got boxes ",
            shape(boxes));
      launch("soft_nms_scores_kernel", soft_nms_scores_kernel<T, decltype(gaussian)::value>,
             unsigned(blocks), kScoresThreads, 0, scope, data<Box<T>>(args.boxes),
             data<T>(args.scores), data<int64_t>(args.labels), data<int64_t>(args.counts),
             int(args.candidates), int(per_image), rules, data<T>(lowered));
    };
    dispatch_soft_nms<T>(op, method, iou_threshold, sigma, 0, 0, run);
  });
  return lowered;
}

}  // namespace retinanet
