// Matching on CUDA.
//
// Work: one thread per anchor, blockIdx.y per image; ground truths pass through shared memory in
// tiles.  The first kernel finds the best IoU of each ground truth (a maximum of float bits, which
// order like integers: atomicMax is exact and its result does not depend on order), the second each
// anchor's match, label and the count of positives. Bytes moved per anchor: 16 read in each pass (0
// with a grid, whose boxes are computed), 4 + 4 written. Determinism: integer atomics only.
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

// What both kernels read.
template <typename T>
struct Batch {
  Anchors<T> anchors;
  int64_t num_anchors;
  const Box<T>* gt_boxes;
  const int64_t* gt_count;
  int max_gt;
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
__global__ void __launch_bounds__(kThreads)
    best_of_gts_kernel(Batch<T> batch, Bits<T>* __restrict__ best) {
  __shared__ Tile<T> tile;
  __shared__ Bits<T> tile_best[kTile];
  const int64_t image = blockIdx.y, a = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool active = a < batch.num_anchors;
  const Box<T> anchor = active ? batch.anchors(image, a) : Box<T>{0, 0, 0, 0};
  const T anchor_area = area(anchor);
  const int num_gt = int(clamp_count(batch.gt_count[image], batch.max_gt));
  for (int first = 0; first < num_gt; first += kTile) {
    const int size = min(kTile, num_gt - first);
    for (int i = threadIdx.x; i < size; i += kThreads) tile_best[i] = 0;
    load_tile(tile, batch.gt_boxes + image * batch.max_gt, first, size);
    for (int i = 0; i < size; ++i) {
      T overlap = tile.valid[i] ? iou(tile.box[i], tile.area[i], anchor, anchor_area) : T(0);
      if (!__any_sync(kFullMask, overlap > T(0))) continue;
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2)
        overlap = larger(overlap, __shfl_xor_sync(kFullMask, overlap, offset));
      if (threadIdx.x % kWarp == 0) atomicMax(&tile_best[i], to_bits(overlap));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kThreads)
      if (tile_best[i] != 0) atomicMax(&best[image * batch.max_gt + first + i], tile_best[i]);
    __syncthreads();
  }
}

// `labels` is null when the caller has no labels, `crowd_count` when there are no crowds.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    assign_kernel(Batch<T> batch, MatchRules<T> rules, const Bits<T>* __restrict__ best,
                  const int64_t* __restrict__ gt_labels, const Box<T>* __restrict__ crowds,
                  const int64_t* __restrict__ crowd_count, int max_crowd, int* __restrict__ matches,
                  int* __restrict__ labels, int* __restrict__ num_positive) {
  __shared__ Tile<T> tile;
  __shared__ T tile_best[kTile];
  const int64_t image = blockIdx.y, a = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool active = a < batch.num_anchors;
  const Box<T> anchor = active ? batch.anchors(image, a) : Box<T>{0, 0, 0, 0};
  const T anchor_area = area(anchor);
  const int num_gt = int(clamp_count(batch.gt_count[image], batch.max_gt));
  AnchorMatch<T> state;
  for (int first = 0; first < num_gt; first += kTile) {
    const int size = min(kTile, num_gt - first);
    if (rules.low_quality != LowQuality::kOff) {
      for (int i = threadIdx.x; i < size; i += kThreads)
        tile_best[i] = from_bits(best[image * batch.max_gt + first + i]);
    }
    load_tile(tile, batch.gt_boxes + image * batch.max_gt, first, size);
    for (int i = 0; i < size; ++i) {
      if (!tile.valid[i]) continue;
      const T best_of_gt = rules.low_quality != LowQuality::kOff ? tile_best[i] : T(0);
      state.visit(first + i, iou(tile.box[i], tile.area[i], anchor, anchor_area), best_of_gt,
                  rules);
    }
    __syncthreads();
  }
  int match = state.match(rules);
  const int64_t num_crowd = crowd_count ? clamp_count(crowd_count[image], max_crowd) : 0;
  for (int64_t k = 0; match == kBackground && k < num_crowd; ++k)
    if (in_crowd(anchor, crowds[image * max_crowd + k], rules.crowd_ioa)) match = kIgnored;
  if (active) {
    matches[image * batch.num_anchors + a] = match;
    if (labels) {
      labels[image * batch.num_anchors + a] =
          match >= 0 ? int(gt_labels[image * batch.max_gt + match]) : match;
    }
  }
  const int positive = block_sum<kThreads>(active && match >= 0 ? 1 : 0);
  if (threadIdx.x == 0 && positive > 0) atomicAdd(&num_positive[image], positive);
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
    const Batch<T> batch{args.anchors.view<T>("assign_targets"), count, data<Box<T>>(args.gt_boxes),
                         data<int64_t>(args.gt_count), int(args.max_gt)};
    const dim3 grid(unsigned(ceil_div(count, kThreads)), unsigned(args.images));
    const ScalarType bits = std::is_same_v<T, double> ? ScalarType::Long : ScalarType::Int;
    Tensor best = torch::stable::new_zeros(gt_boxes, {args.images, args.max_gt}, bits);
    if (args.low_quality != LowQuality::kOff && args.max_gt > 0)
      launch(best_of_gts_kernel<T>, grid, kThreads, 0, scope, batch, data<Bits<T>>(best));
    launch(assign_kernel<T>, grid, kThreads, 0, scope, batch, rules,
           data<Bits<T>>(std::as_const(best)), data<int64_t>(args.gt_labels),
           data<Box<T>>(args.crowd_boxes), data<int64_t>(args.crowd_count), int(args.max_crowd),
           data<int>(matches), gt_labels ? data<int>(labels) : nullptr, data<int>(num_positive));
  });
  return {matches, labels, num_positive};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("assign_targets", TORCH_BOX(&assign_targets_cuda));
}

}  // namespace retinanet
