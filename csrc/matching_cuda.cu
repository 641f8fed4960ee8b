// Matching on CUDA.
//
// Work: one thread per anchor, blockIdx.y per image; ground truths pass through shared memory in
// tiles.  The first kernel gives each anchor its match by the thresholds, and finds the best IoU of
// each ground truth: a maximum of float bits, which order like integers, so that atomicMax is exact
// and its result does not depend on order.  It keeps the upper 16 bits of each block's own maxima,
// by which the second kernel knows the few blocks that may hold a best anchor, and applies the
// low-quality rule there.
//
// 16 bits miss no block: a block that holds a ground truth's best anchor has the maximum over all
// anchors for its own, so the upper bits are equal too.  Where they are equal by chance (maxima
// within a 128th, of float64 a 16th), the block is visited in vain: the rule itself compares whole
// IoUs.
//
// Bytes moved per anchor: 16 read (0 with a grid, whose boxes are computed), 4 written, and 4 with
// labels.  With a low-quality rule, 2 more are written and read for each block and ground truth:
// M / 128 per anchor, which with the atomics is a tenth of the 4 written at M = 46.  Blocks that
// may hold a best anchor read their anchors again: one or two for each ground truth if anchors come
// in a grid's order, which is an eighth of the 16 at 160000 anchors and M = 50.
//
// Determinism: integer atomics only.
#include "cuda.h"
#include "matching.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;  // ground truths in shared memory

__device__ __forceinline__ unsigned to_bits(float v) { return __float_as_uint(v); }
__device__ __forceinline__ unsigned long long to_bits(double v) { return __double_as_longlong(v); }
__device__ __forceinline__ float from_bits(unsigned v) { return __uint_as_float(v); }
__device__ __forceinline__ double from_bits(unsigned long long v) {
  return __longlong_as_double(v);
}

template <typename T>
using Bits = std::conditional_t<std::is_same_v<T, double>, unsigned long long, unsigned>;

// By this a block's maximum is compared with that of all.
template <typename T>
__device__ __forceinline__ uint16_t upper_16(T bits) {
  return uint16_t(bits >> (8 * sizeof(T) - 16));
}

// What both kernels read.
template <typename T>
struct Batch {
  Anchors<T> anchors;
  int64_t num_anchors;
  const Box<T>* gt_boxes;
  const int64_t* gt_labels;  // null without labels
  const int64_t* gt_count;
  int max_gt;
  MatchRules<T> rules;
};

// What both kernels write.
struct Targets {
  int* matches;
  int* labels;  // null without labels
  int* num_positive;
};

template <typename T>
struct Crowds {
  const Box<T>* boxes;
  const int64_t* count;  // null without crowds
  int max;
};

template <typename T>
struct Tile {
  Box<T> box[kTile];
  T area[kTile];
  bool valid[kTile];
};

// Loads ground truths first .. first + size - 1 of the image; ends with a barrier.
template <typename T>
__device__ __forceinline__ void load_tile(Tile<T>& tile, const Box<T>* boxes, int first, int size) {
  for (int i = threadIdx.x; i < size; i += kThreads) {
    tile.box[i] = boxes[first + i];
    tile.area[i] = area(tile.box[i]);
    tile.valid[i] = is_valid(tile.box[i]);
  }
  __syncthreads();
}

template <typename T>
__device__ __forceinline__ void write_target(const Targets& targets, const Batch<T>& batch,
                                             int64_t image, int64_t anchor, int match) {
  const int64_t i = image * batch.num_anchors + anchor;
  targets.matches[i] = match;
  if (targets.labels)
    targets.labels[i] = match >= 0 ? int(batch.gt_labels[image * batch.max_gt + match]) : match;
}

// Adds the threads for which `positive` holds to the image's count.  All threads must call it.
__device__ __forceinline__ void count_positive(const Targets& targets, int64_t image,
                                               bool positive) {
  const int count = block_sum<kThreads>(positive ? 1 : 0);
  if (threadIdx.x == 0 && count > 0) atomicAdd(&targets.num_positive[image], count);
}

