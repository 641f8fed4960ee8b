// NMS on the CPU: images in parallel. Within an image, candidates are visited in the given order.
// Each is compared with the kept boxes of its class that are near it.
#include <algorithm>

#include "nms_cpu_image.h"
#include "nms_cpu_rank.h"

namespace retinanet {
namespace {

std::tuple<Tensor, Tensor, Tensor> nms_sorted_cpu(const Tensor& boxes, std::optional<Tensor> order,
                                                  const Tensor& count, std::optional<Tensor> labels,
                                                  double iou_threshold, int64_t max_detections,
                                                  int64_t max_per_class, bool class_agnostic) {
  const NmsArguments args(boxes, order, count, labels, max_detections);
  Tensor index = torch::stable::new_empty(boxes, {args.images, max_detections}, ScalarType::Long);
  Tensor kept = torch::stable::new_empty(boxes, {args.images}, ScalarType::Long);
  Tensor truncated = torch::stable::new_empty(boxes, {args.images}, ScalarType::Bool);
  dispatch_compute(boxes.scalar_type(), "nms_sorted", [&](auto zero) {
    using T = decltype(zero);
    const NmsRules<T> rules{T(iou_threshold), max_detections, max_per_class, class_agnostic};
    const int64_t candidates = args.candidates;
    const int64_t *counts = data<int64_t>(args.count), *orders = data<int64_t>(args.order),
                  *classes = data<int64_t>(args.labels);
    torch::stable::parallel_for(0, args.images, 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        int64_t* row = data<int64_t>(index) + n * max_detections;
        const int64_t valid = std::clamp<int64_t>(counts[n], 0, candidates);
        const Box<T>* image = data<Box<T>>(args.boxes) + n * candidates;
        const int64_t* order = orders ? orders + n * candidates : nullptr;
        const int64_t* labels = classes ? classes + n * candidates : nullptr;
        bool* cut = data<bool>(truncated) + n;
        int64_t size = 0;
        vectorised([&](auto) ALWAYS_INLINE {
          size = nms_image(rules, image, order, labels, candidates, valid, row, cut);
        });
        std::fill(row + size, row + max_detections, -1);
        data<int64_t>(kept)[n] = size;
      }
    });
  });
  return {index, kept, truncated};
}

std::tuple<Tensor, Tensor> rank_scores_cpu(const Tensor& scores, std::optional<Tensor> counts) {
  const RankArguments args(scores, counts);
  const int64_t images = args.images, candidates = args.candidates;
  Tensor order = torch::stable::new_empty(scores, {images, candidates}, ScalarType::Long);
  Tensor valid = torch::stable::new_empty(scores, {images}, ScalarType::Long);
  dispatch_floating(scores.scalar_type(), "rank_scores", [&](auto zero) {
    using T = decltype(zero);
    const int64_t* limits = data<int64_t>(args.counts);
    torch::stable::parallel_for(0, images, 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const int64_t count = limits ? std::clamp<int64_t>(limits[n], 0, candidates) : candidates;
        data<int64_t>(valid)[n] = rank_scores(data<T>(args.scores) + n * candidates, candidates,
                                              count, data<int64_t>(order) + n * candidates);
      }
    });
  });
  return {order, valid};
}

std::tuple<Tensor, Tensor> batched_nms_padded_cpu(const Tensor& boxes, const Tensor& scores,
                                                  std::optional<Tensor> labels,
                                                  std::optional<Tensor> counts,
                                                  double iou_threshold, int64_t max_detections) {
  const PaddedNmsArguments args(boxes, scores, labels, counts, max_detections);
  const auto [order, valid] = rank_scores_cpu(args.scores, args.counts);
  auto [index, count, truncated] = nms_sorted_cpu(args.boxes, order, valid, args.labels,
                                                  iou_threshold, max_detections, 0, false);
  return {index, count};
}

// Checks the arguments of nms: one list of candidates.
void check_nms_list(const Tensor& boxes, const Tensor& scores,
                    const std::optional<Tensor>& labels) {
  check(scores.dim() == 1, "nms: scores must have shape [C], got ", shape(scores));
  const int64_t candidates = scores.size(0);
  check_shape(boxes, {candidates, 4}, "nms", "boxes");
  if (labels) {
    check_shape(*labels, {candidates}, "nms", "labels");
    check_dtype(*labels, ScalarType::Long, "nms", "labels");
  }
  check(candidates <= std::numeric_limits<uint32_t>::max(),
        "nms: expected fewer than 2^32 candidates, got ", candidates);
}

// The elements of a tensor of at most two dimensions in order, as V: its own memory if it is
// contiguous and aligned, else a copy in `buffer`. For short lists, calling PyTorch for the copy
// would take longer than NMS.
template <typename V, typename T>
const V* packed(const Tensor& t, std::vector<V>& buffer) {
  if (t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % alignof(V) == 0)
    return data<V>(t);
  const int64_t rows = t.size(0), columns = t.dim() > 1 ? t.size(1) : 1;
  const int64_t row_stride = t.stride(0), column_stride = t.dim() > 1 ? t.stride(1) : 0;
  buffer.resize(rows * columns * sizeof(T) / sizeof(V));
  T* to = reinterpret_cast<T*>(buffer.data());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) *to++ = data<T>(t)[r * row_stride + c * column_stride];
  return buffer.data();
}

Tensor nms_cpu(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> labels,
               double iou_threshold) {
  check_nms_list(boxes, scores, labels);
  const int64_t candidates = boxes.size(0);
  std::vector<int64_t> order(candidates), index(candidates);
  int64_t valid = 0, size = 0;
  dispatch_floating(scores.scalar_type(), "nms", [&](auto zero) {
    using S = decltype(zero);
    std::vector<S> buffer;
    valid = rank_scores(packed<S, S>(scores, buffer), candidates, candidates, order.data());
  });
  dispatch_compute(boxes.scalar_type(), "nms", [&](auto zero) {
    using T = decltype(zero);
    std::vector<Box<T>> box_buffer;
    std::vector<int64_t> label_buffer;
    const Box<T>* list = packed<Box<T>, T>(boxes, box_buffer);
    const int64_t* classes = labels ? packed<int64_t, int64_t>(*labels, label_buffer) : nullptr;
    const NmsRules<T> rules{T(iou_threshold), candidates, 0, false};
    bool truncated = false;
    vectorised([&](auto) ALWAYS_INLINE {
      size = nms_image(rules, list, order.data(), classes, candidates, valid, index.data(),
                       &truncated);
    });
  });
  Tensor kept = empty_tensor(boxes, {size}, ScalarType::Long);
  std::copy_n(index.data(), size, data<int64_t>(kept));
  return kept;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("rank_scores", TORCH_BOX(&rank_scores_cpu));
  m.impl("nms_sorted", TORCH_BOX(&nms_sorted_cpu));
  m.impl("batched_nms_padded", TORCH_BOX(&batched_nms_padded_cpu));
  m.impl("nms", TORCH_BOX(&nms_cpu));
}

}  // namespace retinanet
