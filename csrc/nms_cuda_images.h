// The tensors of a batch as the NMS kernels read and write them.
#pragma once

#include "nms_cuda_overlap.h"

namespace retinanet {

template <typename T>
struct NmsImages {
  const Box<T>* boxes;    // [N, C]
  const int64_t* order;   // [N, C] or null
  const int64_t* count;   // [N] or null
  const int64_t* labels;  // [N, C] or null
  int64_t candidates;

  // The number of candidates of an image, clamped to C.
  __device__ __forceinline__ int64_t size(int64_t image) const {
    return count && count[image] < candidates ? count[image] : candidates;
  }

  // The row of the image's candidate that is c-th in order, or -1 if there is none.
  __device__ __forceinline__ int64_t row(int64_t image, int64_t c) const {
    if (!order) return c;
    const int64_t i = order[image * candidates + c];
    return i >= 0 && i < candidates ? i : -1;
  }

  // The box in a row of an image.
  __device__ __forceinline__ NmsBox<T> load(int64_t image, int64_t i) const {
    const int64_t place = image * candidates + i;
    const Box<T> box = boxes[place];
    return {box, area(box), labels ? labels[place] : 0};
  }

  // Leaves out the first images.
  void skip(int64_t images) {
    boxes += images * candidates;
    if (order) order += images * candidates;
    if (count) count += images;
    if (labels) labels += images * candidates;
  }
};

// What a kernel has decided about an image so far.
struct NmsProgress {
  int64_t size = 0;     // boxes kept
  bool capped = false;  // a cap has excluded a candidate that nothing suppresses
};

// Whether no later candidate can change the result.
template <typename T>
__device__ __forceinline__ bool is_complete(const NmsProgress& progress, const NmsRules<T>& rules) {
  return progress.capped && progress.size == rules.max_detections;
}

// Where the detections of all images are written.
struct NmsOutputs {
  int64_t* index;   // [N, max_detections]
  int64_t* count;   // [N]
  bool* truncated;  // [N] or null

  // Marks the unused slots of an image, and writes its count and flag. All threads of one block
  // must call it.
  template <typename T>
  __device__ __forceinline__ void finish(int64_t image, const NmsRules<T>& rules,
                                         const NmsProgress& progress) const {
    for (int64_t slot = progress.size + threadIdx.x; slot < rules.max_detections;
         slot += blockDim.x)
      index[image * rules.max_detections + slot] = -1;
    if (threadIdx.x != 0) return;
    count[image] = progress.size;
    if (truncated) truncated[image] = progress.capped;
  }

  // Leaves out the first images.
  void skip(int64_t images, int64_t max_detections) {
    index += images * max_detections;
    count += images;
    if (truncated) truncated += images;
  }
};

}  // namespace retinanet
