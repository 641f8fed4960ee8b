// dense_box_loss on CUDA. blockIdx.y is the image.
//
// Forward: each thread takes kAnchorsPerThread anchors.
// Backward: a block takes a tile of kTileAnchors anchors of one level. It zeroes the tile's
// gradients in packs, and then writes the gradients of the few anchors that have a match.
//
//   anchor order, here with anchors a, b, c in each cell; the tile may begin and end within a cell
//       a0 b0 c0   a1 b1 c1   a2 b2 c2   a3 b3 c3   a4 b4 c4   ...
//             |<----------- tile ----------->|
//   the tile in a contiguous level, whose planes hold the cells of one channel: a run of each plane
//       a1 a2 a3     four times, once per delta
//       b1 b2 b3     four times
//       c0 c1 c2     four times
//   the tile in a channels_last level: one run, in anchor order
//
// Bytes moved per anchor: the forward pass reads 4 for the match and writes one bit of `matched`.
// The backward pass reads the bit, and writes the gradient once, zeros included. Anchors with a
// match have it and their deltas read in addition, and their gradient written again.
// Deterministic: each thread adds its anchors in order, a block adds its threads by shuffles, and a
// second kernel adds the blocks. Sums over anchors are in float64.
#include "common/cuda.h"
#include "common/partial_sums.h"
#include "dense_box_loss.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;
constexpr int kAnchorsPerThread = 8;  // forward
constexpr int kTileAnchors = 4096;    // backward
constexpr int kWarps = kThreads / kWarp;
static_assert(kWordAnchors == kWarp);  // one lane per anchor of a word
// A tile may begin and end within a word. Each thread of the block reads one word at most.
static_assert(kTileAnchors / kWordAnchors + 1 <= kThreads);

// The first block of each level, then the number of blocks. A block's tile lies in one level.
struct LevelTiles {
  unsigned first_block[kMaxLevels + 1];
};

