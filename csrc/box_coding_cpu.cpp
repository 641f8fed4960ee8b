// encode_boxes, decode_boxes and clip_boxes on the CPU. Rows are independent of each other, so the
// results do not depend on the number of threads.
#include "box_coding.h"

namespace retinanet {
namespace {

constexpr int64_t kChunk = 4096;  // rows of a chunk at least

// Sets out[i] to f(image, row, in[i]) for every row of every image.
template <typename T, typename F>
void map_rows(const BoxRows& shape, const Tensor& in, Tensor& out, F&& f) {
  const Box<T>* source = data<Box<T>>(in);
  Box<T>* target = data<Box<T>>(out);
  torch::stable::parallel_for(0, shape.images * shape.rows, kChunk,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i)
                                  target[i] = f(i / shape.rows, i % shape.rows, source[i]);
                              });
}

Tensor encode_boxes_cpu(const Tensor& boxes, const Tensor& anchors, std::vector<int64_t> grid_sizes,
                        std::vector<double> grid_steps, std::vector<double> weights,
                        double offset) {
  const BoxCodingArguments args(boxes, "boxes", anchors, grid_sizes, grid_steps, "encode_boxes");
  Tensor out = empty_tensor_like(args.rows);
  dispatch_compute(args.rows.scalar_type(), args.op, [&](auto zero) {
    using T = decltype(zero);
    const Anchors<T> view = args.anchors.view<T>(args.op);
    const BoxCoder<T> coder = box_coder<T>(weights, std::nullopt, std::nullopt, offset, args.op);
    map_rows<T>(args.shape, args.rows, out, [&](int64_t image, int64_t row, const Box<T>& box) {
      return coder.encode(box, view(image, row));
    });
  });
  return out;
}

Tensor decode_boxes_cpu(const Tensor& deltas, const Tensor& anchors,
                        std::vector<int64_t> grid_sizes, std::vector<double> grid_steps,
                        std::vector<double> weights, std::optional<double> min_log_ratio,
                        std::optional<double> max_log_ratio, double offset,
                        std::optional<Tensor> image_sizes) {
  const BoxCodingArguments args(deltas, "deltas", anchors, grid_sizes, grid_steps, "decode_boxes");
  if (image_sizes)
    check_image_sizes(*image_sizes, args.shape.images, deltas.scalar_type(), args.op);
  const std::optional<Tensor> sizes = contiguous_aligned(image_sizes);
  Tensor out = empty_tensor_like(args.rows);
  dispatch_compute(args.rows.scalar_type(), args.op, [&](auto zero) {
    using T = decltype(zero);
    const Anchors<T> view = args.anchors.view<T>(args.op);
    const BoxCoder<T> coder = box_coder<T>(weights, min_log_ratio, max_log_ratio, offset, args.op);
    const T* limits = data<T>(sizes);
    map_rows<T>(args.shape, args.rows, out, [&](int64_t image, int64_t row, const Box<T>& delta) {
      const Box<T> box = coder.decode(delta, view(image, row));
      return limits ? clip(box, limits[2 * image], limits[2 * image + 1]) : box;
    });
  });
  return out;
}

Tensor clip_boxes_cpu(const Tensor& boxes, const Tensor& image_sizes) {
  const BoxRows shape(boxes, "clip_boxes", "boxes");
  check_image_sizes(image_sizes, shape.images, boxes.scalar_type(), "clip_boxes");
  const Tensor b = contiguous_aligned(boxes), sizes = contiguous_aligned(image_sizes);
  Tensor out = empty_tensor_like(b);
  dispatch_compute(b.scalar_type(), "clip_boxes", [&](auto zero) {
    using T = decltype(zero);
    const T* limits = data<T>(sizes);
    map_rows<T>(shape, b, out, [&](int64_t image, int64_t, const Box<T>& box) {
      return clip(box, limits[2 * image], limits[2 * image + 1]);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("encode_boxes", TORCH_BOX(&encode_boxes_cpu));
  m.impl("decode_boxes", TORCH_BOX(&decode_boxes_cpu));
  m.impl("clip_boxes", TORCH_BOX(&clip_boxes_cpu));
}

}  // namespace retinanet
