// dense_box_loss on CUDA. blockIdx.y is the image.
//
// Forward: each thread takes kAnchorsPerThread anchors.
// Backward: a block takes a tile of kAnchorsPerBlock anchors. It reads their matches into shared
// memory, in anchor order. Its threads then take the anchors in the order in which the gradients
// are in memory, so that neighbouring threads write neighbouring addresses:
//
//   anchor order, here with anchors a, b, c in each cell; the tile may begin and end within a cell
//       a0 b0 c0   a1 b1 c1   a2 b2 c2   a3 b3 c3   a4 b4 c4   ...
//             |<----------- tile ----------->|
//   order of the threads in a contiguous level, whose planes hold the cells of one channel
//       -  a1 a2 a3   -  b1 b2 b3   c0 c1 c2  -       (-: in the cells, but not in the tile)
//   order of the threads in a channels_last level: the anchor order
//
// Bytes moved per anchor: both passes read 4 for the match, and the backward pass writes the
// gradient once, zeros included. Deltas are read only for anchors with a ground truth.
// Deterministic: each thread adds its anchors in order, a block adds its threads by shuffles, and a
// second kernel adds the blocks. Sums over anchors are in float64.
#include "common/cuda.h"
#include "common/partial_sums.h"
#include "dense_box_loss.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;
constexpr int kAnchorsPerThread = 8;    // forward
constexpr int kAnchorsPerBlock = 2048;  // backward

// The four gradients of an anchor. If they are side by side in memory, they are stored with one
// access (two for float64).
template <typename T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Quad {
  T v[4];
};

// Sums the losses of each block's anchors into `partial` [N, blocks].
template <typename T, BoxLossKind kKind>
__global__ void __launch_bounds__(kThreads)
    dense_box_loss_kernel(const __grid_constant__ BoxLossInputs<T> inputs, BoxLoss<Compute<T>> rule,
                          double* __restrict__ partial) {
  using C = Compute<T>;
  const int64_t image = blockIdx.y;
  const int* matches = inputs.matches + image * inputs.num_anchors;
  double sum = 0;
  for (int k = 0; k < kAnchorsPerThread; ++k) {
    // Neighbouring threads read neighbouring matches.
    const int64_t anchor = (int64_t(blockIdx.x) * kAnchorsPerThread + k) * kThreads + threadIdx.x;
    if (anchor >= inputs.num_anchors || matches[anchor] < 0) continue;
    inputs.visit_match(image, anchor, matches[anchor],
                       [&](const Box<C>& delta, const Box<C>& box, const Box<C>& gt, int, int64_t,
                           int64_t) { sum += rule.template loss<kKind>(delta, box, gt); });
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[image * gridDim.x + blockIdx.x] = sum;
}

// Writes the gradient of every anchor, times the image's `grad`.
template <typename T, BoxLossKind kKind>
__global__ void __launch_bounds__(kThreads)
    dense_box_loss_backward_kernel(const __grid_constant__ BoxLossInputs<T> inputs,
                                   BoxLoss<Compute<T>> rule, const Compute<T>* __restrict__ grad,
                                   const __grid_constant__ LevelOutputs<T> out) {
  using C = Compute<T>;
  // The tile is anchors [begin, end) of the image. Read their matches.
  __shared__ int matches[kAnchorsPerBlock];
  const int64_t image = blockIdx.y, begin = int64_t(blockIdx.x) * kAnchorsPerBlock;
  const int64_t end = min_of(begin + kAnchorsPerBlock, inputs.num_anchors);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads)
    matches[i - begin] = inputs.matches[image * inputs.num_anchors + i];
  __syncthreads();
  // Go through the levels that hold a part of the tile, anchors [from, to).
  const HeadLevels<T>& levels = inputs.levels;
  for (int l = levels.level_of(4 * begin); l < levels.count; ++l) {
    const HeadLevel<T>& level = levels.level[l];
    const int64_t first = level.first / 4, per_cell = level.channels / 4;
    const int64_t from = max_of(begin, first), to = min_of(end, first + level.size() / 4);
    if (from >= to) continue;
    // Take whole cells, including the first and the last, of which the tile may hold only a part.
    const int64_t first_cell = (from - first) / per_cell;
    const int64_t cells = (to - 1 - first) / per_cell - first_cell + 1;
    for (int64_t q = threadIdx.x; q < cells * per_cell; q += kThreads) {
      // The q-th anchor of the cells in memory order. If it is outside the tile, another block
      // writes its gradient.
      const int64_t in_cells = level.channels_last ? q : q % cells * per_cell + q / cells;
      const int64_t anchor = first + first_cell * per_cell + in_cells;
      if (anchor < from || anchor >= to) continue;
      // Compute the gradient, which is 0 for an anchor without a ground truth.
      const int match = matches[anchor - begin];
      Quad<T> result{{T(C(0)), T(C(0)), T(C(0)), T(C(0))}};
      if (match >= 0) {
        inputs.visit_match(
            image, anchor, match,
            [&](const Box<C>& delta, const Box<C>& box, const Box<C>& gt, int, int64_t, int64_t) {
              const Box<C> g = rule.template grad<kKind>(delta, box, gt, grad[image]);
              result = {{T(g.x1), T(g.y1), T(g.x2), T(g.y2)}};
            });
      }
      // Write the gradient in the layout of the deltas: side by side, or in four planes.
      int64_t offset, step;
      inputs.place(image, anchor, offset, step);
      T* target = out.data[l] + offset;
      if (step == 1) {
        *reinterpret_cast<Quad<T>*>(target) = result;
        continue;
      }
#pragma unroll
      for (int d = 0; d < 4; ++d) target[d * step] = result.v[d];
    }
  }
}