// Sums the losses of each block's anchors into `partial` [N, blocks], and writes their bits into
// `matched` [N, words].
template <typename T, BoxLossKind kKind>
__global__ void __launch_bounds__(kThreads)
    dense_box_loss_kernel(const __grid_constant__ BoxLossInputs<T> inputs, BoxLoss<Compute<T>> rule,
                          double* __restrict__ partial, unsigned* __restrict__ matched) {
  using C = Compute<T>;
  const int64_t image = blockIdx.y, words = ceil_div(inputs.num_anchors, kWordAnchors);
  const int* matches = inputs.matches + image * inputs.num_anchors;
  // Neighbouring threads take neighbouring anchors.
  const int64_t first = int64_t(blockIdx.x) * kAnchorsPerThread * kThreads + threadIdx.x;
  unsigned mine = 0;  // which of this thread's anchors have a match
#pragma unroll
  for (int k = 0; k < kAnchorsPerThread; ++k) {
    const int64_t anchor = first + k * kThreads;
    mine |= unsigned(anchor < inputs.num_anchors && matches[anchor] >= 0) << k;
  }
#pragma unroll
  for (int k = 0; k < kAnchorsPerThread; ++k) {
    const int64_t anchor = first + k * kThreads;
    const unsigned bits = __ballot_sync(kFullMask, mine >> k & 1u);
    if (threadIdx.x % kWarp == 0 && anchor < inputs.num_anchors)
      matched[image * words + anchor / kWordAnchors] = bits;
  }
  double sum = 0;
  for (; mine != 0; mine &= mine - 1) {
    const int64_t anchor = first + (__ffs(int(mine)) - 1) * kThreads;
    inputs.visit_match(image, inputs.place(image, anchor), matches[anchor],
                       [&](const Box<C>& delta, const Box<C>& box, const Box<C>& gt) {
                         sum += rule.template loss<kKind>(delta, box, gt);
                       });
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[image * gridDim.x + blockIdx.x] = sum;
}

// Zeroes `size` elements at `p` with the lanes of a warp: whole packs, and single elements before
// and after them.
template <typename T>
__device__ __forceinline__ void zero_run(T* p, int size) {
  constexpr int kSize = Packed<T>::kSize;
  const int lane = threadIdx.x % kWarp;
  const int from_pack = int(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kSize);
  const int before = min((kSize - from_pack) % kSize, size);
  const int packs = (size - before) / kSize, after = before + packs * kSize;
  Packed<T> zeros;
#pragma unroll
  for (int i = 0; i < kSize; ++i) zeros.v[i] = T(0.f);
  for (int i = lane; i < packs; i += kWarp) store_packed(p + before + i * kSize, zeros);
  if (lane < before) p[lane] = T(0.f);
  if (lane < size - after) p[after + lane] = T(0.f);
}

// Zeroes the gradients of a level's anchors begin .. end - 1 in one image. Each warp takes a run.
template <typename T>
__device__ __forceinline__ void zero_tile(const HeadLevel<T>& level, const Divisor& by_per_cell,
                                          T* gradient, uint32_t begin, uint32_t end) {
  const int warp = threadIdx.x / kWarp;
  // The deltas of a level with a single cell lie in anchor order in both layouts.
  if (level.channels_last || level.area == 1) {
    // Cut the run into one part per warp, of whole packs.
    const int part =
        int(ceil_div(4 * int64_t(end - begin), kWarps * Packed<T>::kSize)) * Packed<T>::kSize;
    const int rest = int(4 * (end - begin)) - warp * part;
    if (rest > 0) zero_run(gradient + 4 * int64_t(begin) + warp * part, min(rest, part));
    return;
  }
  // The first anchors `begin` and `end` of the tile and of the next are in these cells, at these
  // places in the cell.
  const uint32_t per_cell = uint32_t(level.channels / 4);
  const uint32_t first_cell = by_per_cell.quotient(begin), end_cell = by_per_cell.quotient(end);
  const uint32_t first_a = begin - first_cell * per_cell, end_a = end - end_cell * per_cell;
  // A tile within one cell has anchors first_a .. end_a - 1 of it. Any other tile has the first
  // cell from anchor first_a on, the last cell up to anchor end_a, and all of the cells in between.
  const bool within_cell = first_cell == end_cell;
  const int64_t first_channel = within_cell ? 4 * int64_t(first_a) : 0;
  const int64_t end_channel = 4 * int64_t(within_cell ? end_a : per_cell);
  for (int64_t channel = first_channel + warp; channel < end_channel; channel += kWarps) {
    const uint32_t a = uint32_t(channel / 4);
    const uint32_t from = first_cell + (a < first_a ? 1 : 0), to = end_cell + (a < end_a ? 1 : 0);
    if (from < to) zero_run(gradient + channel * level.area + from, int(to - from));
  }
}

// Writes the gradient of every anchor, times the image's `grad`.
// 128-bit accesses: 0 loads, 1 store
template <typename T, BoxLossKind kKind>
__global__ void __launch_bounds__(kThreads, sizeof(Compute<T>) == 4 ? 4 : 2)
    dense_box_loss_backward_kernel(const __grid_constant__ BoxLossInputs<T> inputs,
                                   const unsigned* __restrict__ matched,
                                   const __grid_constant__ LevelTiles tiles,
                                   BoxLoss<Compute<T>> rule, const Compute<T>* __restrict__ grad,
                                   const __grid_constant__ LevelOutputs<T> out) {
  using C = Compute<T>;
  const int64_t image = blockIdx.y, words = ceil_div(inputs.num_anchors, kWordAnchors);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // The tile is anchors [begin, end) of level l, and [first, first + end - begin) of the image.
  int l = 0;
  while (blockIdx.x >= tiles.first_block[l + 1]) ++l;
  const HeadLevel<T>& level = inputs.levels.level[l];
  const uint32_t anchors = uint32_t(level.size() / 4);
  const uint32_t begin = (blockIdx.x - tiles.first_block[l]) * kTileAnchors;
  const uint32_t end = anchors - begin < kTileAnchors ? anchors : begin + kTileAnchors;
  const int64_t first = level.first / 4 + begin, first_word = first / kWordAnchors;
  // Read the words before the stores keep the memory busy. Lane i of a warp has the word
  // first_word + warp + i * kWarps, so that neighbouring words go to different warps.
  const int64_t word = first_word + warp + lane * kWarps;
  const unsigned bits =
      word * kWordAnchors < first + (end - begin) ? matched[image * words + word] : 0;
  zero_tile(level, inputs.by_per_cell[l], out.data[l] + image * level.size(), begin, end);
  // Write the other gradients over the zeros of this block, one word of anchors at a time.
  __syncthreads();
  for (unsigned left = __ballot_sync(kFullMask, bits != 0); left != 0; left &= left - 1) {
    const int from = __ffs(int(left)) - 1;
    const int64_t anchor = (first_word + warp + from * kWarps) * kWordAnchors + lane;
    const bool is_matched = __shfl_sync(kFullMask, bits, from) >> lane & 1u;
    // The word may have anchors of the neighbouring tiles.
    if (!is_matched || anchor < first || anchor >= first + (end - begin)) continue;
    const auto place = inputs.place_in_level(image, l, begin + uint32_t(anchor - first));
    inputs.visit_match(image, place, inputs.matches[image * inputs.num_anchors + anchor],
                       [&](const Box<C>& delta, const Box<C>& box, const Box<C>& gt) {
                         const Box<C> g = rule.template grad<kKind>(delta, box, gt, grad[image]);
                         T* to = out.data[l] + place.offset;
                         to[0] = T(g.x1);
                         to[place.step] = T(g.y1);
                         to[2 * place.step] = T(g.x2);
                         to[3 * place.step] = T(g.y2);
                       });
  }
}

std::tuple<Tensor, Tensor> dense_box_loss_cuda(
    std::vector<Tensor> box_deltas, const Tensor& anchors, std::vector<int64_t> grid_sizes,
    std::vector<double> grid_steps, const Tensor& gt_boxes, const Tensor& matches, std::string kind,
    double beta, std::vector<double> weights, std::optional<double> max_log_ratio, double offset) {
  const CudaScope scope("dense_box_loss", matches, box_deltas, anchors, gt_boxes);
  const DenseBoxLossArguments args(box_deltas, anchors, grid_sizes, grid_steps, gt_boxes, matches,
                                   "dense_box_loss");
  const int64_t images = args.heads.images;
  check_batch("dense_box_loss", images);
  Tensor out = torch::stable::new_empty(gt_boxes, {images});
  Tensor matched = args.new_matched();
  if (images == 0) return {out, matched};
  if (args.anchors.count == 0) return {torch::stable::fill_(out, 0), matched};
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
             data<double>(partial), data<unsigned>(matched));
    });
    launch("sum_partials_kernel", sum_partials_kernel<C>, unsigned(images), kSumThreads, 0, scope,
           data<double>(partial), blocks, data<C>(out));
  });
  return {out, matched};
}

