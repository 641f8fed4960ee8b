// NMS on CUDA.
//
// Work: one block per image walks its candidates, in order, in chunks of one candidate per thread.
// A chunk is first compared with all boxes kept so far, which pass through shared memory in tiles;
// then each surviving thread records which later candidates of the chunk it would suppress, as a
// bit mask in shared memory, and thread 0 resolves the masks in order.  The walk ends as soon as
// the last slot is filled and one more survivor has shown that a cap was hit. Bytes moved: each
// candidate and each kept box once per chunk; nothing is ever N x N. Deterministic: no atomics,
// everything is resolved in candidate order.
#include "common/cuda.h"
#include "nms.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = kThreads / 32;

template <typename T>
struct NmsImages {
  const Box<T>* boxes;    // [N, C]
  const int64_t* order;   // [N, C] or null
  const int64_t* count;   // [N]
  const int64_t* labels;  // [N, C] or null
  int64_t candidates;
};

__device__ __forceinline__ bool bit(const unsigned* words, int i) {
  return words[i / 32] >> (i % 32) & 1u;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    nms_kernel(NmsImages<T> images, NmsRules<T> rules, Box<T>* __restrict__ kept_boxes,
               int64_t* __restrict__ kept_labels, int64_t* __restrict__ index,
               int64_t* __restrict__ kept_count, bool* __restrict__ truncated) {
  __shared__ Box<T> tile[kThreads];
  __shared__ int64_t tile_label[kThreads];
  __shared__ unsigned hits[kThreads]
                          [kWords];  // later candidates of the chunk that this one suppresses
  __shared__ unsigned same[kThreads]
                          [kWords];   // earlier candidates of the chunk of this one's class
  __shared__ int64_t room[kThreads];  // kept boxes that this one's class may still take
  __shared__ unsigned alive[kWords], chosen[kWords];
  __shared__ int64_t size;
  __shared__ bool capped;

  const int64_t image = blockIdx.x, candidates = images.candidates,
                row = image * rules.max_detections;
  const int64_t count = images.count[image] < candidates ? images.count[image] : candidates;
  const int t = threadIdx.x;
  if (t == 0) {
    size = 0;
    capped = false;
  }
  __syncthreads();

  for (int64_t first = 0; first < count; first += kThreads) {
    // All threads must agree on leaving: `size` and `capped` only change between the barriers
    // below.
    if (size == rules.max_detections && capped) break;
    const int64_t kept_before = size;
    const int64_t c = first + t;
    const int64_t i = c >= count ? -1 : images.order ? images.order[image * candidates + c] : c;
    bool active = i >= 0 && i < candidates;
    const Box<T> box = active ? images.boxes[image * candidates + i] : Box<T>{0, 0, 0, 0};
    const T box_area = area(box);
    const int64_t label = active && images.labels ? images.labels[image * candidates + i] : 0;
    int64_t of_class = 0;

    for (int64_t start = 0; start < kept_before; start += kThreads) {
      __syncthreads();
      if (start + t < kept_before) {
        tile[t] = kept_boxes[row + start + t];
        tile_label[t] = kept_labels[row + start + t];
      }
      __syncthreads();
      const int tile_size = int(kept_before - start < kThreads ? kept_before - start : kThreads);
      for (int k = 0; active && k < tile_size; ++k) {
        const bool rival = tile_label[k] == label;
        of_class += rival;
        if ((rival || rules.class_agnostic) &&
            rules.suppresses(tile[k], area(tile[k]), box, box_area))
          active = false;
      }
    }

    const unsigned warp_alive = __ballot_sync(kFullMask, active);
    __syncthreads();
    tile[t] = box;
    tile_label[t] = label;
    room[t] = rules.max_per_class > 0 ? rules.max_per_class - of_class : candidates;
    if (t % kWarp == 0) alive[t / kWarp] = warp_alive;
    __syncthreads();
    for (int w = 0; w < kWords; ++w) {
      unsigned hit = 0, peer = 0;
      for (int b = 0; active && b < 32; ++b) {
        const int other = w * 32 + b;
        if (!bit(alive, other)) continue;
        const bool rival = tile_label[other] == label;
        if (other < t && rival) peer |= 1u << b;
        if (other > t && (rival || rules.class_agnostic) &&
            rules.suppresses(box, box_area, tile[other], area(tile[other])))
          hit |= 1u << b;
      }
      hits[t][w] = hit;
      same[t][w] = peer;
    }
    __syncthreads();

    if (t == 0) {
      for (int w = 0; w < kWords; ++w) chosen[w] = 0;
      int64_t total = kept_before;
      for (int w = 0; w < kWords && !(capped && total == rules.max_detections); ++w) {
        // A later word of `alive` may lose bits to an earlier candidate, hence the re-read in each
        // step.
        for (unsigned left = alive[w]; left != 0; left = alive[w] & left & (left - 1)) {
          const int k = w * 32 + __ffs(int(left)) - 1;
          int peers = 0;
          for (int v = 0; v < kWords; ++v) peers += __popc(same[k][v] & chosen[v]);
          if (peers >= room[k]) {
            capped = true;
            continue;
          }
          if (total == rules.max_detections) {
            capped = true;
            break;
          }
          ++total;
          chosen[w] |= 1u << (k % 32);
          for (int v = w; v < kWords; ++v) alive[v] &= ~hits[k][v];
        }
      }
      size = total;
    }
    __syncthreads();

    if (bit(chosen, t)) {
      int64_t slot = kept_before + __popc(chosen[t / 32] & ((1u << (t % 32)) - 1));
      for (int w = 0; w < t / 32; ++w) slot += __popc(chosen[w]);
      kept_boxes[row + slot] = box;
      kept_labels[row + slot] = label;
      index[row + slot] = i;
    }
    // No barrier here: what this writes is read behind the next one.
  }

  for (int64_t slot = size + t; slot < rules.max_detections; slot += kThreads)
    index[row + slot] = -1;
  if (t == 0) {
    kept_count[image] = size;
    truncated[image] = capped;
  }
}

std::tuple<Tensor, Tensor, Tensor> nms_sorted_cuda(const Tensor& boxes, std::optional<Tensor> order,
                                                   const Tensor& count,
                                                   std::optional<Tensor> labels,
                                                   double iou_threshold, int64_t max_detections,
                                                   int64_t max_per_class, bool class_agnostic) {
  const CudaScope scope(boxes);
  const NmsArguments args(boxes, order, count, labels, max_detections);
  Tensor index = torch::stable::new_empty(boxes, {args.images, max_detections}, ScalarType::Long);
  Tensor kept = torch::stable::new_empty(boxes, {args.images}, ScalarType::Long);
  Tensor truncated = torch::stable::new_empty(boxes, {args.images}, ScalarType::Bool);
  if (args.images == 0) return {index, kept, truncated};
  dispatch_compute(boxes.scalar_type(), "nms_sorted", [&](auto zero) {
    using T = decltype(zero);
    const NmsRules<T> rules{T(iou_threshold), max_detections, max_per_class, class_agnostic};
    Tensor kept_boxes = torch::stable::new_empty(boxes, {args.images, max_detections, 4});
    Tensor kept_labels =
        torch::stable::new_empty(boxes, {args.images, max_detections}, ScalarType::Long);
    const NmsImages<T> images{data<Box<T>>(args.boxes), data<int64_t>(args.order),
                              data<int64_t>(args.count), data<int64_t>(args.labels),
                              args.candidates};
    launch("nms_kernel", nms_kernel<T>, unsigned(args.images), kThreads, 0, scope, images, rules,
           data<Box<T>>(kept_boxes), data<int64_t>(kept_labels), data<int64_t>(index),
           data<int64_t>(kept), data<bool>(truncated));
  });
  return {index, kept, truncated};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("nms_sorted", TORCH_BOX(&nms_sorted_cuda));
}

}  // namespace retinanet
