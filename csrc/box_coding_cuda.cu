// encode_boxes, decode_boxes and clip_boxes on CUDA.
//
// Work: one thread per row, blockIdx.y is the image. A row is one 128-bit access (two for float64).
// Bytes moved per row in float32: 16 read for the row, 16 read for its anchor (0 with a grid), 16
// written. Deterministic: no row depends on another.
#include "box_coding.h"
#include "common/cuda.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Encode {
  Anchors<T> anchors;
  BoxCoder<T> coder;
  __device__ Box<T> operator()(int64_t image, int64_t row, const Box<T>& box) const {
    return coder.encode(box, anchors(image, row));
  }
};

template <typename T>
struct Clip {
  const T* limits;  // [N, 2] of (height, width), or null for no clipping
  __device__ Box<T> operator()(int64_t image, int64_t, const Box<T>& box) const {
    return limits ? clip(box, limits[2 * image], limits[2 * image + 1]) : box;
  }
};

template <typename T>
struct Decode {
  Anchors<T> anchors;
  BoxCoder<T> coder;
  Clip<T> clip;
  __device__ Box<T> operator()(int64_t image, int64_t row, const Box<T>& delta) const {
    return clip(image, row, coder.decode(delta, anchors(image, row)));
  }
};

// Sets out[i] to f(image, row, in[i]) for every row of every image.
// 128-bit accesses: 1 load, 1 store
// 128-bit loops: loads and stores
template <typename T, typename F>
__global__ void __launch_bounds__(kThreads)
    map_rows_kernel(const Box<T>* __restrict__ in, int64_t rows, F f, Box<T>* __restrict__ out) {
  const int64_t image = blockIdx.y;
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < rows;
       row += int64_t(gridDim.x) * kThreads) {
    // A copy of the whole box makes one wide access. Through the reference, f would load it
    // coordinate by coordinate.
    const Box<T> box = in[image * rows + row];
    out[image * rows + row] = f(image, row, box);
  }
}

template <typename T, typename F>
void map_rows(const char* op, const BoxRows& shape, const Tensor& in, const F& f, Tensor& out,
              const CudaScope& scope) {
  if (shape.images == 0 || shape.rows == 0) return;
  check_batch(op, shape.images);
  const dim3 grid(unsigned(std::min<int64_t>(ceil_div(shape.rows, kThreads), 1 << 20)),
                  unsigned(shape.images));
  launch("map_rows_kernel", map_rows_kernel<T, F>, grid, kThreads, 0, scope, data<Box<T>>(in),
         shape.rows, f, data<Box<T>>(out));
}

Tensor encode_boxes_cuda(const Tensor& boxes, const Tensor& anchors,
                         std::vector<int64_t> grid_sizes, std::vector<double> grid_steps,
                         std::vector<double> weights, double offset) {
  const CudaScope scope("encode_boxes", boxes, anchors);
  const BoxCodingArguments args(boxes, "boxes", anchors, grid_sizes, grid_steps, "encode_boxes");
  Tensor out = empty_tensor_like(args.rows);
  dispatch_compute(args.rows.scalar_type(), args.op, [&](auto zero) {
    using T = decltype(zero);
    const Encode<T> encode{args.anchors.view<T>(args.op),
                           box_coder<T>(weights, std::nullopt, std::nullopt, offset, args.op)};
    map_rows<T>(args.op, args.shape, args.rows, encode, out, scope);
  });
  return out;
}

Tensor decode_boxes_cuda(const Tensor& deltas, const Tensor& anchors,
                         std::vector<int64_t> grid_sizes, std::vector<double> grid_steps,
                         std::vector<double> weights, std::optional<double> min_log_ratio,
                         std::optional<double> max_log_ratio, double offset,
                         std::optional<Tensor> image_sizes) {
  const CudaScope scope("decode_boxes", deltas, anchors, image_sizes);
  const BoxCodingArguments args(deltas, "deltas", anchors, grid_sizes, grid_steps, "decode_boxes");
  if (image_sizes)
    check_image_sizes(*image_sizes, args.shape.images, deltas.scalar_type(), args.op);
  const std::optional<Tensor> sizes = contiguous_aligned(image_sizes);
  Tensor out = empty_tensor_like(args.rows);
  dispatch_compute(args.rows.scalar_type(), args.op, [&](auto zero) {
    using T = decltype(zero);
    const Decode<T> decode{args.anchors.view<T>(args.op),
                           box_coder<T>(weights, min_log_ratio, max_log_ratio, offset, args.op),
                           {data<T>(sizes)}};
    map_rows<T>(args.op, args.shape, args.rows, decode, out, scope);
  });
  return out;
}

Tensor clip_boxes_cuda(const Tensor& boxes, const Tensor& image_sizes) {
  const CudaScope scope("clip_boxes", boxes, image_sizes);
  const BoxRows shape(boxes, "clip_boxes", "boxes");
  check_image_sizes(image_sizes, shape.images, boxes.scalar_type(), "clip_boxes");
  const Tensor b = contiguous_aligned(boxes), sizes = contiguous_aligned(image_sizes);
  Tensor out = empty_tensor_like(b);
  dispatch_compute(b.scalar_type(), "clip_boxes", [&](auto zero) {
    using T = decltype(zero);
    map_rows<T>("clip_boxes", shape, b, Clip<T>{data<T>(sizes)}, out, scope);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("encode_boxes", TORCH_BOX(&encode_boxes_cuda));
  m.impl("decode_boxes", TORCH_BOX(&decode_boxes_cuda));
  m.impl("clip_boxes", TORCH_BOX(&clip_boxes_cuda));
}

}  // namespace retinanet