std::vector<Tensor> dense_box_loss_backward_cuda(
    const Tensor& grad, std::vector<Tensor> box_deltas, const Tensor& anchors,
    std::vector<int64_t> grid_sizes, std::vector<double> grid_steps, const Tensor& gt_boxes,
    const Tensor& matches, const Tensor& matched, std::string kind, double beta,
    std::vector<double> weights, std::optional<double> max_log_ratio, double offset) {
  const CudaScope scope("dense_box_loss_backward", matches, matched, grad, box_deltas, anchors,
                        gt_boxes);
  const DenseBoxLossArguments args(box_deltas, anchors, grid_sizes, grid_steps, gt_boxes, matches,
                                   "dense_box_loss_backward");
  args.heads.check_grad(grad, "dense_box_loss_backward");
  args.check_matched(matched, "dense_box_loss_backward");
  const int64_t images = args.heads.images;
  check_batch("dense_box_loss_backward", images);
  const Tensor scales = contiguous_aligned(grad), all_words = contiguous_aligned(matched);
  std::vector<Tensor> out = args.heads.empty_like();
  if (images == 0 || args.anchors.count == 0) return out;
  dispatch_floating(args.heads.dtype(), "dense_box_loss_backward", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const auto rule =
        BoxLoss<C>::make(weights, beta, max_log_ratio, offset, "dense_box_loss_backward");
    const BoxLossInputs<T> inputs = args.inputs<T>("dense_box_loss_backward");
    LevelOutputs<T> grads;
    LevelTiles tiles{};
    for (size_t l = 0; l < out.size(); ++l) {
      grads.data[l] = data<T>(out[l]);
      tiles.first_block[l + 1] =
          tiles.first_block[l] +
          unsigned(ceil_div(inputs.levels.level[l].size() / 4, kTileAnchors));
    }
    dispatch_box_loss(kind, "dense_box_loss_backward", [&](auto kind_constant) {
      launch("dense_box_loss_backward_kernel",
             dense_box_loss_backward_kernel<T, decltype(kind_constant)::value>,
             dim3(tiles.first_block[out.size()], unsigned(images)), kThreads, 0, scope, inputs,
             data<unsigned>(all_words), tiles, rule, data<C>(scales), grads);
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