Tensor dense_box_loss_cuda(std::vector<Tensor> box_deltas, const Tensor& anchors,
                           std::vector<int64_t> grid_sizes, std::vector<double> grid_steps,
                           const Tensor& gt_boxes, const Tensor& matches, std::string kind,
                           double beta, std::vector<double> weights,
                           std::optional<double> max_log_ratio, double offset) {
  const CudaScope scope("dense_box_loss", matches, box_deltas, anchors, gt_boxes);
  const DenseBoxLossArguments args(box_deltas, anchors, grid_sizes, grid_steps, gt_boxes, matches,
                                   "dense_box_loss");
  const int64_t images = args.heads.images;
  check_batch("dense_box_loss", images);
  Tensor out = torch::stable::new_empty(gt_boxes, {images});
  if (images == 0) return out;
  if (args.anchors.count == 0) return torch::stable::fill_(out, 0);
  dispatch_floating(args.heads.dtype(), "dense_box_loss", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const auto rule = BoxLoss<C>::make(weights, beta, max_log_ratio, offset, "dense_box_loss");
    const BoxLossInputs<T> inputs = args.inputs<T>("dense_box_loss");
    const int64_t blocks = ceil_div(args.anchors.count, kThreads * kAnchorsPerThread);
    Tensor partial = torch::stable::new_empty(gt_boxes, {images, blocks}, ScalarType::Double);
    dispatch_box_loss(kind, "dense_box_loss", [&](auto kind_constant) {
      launch("dense_box_loss_kernel", dense_box_loss_kernel<T, decltype(kind_constant)::value>,
             dim3(unsigned(blocks), unsigned(images)), kThreads, 0, scope, inputs, rule,
             data<double>(partial));
    });
    launch("sum_partials_kernel", sum_partials_kernel<C>, unsigned(images), kSumThreads, 0, scope,
           data<double>(partial), blocks, data<C>(out));
  });
  return out;
}

std::vector<Tensor> dense_box_loss_backward_cuda(
    const Tensor& grad, std::vector<Tensor> box_deltas, const Tensor& anchors,
    std::vector<int64_t> grid_sizes, std::vector<double> grid_steps, const Tensor& gt_boxes,
    const Tensor& matches, std::string kind, double beta, std::vector<double> weights,
    std::optional<double> max_log_ratio, double offset) {
  const CudaScope scope("dense_box_loss_backward", matches, grad, box_deltas, anchors, gt_boxes);
  const DenseBoxLossArguments args(box_deltas, anchors, grid_sizes, grid_steps, gt_boxes, matches,
                                   "dense_box_loss_backward");
  args.heads.check_grad(grad, "dense_box_loss_backward");
  const int64_t images = args.heads.images;
  check_batch("dense_box_loss_backward", images);
  const Tensor scales = contiguous_aligned(grad);
  std::vector<Tensor> out = args.heads.empty_like();
  if (images == 0 || args.anchors.count == 0) return out;
  dispatch_floating(args.heads.dtype(), "dense_box_loss_backward", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const auto rule =
        BoxLoss<C>::make(weights, beta, max_log_ratio, offset, "dense_box_loss_backward");
    const BoxLossInputs<T> inputs = args.inputs<T>("dense_box_loss_backward");
    LevelOutputs<T> grads;
    for (size_t l = 0; l < out.size(); ++l) grads.data[l] = data<T>(out[l]);
    dispatch_box_loss(kind, "dense_box_loss_backward", [&](auto kind_constant) {
      launch("dense_box_loss_backward_kernel",
             dense_box_loss_backward_kernel<T, decltype(kind_constant)::value>,
             dim3(unsigned(ceil_div(args.anchors.count, kAnchorsPerBlock)), unsigned(images)),
             kThreads, 0, scope, inputs, rule, data<C>(scales), grads);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("dense_box_loss", TORCH_BOX(&dense_box_loss_cuda));
  m.impl("dense_box_loss_backward", TORCH_BOX(&dense_box_loss_backward_cuda));
}

}  // namespace retinanet