// `best` [N, M] starts as 0; `block_best` is [N, blocks, M].  Both are null if no promote_kernel
// follows.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    assign_kernel(Batch<T> batch, Crowds<T> crowds, Targets targets, Bits<T>* __restrict__ best,
                  uint16_t* __restrict__ block_best) {
  __shared__ Tile<T> tile;
  __shared__ Bits<T> tile_best[kTile];  // over the anchors of this block
  const MatchRules<T>& rules = batch.rules;
  const bool low_quality = rules.low_quality != LowQuality::kOff;
  const int64_t image = blockIdx.y, a = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool active = a < batch.num_anchors;
  const Box<T> anchor = active ? batch.anchors(image, a) : Box<T>{0, 0, 0, 0};
  const T anchor_area = area(anchor);
  const int num_gt = int(clamp_count(batch.gt_count[image], batch.max_gt));
  const int64_t block_row = (image * gridDim.x + blockIdx.x) * batch.max_gt;
  AnchorMatch<T> state;
  for (int first = 0; first < num_gt; first += kTile) {
    const int size = min(kTile, num_gt - first);
    for (int i = threadIdx.x; i < size; i += kThreads) tile_best[i] = 0;
    load_tile(tile, batch.gt_boxes + image * batch.max_gt, first, size);
    for (int i = 0; i < size; ++i) {
      if (!tile.valid[i]) continue;
      T overlap = iou(tile.box[i], tile.area[i], anchor, anchor_area);
      state.visit(first + i, overlap);
      if (!low_quality || !__any_sync(kFullMask, overlap > T(0))) continue;
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2)
        overlap = larger(overlap, __shfl_xor_sync(kFullMask, overlap, offset));
      if (threadIdx.x % kWarp == 0) atomicMax(&tile_best[i], to_bits(overlap));
    }
    __syncthreads();
    for (int i = threadIdx.x; low_quality && i < size; i += kThreads) {
      block_best[block_row + first + i] = upper_16(tile_best[i]);
      if (rules.promotes(from_bits(tile_best[i])))
        atomicMax(&best[image * batch.max_gt + first + i], tile_best[i]);
    }
    __syncthreads();
  }
  int match = state.match_by_iou(rules);
  const int64_t num_crowd = crowds.count ? clamp_count(crowds.count[image], crowds.max) : 0;
  for (int64_t k = 0; match == kBackground && k < num_crowd; ++k)
    if (in_crowd(anchor, crowds.boxes[image * crowds.max + k], rules.crowd_ioa)) match = kIgnored;
  if (active) write_target(targets, batch, image, a, match);
  count_positive(targets, image, active && match >= 0);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    promote_kernel(Batch<T> batch, const Bits<T>* __restrict__ best,
                   const uint16_t* __restrict__ block_best, Targets targets) {
  __shared__ Tile<T> tile;
  __shared__ T tile_best[kTile];  // over all anchors of the image
  const MatchRules<T>& rules = batch.rules;
  const int64_t image = blockIdx.y, a = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int num_gt = int(clamp_count(batch.gt_count[image], batch.max_gt));
  best += image * batch.max_gt;
  block_best += (image * gridDim.x + blockIdx.x) * batch.max_gt;
  bool may_hold_best = false;
  for (int i = threadIdx.x; i < num_gt; i += kThreads)
    may_hold_best |= block_best[i] == upper_16(best[i]) && rules.promotes(from_bits(best[i]));
  if (!__syncthreads_or(may_hold_best)) return;  // the whole block

  const bool active = a < batch.num_anchors;
  const Box<T> anchor = active ? batch.anchors(image, a) : Box<T>{0, 0, 0, 0};
  const T anchor_area = area(anchor);
  AnchorMatch<T> state;
  for (int first = 0; first < num_gt; first += kTile) {
    const int size = min(kTile, num_gt - first);
    for (int i = threadIdx.x; i < size; i += kThreads) tile_best[i] = from_bits(best[first + i]);
    load_tile(tile, batch.gt_boxes + image * batch.max_gt, first, size);
    for (int i = 0; i < size; ++i) {
      if (!tile.valid[i]) continue;
      const T overlap = iou(tile.box[i], tile.area[i], anchor, anchor_area);
      state.visit(first + i, overlap);
      state.promote(first + i, overlap, tile_best[i], rules);
    }
    __syncthreads();
  }
  const bool promoted = active && state.promoted >= 0;
  if (promoted) write_target(targets, batch, image, a, state.match(rules));
  count_positive(targets, image, promoted && state.match_by_iou(rules) < 0);
}

