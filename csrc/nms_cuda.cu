// NMS on CUDA.
//
// Work: one block of 1,024 threads per image decides the image's candidates in order, a chunk of
// 256 at a time, as nms_cuda_rounds.h describes:
//
//     candidates    | chunk 0 | chunk 1 | chunk 2 | ...       best first
//
// It ends as soon as the last slot is filled and one more survivor has shown that a cap was hit.
// Bytes moved: each candidate is read once, and each kept box is written once and read once per
// later chunk. No candidates x candidates matrix exists. Deterministic, see nms_cuda_rounds.h.
#include "nms_cuda_rounds.h"

namespace retinanet {
namespace {

template <typename T>
struct NmsImages {
  const Box<T>* boxes;    // [N, C]
  const int64_t* order;   // [N, C] or null
  const int64_t* count;   // [N]
  const int64_t* labels;  // [N, C] or null
  int64_t candidates;
};

// Where the detections of all images are written. `index` has a row of max_detections slots for
// each image, and so has `kept`, the kept boxes.
template <typename T>
struct NmsOutputs {
  int64_t* index;
  int64_t* count;
  bool* truncated;
  NmsBox<T>* kept;
};

// Marks the unused slots of an image, and writes its count and flag. All threads must call it.
template <typename T>
__device__ __forceinline__ void finish_image(const NmsOutputs<T>& out, const NmsRules<T>& rules,
                                             const NmsProgress& progress) {
  const int64_t image = blockIdx.x;
  for (int64_t slot = progress.size + threadIdx.x; slot < rules.max_detections; slot += blockDim.x)
    out.index[image * rules.max_detections + slot] = -1;
  if (threadIdx.x == 0) {
    out.count[image] = progress.size;
    out.truncated[image] = progress.capped;
  }
}

// 128-bit accesses: 2 loads, 2 stores
template <typename T>
__global__ void __launch_bounds__(NmsRounds<T>::kThreads)
    nms_kernel(NmsImages<T> images, NmsRules<T> rules, NmsOutputs<T> out) {
  __shared__ NmsRounds<T> shared;
  constexpr int kChunk = NmsRounds<T>::kChunk;
  const int64_t image = blockIdx.x, candidates = images.candidates,
                row = image * rules.max_detections;
  const int64_t count = images.count[image] < candidates ? images.count[image] : candidates;
  NmsProgress progress;
  for (int64_t first = 0; first < count && !is_complete(progress, rules); first += kChunk) {
    // Each of the first 256 threads takes a candidate of the chunk.
    const int64_t c = first + threadIdx.x;
    int64_t i = -1;
    NmsBox<T> mine{};
    if (threadIdx.x < kChunk && c < count)
      i = images.order ? images.order[image * candidates + c] : c;
    const bool exists = i >= 0 && i < candidates;
    if (exists) {
      mine.box = images.boxes[image * candidates + i];
      mine.area = area(mine.box);
      if (images.labels) mine.label = images.labels[image * candidates + i];
    }
    const int64_t slot = decide_chunk(shared, rules, mine, exists, out.kept + row, progress);
    if (slot >= 0) out.index[row + slot] = i;
  }
  finish_image(out, rules, progress);
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
    const int64_t kept_shape[] = {args.images, max_detections, NmsBox<T>::kBytes};
    Tensor kept_boxes = torch::stable::new_empty(boxes, kept_shape, ScalarType::Byte);
    const NmsImages<T> images{data<Box<T>>(args.boxes), data<int64_t>(args.order),
                              data<int64_t>(args.count), data<int64_t>(args.labels),
                              args.candidates};
    const NmsOutputs<T> out{data<int64_t>(index), data<int64_t>(kept), data<bool>(truncated),
                            data<NmsBox<T>>(kept_boxes)};
    launch("nms_kernel", nms_kernel<T>, unsigned(args.images), NmsRounds<T>::kThreads, 0, scope,
           images, rules, out);
  });
  return {index, kept, truncated};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("nms_sorted", TORCH_BOX(&nms_sorted_cuda));
}

}  // namespace retinanet
