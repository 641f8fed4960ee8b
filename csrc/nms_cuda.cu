// NMS on CUDA.
//
// Work: one block of 1,024 threads per image decides the image's candidates in order, a chunk of
// 256 at a time, as nms_cuda_rounds.h describes:
//
//     candidates    | chunk 0 | chunk 1 | chunk 2 | ...       best first
//
// It ends as soon as the last slot is filled and one more survivor has shown that a cap was hit.
// nms_kernel takes the candidates from a tensor that has their order. nms_padded_kernel finds the
// order itself, two chunks at a time (nms_cuda_order.h), so that it sorts no more than it needs.
// Long lists of which many boxes may be kept take the kernels of nms_cuda_long.h instead, which use
// all multiprocessors.
//
// Bytes moved: each candidate is read once, and each kept box is written once and read once per
// later chunk. nms_padded_kernel reads all scores up to four times for each two chunks, mostly from
// the cache. No candidates x candidates matrix exists. Deterministic, see nms_cuda_rounds.h and
// nms_cuda_order.h.
#include "nms_cuda_long.h"
#include "nms_cuda_order.h"
#include "nms_cuda_rank.h"
#include "nms_cuda_rounds.h"

namespace retinanet {
namespace {

// 128-bit accesses: 2 loads, 2 stores
template <typename T>
__global__ void __launch_bounds__(NmsRounds<T>::kThreads)
    nms_kernel(NmsImages<T> images, NmsRules<T> rules, NmsOutputs out, NmsBox<T>* kept) {
  __shared__ NmsRounds<T> shared;
  constexpr int kChunk = NmsRounds<T>::kChunk;
  const int64_t image = blockIdx.x, count = images.size(image), row = image * rules.max_detections;
  NmsProgress progress;
  for (int64_t first = 0; first < count && !is_complete(progress, rules); first += kChunk) {
    // Each of the first 256 threads takes a candidate of the chunk.
    const int64_t c = first + threadIdx.x;
    const int64_t i = threadIdx.x < kChunk && c < count ? images.row(image, c) : -1;
    const bool exists = i >= 0;
    const NmsBox<T> mine = exists ? images.load(image, i) : NmsBox<T>{};
    const int64_t slot = decide_chunk(shared, rules, mine, exists, kept + row, progress);
    if (slot >= 0) out.index[row + slot] = i;
  }
  out.finish(image, rules, progress);
}

// The scores of all images, in any floating dtype but float64.
struct NmsScores {
  const void* data;  // [N, C]
  ScalarType dtype;

