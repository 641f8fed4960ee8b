// Soft-NMS on CUDA.
//
// Work: one block per image. Scores only fall, so a candidate's original score is an upper bound of
// its lowered score. The block therefore keeps only the candidates with the highest original scores
// up to date, which are called active:
//
//     candidates by original score    | active            | inactive                  |
//     score that is known             | lowered so far    | original, below the bound |
//
// A step finds the best active candidate, with one barrier. If its score reaches the bound, no
// inactive candidate can be better: the step takes it and lowers the scores of the other active
// candidates. Otherwise the block activates at least as many candidates as are active, with the
// next highest original scores, and lowers their scores by all boxes taken so far, in order.
//
// Each active candidate has a slot. A thread holds its first slot in registers, and its others in
// global memory: thread t has the slots t, t + 512, t + 1024, ...
//
// Bytes moved: an activation reads the scores of all candidates about four times, mostly from the
// cache, and the boxes and classes of the activated ones once. A step reads and writes global
// memory only for slots that are not in registers. Deterministic: the order of the slots varies,
// but no result depends on it. Ties go to the lower index.
#include "common/cuda.h"
#include "common/kth_largest.h"
#include "soft_nms.h"
#include "soft_nms_cuda_best.h"
#include "soft_nms_cuda_scores.h"