std::tuple<Tensor, Tensor, Tensor> assign_targets_cuda(
    const Tensor& anchors, std::vector<int64_t> grid_sizes, std::vector<double> grid_steps,
    const Tensor& gt_boxes, std::optional<Tensor> gt_labels, const Tensor& gt_count,
    std::optional<Tensor> crowd_boxes, std::optional<Tensor> crowd_count, double fg_iou,
    double bg_iou, std::string low_quality, double low_quality_min_iou, double crowd_ioa) {
  const CudaScope scope(gt_boxes);
  const MatchArguments args(anchors, grid_sizes, grid_steps, gt_boxes, gt_labels, gt_count,
                            crowd_boxes, crowd_count, low_quality, "assign_targets");
  const int64_t count = args.anchors.count;
  check(args.images <= 65535, "assign_targets: expected at most 65535 images, got ", args.images);
  Tensor matches = torch::stable::new_empty(gt_boxes, {args.images, count}, ScalarType::Int);
  Tensor labels =
      torch::stable::new_empty(gt_boxes, {args.images, gt_labels ? count : 0}, ScalarType::Int);
  Tensor num_positive = torch::stable::new_zeros(gt_boxes, {args.images}, ScalarType::Int);
  if (args.images == 0 || count == 0) return {matches, labels, num_positive};
  dispatch_compute(gt_boxes.scalar_type(), "assign_targets", [&](auto zero) {
    using T = decltype(zero);
    const MatchRules<T> rules{T(fg_iou), T(bg_iou), T(low_quality_min_iou), T(crowd_ioa),
                              args.low_quality};
    const Batch<T> batch{args.anchors.view<T>("assign_targets"),
                         count,
                         data<Box<T>>(args.gt_boxes),
                         data<int64_t>(args.gt_labels),
                         data<int64_t>(args.gt_count),
                         int(args.max_gt),
                         rules};
    const Crowds<T> crowds{data<Box<T>>(args.crowd_boxes), data<int64_t>(args.crowd_count),
                           int(args.max_crowd)};
    const Targets targets{data<int>(matches), gt_labels ? data<int>(labels) : nullptr,
                          data<int>(num_positive)};
    const dim3 grid(unsigned(ceil_div(count, kThreads)), unsigned(args.images));
    const ScalarType bits = std::is_same_v<T, double> ? ScalarType::Long : ScalarType::Int;
    const bool promotes = args.low_quality != LowQuality::kOff && args.max_gt > 0;
    std::optional<Tensor> best, block_best;
    if (promotes) {
      best = torch::stable::new_zeros(gt_boxes, {args.images, args.max_gt}, bits);
      block_best =
          torch::stable::new_empty(gt_boxes, {args.images, grid.x, args.max_gt}, ScalarType::Short);
    }
    launch("assign_kernel", assign_kernel<T>, grid, kThreads, 0, scope, batch, crowds, targets,
           promotes ? data<Bits<T>>(*best) : nullptr,
           promotes ? data<uint16_t>(*block_best) : nullptr);
    if (promotes)
      launch("promote_kernel", promote_kernel<T>, grid, kThreads, 0, scope, batch,
             data<Bits<T>>(best), data<uint16_t>(block_best), targets);
  });
  return {matches, labels, num_positive};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("assign_targets", TORCH_BOX(&assign_targets_cuda));
}

}  // namespace retinanet