  __device__ __forceinline__ float operator()(int64_t i) const {
    if (dtype == ScalarType::Half) return float(static_cast<const c10::Half*>(data)[i]);
    if (dtype == ScalarType::BFloat16) return float(static_cast<const c10::BFloat16*>(data)[i]);
    return static_cast<const float*>(data)[i];
  }
};

// `images` has no order, and its count may be null.
// 128-bit accesses: 2 loads, 2 stores
template <typename T>
__global__ void __launch_bounds__(NmsRounds<T>::kThreads)
    nms_padded_kernel(NmsImages<T> images, NmsScores scores, NmsRules<T> rules, NmsOutputs out,
                      NmsBox<T>* kept) {
  __shared__ NmsRounds<T> shared;
  __shared__ NmsOrder order;
  static_assert(int(NmsRounds<T>::kThreads) == int(NmsOrder::kThreads));
  constexpr int kChunk = NmsRounds<T>::kChunk;
  const int64_t image = blockIdx.x, count = images.size(image), row = image * rules.max_detections;
  // The key of candidate i, if its score is neither NaN nor -inf.
  const auto key_at = [&](int64_t i) {
    const float score = scores(image * images.candidates + i);
    return score > -std::numeric_limits<float>::infinity() ? ranking_key(score, uint32_t(i))
                                                           : kNoKey;
  };
  NmsProgress progress;
  uint64_t ceiling = ~uint64_t(0);
  while (ceiling != 0 && !is_complete(progress, rules)) {
    const int size = next_batch(order, key_at, count, ceiling);
    for (int first = 0; first < size && !is_complete(progress, rules); first += kChunk) {
      // Each of the first 256 threads takes a candidate of the chunk.
      const int c = first + int(threadIdx.x);
      const bool exists = threadIdx.x < kChunk && c < size;
      const int64_t i = exists ? key_index(order.keys[c]) : 0;
      const NmsBox<T> mine = exists ? images.load(image, i) : NmsBox<T>{};
      const int64_t slot = decide_chunk(shared, rules, mine, exists, kept + row, progress);
      if (slot >= 0) out.index[row + slot] = i;
    }
  }
  out.finish(image, rules, progress);
}

// Memory for the kept boxes of all images, on the device of `boxes`.
template <typename T>
Tensor empty_kept(const Tensor& boxes, int64_t images, int64_t max_detections) {
  const int64_t bytes = images * max_detections * NmsBox<T>::kBytes;
  return torch::stable::new_empty(boxes, {bytes}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor, Tensor> nms_sorted_cuda(const Tensor& boxes, std::optional<Tensor> order,
                                                   const Tensor& count,
                                                   std::optional<Tensor> labels,
                                                   double iou_threshold, int64_t max_detections,
                                                   int64_t max_per_class, bool class_agnostic) {
  const CudaScope scope("nms_sorted", boxes, order, count, labels);
  const NmsArguments args(boxes, order, count, labels, max_detections);
  Tensor index = torch::stable::new_empty(boxes, {args.images, max_detections}, ScalarType::Long);
  Tensor kept = torch::stable::new_empty(boxes, {args.images}, ScalarType::Long);
  Tensor truncated = torch::stable::new_empty(boxes, {args.images}, ScalarType::Bool);
  if (args.images == 0) return {index, kept, truncated};
  dispatch_compute(boxes.scalar_type(), "nms_sorted", [&](auto zero) {
    using T = decltype(zero);
    const NmsRules<T> rules{T(iou_threshold), max_detections, max_per_class, class_agnostic};
    const NmsImages<T> images{data<Box<T>>(args.boxes), data<int64_t>(args.order),
                              data<int64_t>(args.count), data<int64_t>(args.labels),
                              args.candidates};
    const NmsOutputs out{data<int64_t>(index), data<int64_t>(kept), data<bool>(truncated)};
    if (is_long(args.candidates, max_detections, max_per_class))
      return launch_long_nms(scope, boxes, images, args.images, rules, out);
    Tensor kept_boxes = empty_kept<T>(boxes, args.images, max_detections);
    launch("nms_kernel", nms_kernel<T>, unsigned(args.images), NmsRounds<T>::kThreads, 0, scope,
           images, rules, out, data<NmsBox<T>>(kept_boxes));
  });
  return {index, kept, truncated};
}

// Above this number of candidates, sorting all of them takes less time than the passes of a block.
constexpr int64_t kMaxOrderedByBlock = 16384;

std::tuple<Tensor, Tensor> batched_nms_padded_cuda(const Tensor& boxes, const Tensor& scores,
                                                   std::optional<Tensor> labels,
                                                   std::optional<Tensor> counts,
                                                   double iou_threshold, int64_t max_detections) {
  const CudaScope scope("batched_nms_padded", boxes, scores, labels, counts);
  const PaddedNmsArguments args(boxes, scores, labels, counts, max_detections);
  const ScalarType dtype = scores.scalar_type();
  if (dtype == ScalarType::Double || args.candidates > kMaxOrderedByBlock ||
      is_long(args.candidates, max_detections, 0)) {
    const auto [order, valid] = rank_scores_cuda(args.scores, args.counts);
    auto [index, count, truncated] = nms_sorted_cuda(args.boxes, order, valid, args.labels,
                                                     iou_threshold, max_detections, 0, false);
    return {index, count};
  }
  Tensor index = torch::stable::new_empty(boxes, {args.images, max_detections}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(boxes, {args.images}, ScalarType::Long);
  if (args.images == 0) return {index, count};
  dispatch_floating(dtype, "batched_nms_padded", [](auto) {});  // checks the dtype
  dispatch_compute(boxes.scalar_type(), "batched_nms_padded", [&](auto zero) {
    using T = decltype(zero);
    const NmsRules<T> rules{T(iou_threshold), max_detections, 0, false};
    Tensor kept = empty_kept<T>(boxes, args.images, max_detections);
    const NmsImages<T> images{data<Box<T>>(args.boxes), nullptr, data<int64_t>(args.counts),
                              data<int64_t>(args.labels), args.candidates};
    const NmsOutputs out{data<int64_t>(index), data<int64_t>(count), nullptr};
    launch("nms_padded_kernel", nms_padded_kernel<T>, unsigned(args.images), NmsOrder::kThreads, 0,
           scope, images, NmsScores{args.scores.const_data_ptr(), dtype}, rules, out,
           data<NmsBox<T>>(kept));
  });
  return {index, count};
}

Tensor nms_cuda(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> labels,
                double iou_threshold) {
  const CudaScope scope("nms", boxes, scores, labels);
  const auto as_batch = [](const Tensor& t) { return torch::stable::unsqueeze(t, 0); };
  if (labels) labels = as_batch(*labels);
  const auto [index, count] = batched_nms_padded_cuda(as_batch(boxes), as_batch(scores), labels,
                                                      std::nullopt, iou_threshold, boxes.size(0));
  // The only synchronisation with the device: the host needs the size of the result.
  const torch::stable::Device host(torch::headeronly::DeviceType::CPU);
  const Tensor size = torch::stable::to(count, host);
  Tensor kept = torch::stable::select(index, 0, 0);
  return torch::stable::narrow(kept, 0, 0, *data<int64_t>(size));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("rank_scores", TORCH_BOX(&rank_scores_cuda));
  m.impl("nms_sorted", TORCH_BOX(&nms_sorted_cuda));
  m.impl("batched_nms_padded", TORCH_BOX(&batched_nms_padded_cuda));
  m.impl("nms", TORCH_BOX(&nms_cuda));
}

}  // namespace retinanet