namespace retinanet {
namespace {

constexpr int kThreads = 512;
constexpr int kFirstActive = 256;  // candidates that the first activation asks for
constexpr int kTile = 64;          // taken boxes in shared memory at a time

// The score as an integer of the same order. Different scores in float64 may have the same rank.
template <typename T>
__device__ __forceinline__ unsigned rank_of(T score) {
  return std::bit_cast<unsigned>(float(score));
}
constexpr int kRankBits = 31;  // ranks of scores above 0 have no sign
constexpr unsigned kAboveAllRanks = 1u << kRankBits;

template <typename T, bool kGaussian>
__global__ void __launch_bounds__(kThreads, 1)
    soft_nms_kernel(const Box<T>* __restrict__ boxes, const int64_t* __restrict__ labels,
                    const int64_t* __restrict__ counts, int candidates, SoftNmsRules<T> rules,
                    const T* __restrict__ scores, Best<T>* slots, int64_t* index,
                    T* __restrict__ taken_scores, int64_t* __restrict__ taken) {
  __shared__ BlockBest<T, kThreads> block;
  __shared__ BlockRadixSearch<kThreads> search;
  __shared__ ClassBox<T> tile[kTile];
  __shared__ int used_slots;
  // Advance the pointers to this block's image.
  const int64_t image = blockIdx.x;
  boxes += image * candidates;
  scores += image * candidates;
  slots += image * candidates;
  if (labels) labels += image * candidates;
  index += image * rules.max_detections;
  taken_scores += image * rules.max_detections;
  int count = candidates;
  if (counts && counts[image] < count) count = counts[image] < 0 ? 0 : int(counts[image]);

  const int thread = threadIdx.x;
  const auto box_of = [&](int c) { return ClassBox<T>{boxes[c], labels ? labels[c] : 0}; };
  // Lowers the score of a candidate by a taken box.
  const auto lower = [&](T& score, const ClassBox<T>& candidate, const ClassBox<T>& by) {
    if (!(score > rules.min_score) || candidate.label != by.label) return;
    const T overlap = iou(by.box, area(by.box), candidate.box, area(candidate.box));
    if (overlap > T(0)) score *= rules.template factor<kGaussian>(overlap);
  };

  // The slot in registers. A score of 0 means that there is no candidate or that it is taken.
  ClassBox<T> mine{};
  Best<T> my_score{0, candidates};
  int active = 0;                   // number of active candidates
  unsigned bound = kAboveAllRanks;  // ranks of all inactive candidates are lower; 0: all are active
  if (thread == 0) used_slots = 0;
  block.clear();
  int buffer = 0;
  int64_t size = 0;
  while (size < rules.max_detections) {
    // Find the best active candidate.
    Best<T> best{0, candidates};
    if (my_score.score > rules.min_score) best = my_score;
#pragma unroll 1
    for (int s = kThreads + thread; s < active; s += kThreads)
      if (slots[s].score > rules.min_score) best.meet(slots[s].score, slots[s].index);
    buffer ^= 1;
    const int warp = block.find(best, buffer, thread / kWarp * kWarp < active,
                                [&](int c) { return c == my_score.index ? mine : box_of(c); });

    if (rank_of(best.score) < bound) {
      // An inactive candidate may be better. Find the ranks of the next ones to activate.
      const auto for_inactive = [&](auto&& visit) {
#pragma unroll 1
        for (int c = thread; c < count; c += kThreads) {
          const T score = scores[c];
          if (score > rules.min_score && rank_of(score) < bound) visit(rank_of(score));
        }
      };
      const unsigned wanted = active > kFirstActive ? active : kFirstActive;
      const unsigned next =
          bound_of_largest<unsigned>(search, kRankBits, wanted, 2 * wanted, for_inactive);
      // Assign slots to them.
#pragma unroll 1
      for (int first = 0; first < count; first += kThreads) {
        const int c = first + thread;
        const T score = c < count ? scores[c] : T(0);
        const bool enters =
            score > rules.min_score && rank_of(score) < bound && rank_of(score) >= next;
        const unsigned lanes = __ballot_sync(kFullMask, enters);
        int slot = 0;
        if (thread % kWarp == 0 && lanes != 0) slot = atomicAdd(&used_slots, __popc(lanes));
        slot = __shfl_sync(kFullMask, slot, 0) + __popc(lanes & ((1u << thread % kWarp) - 1));
        if (enters) slots[slot] = {score, c};
      }
      __syncthreads();
      const int first = active;
      active = used_slots;
      bound = next;
      const bool is_new = first <= thread && thread < active;
      if (is_new) {
        my_score = slots[thread];
        mine = box_of(my_score.index);
      }
      // Lower their scores by the boxes taken so far, in order.
      for (int64_t begin = 0; begin < size; begin += kTile) {
        const int taken_boxes = size - begin < kTile ? int(size - begin) : kTile;
        if (thread < taken_boxes) tile[thread] = box_of(int(index[begin + thread]));
        __syncthreads();
        if (is_new)
#pragma unroll 1
          for (int d = 0; d < taken_boxes; ++d) lower(my_score.score, mine, tile[d]);
#pragma unroll 1
        for (int s = kThreads + thread; s < active; s += kThreads) {
          if (s < first) continue;
          const ClassBox<T> candidate = box_of(slots[s].index);
          T score = slots[s].score;
#pragma unroll 1
          for (int d = 0; d < taken_boxes; ++d) lower(score, candidate, tile[d]);
          slots[s].score = score;
        }
        __syncthreads();
      }
      continue;
    }
    if (best.score == 0) break;  // no candidate is left

    // Take the candidate, and lower the scores of the others.
    if (thread == 0) {
      index[size] = best.index;
      taken_scores[size] = best.score;
    }
    ++size;
    const ClassBox<T> by = block.boxes[buffer][warp];
    if (my_score.index == best.index) my_score.score = 0;
    lower(my_score.score, mine, by);
#pragma unroll 1
    for (int s = kThreads + thread; s < active; s += kThreads) {
      const Best<T> slot = slots[s];
      T score = slot.index == best.index ? T(0) : slot.score;
      lower(score, box_of(slot.index), by);
      slots[s].score = score;
    }
  }
  // Mark the unused slots, and write the number of taken candidates.
  for (int64_t slot = size + thread; slot < rules.max_detections; slot += kThreads) {
    index[slot] = -1;
    taken_scores[slot] = 0;
  }
  if (thread == 0) taken[image] = size;
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_cuda(const Tensor& boxes, const Tensor& scores,
                                                 std::optional<Tensor> labels,
                                                 std::optional<Tensor> counts, std::string method,
                                                 double iou_threshold, double sigma,
                                                 double min_score, int64_t max_detections) {
  const char* op = "soft_nms";
  const CudaScope scope(op, boxes, scores, labels, counts);
  const SoftNmsArguments args(op, boxes, scores, labels, counts, min_score, max_detections);
  Tensor index = torch::stable::new_empty(boxes, {args.images, max_detections}, ScalarType::Long);
  Tensor taken_scores = torch::stable::new_empty(boxes, {args.images, max_detections});
  Tensor taken = torch::stable::new_empty(boxes, {args.images}, ScalarType::Long);
  if (args.images == 0) return {index, taken_scores, taken};
  dispatch_compute(boxes.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto gaussian, const SoftNmsRules<T>& rules) {
      const int64_t slot_bytes[] = {args.images * args.candidates * int64_t(sizeof(Best<T>))};
      Tensor slots = torch::stable::new_empty(boxes, slot_bytes, ScalarType::Byte);
      launch("soft_nms_kernel", soft_nms_kernel<T, decltype(gaussian)::value>,
             unsigned(args.images), kThreads, 0, scope, data<Box<T>>(args.boxes),
             data<int64_t>(args.labels), data<int64_t>(args.counts), int(args.candidates), rules,
             data<T>(args.scores), data<Best<T>>(slots), data<int64_t>(index),
             data<T>(taken_scores), data<int64_t>(taken));
    };
    dispatch_soft_nms<T>(op, method, iou_threshold, sigma, min_score, max_detections, run);
  });
  return {index, taken_scores, taken};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("soft_nms", TORCH_BOX(&soft_nms_cuda));
  m.impl("soft_nms_scores", TORCH_BOX(&soft_nms_scores_cuda));
}

}  // namespace retinanet
