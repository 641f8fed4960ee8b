// Matching on CUDA. blockIdx.y is the image.
//
// Work: one thread per anchor. A block takes its anchors through the ground truths of the image
// tile by tile:
//
//   ground truths            0 ......... 127   128 ....... 255   ...
//                          +---------------+-----------------+---
//   anchors    0 ..  255   | tile          | tile            |        block 0
//                          +---------------+-----------------+---
//            256 ..  511   | tile          | tile            |        block 1
//                          +---------------+-----------------+---
//
// The ground truths of a tile are in shared memory. Each thread visits them in order, but the block
// skips those that cannot change the result of any of its anchors: a ground truth that does not
// touch the anchors' bounds, or that is so much larger or smaller than all of them that every IoU
// is too low (matching_cuda_tile.h).
//
// On a grid there are two kernels:
//   grid_best_kernel  A warp per ground truth finds its best IoU. It looks at the few anchors that
//                     matching_grid_reach.h leaves.
//   assign_kernel     Decides everything, since the best IoUs are known.
// With explicit anchors there are two others:
//   assign_kernel     Matches each anchor by the thresholds, and finds the best IoU of each ground
//                     truth.
//   promote_kernel    Applies the low-quality rule, in the few blocks that may hold a best anchor.
//
// The best IoU is a maximum of float bits. The bits of IoUs, which are not negative, have the order
// of integers, so atomicMax is exact and its result does not depend on the order of the blocks.
//
// assign_kernel stores the upper 16 bits of each block's own maxima, and promote_kernel visits the
// blocks where these bits equal those of the maximum over all anchors. No block is missed, because
// a block that holds a ground truth's best anchor has the overall maximum as its own. Upper bits
// that are equal by chance (maxima within a 128th of each other, a 16th in float64) only cost a
// visit, because the rule itself compares whole IoUs. With more than kMaxStored ground truths,
// nothing is stored and every block is visited.
//
// Bytes moved per anchor: 16 read (0 with a grid, whose boxes are computed), 4 written, and 4 more
// written with labels. With a low-quality rule, explicit anchors also write and read 2 bytes per
// block and ground truth, which is M / 128 bytes per anchor each way. With the atomics, this adds a
// tenth to the 4 bytes written at M = 46. The blocks that may hold a best anchor read their anchors
// again. If the anchors are in the order of a grid, there are one or two such blocks per ground
// truth. At 160,000 anchors and M = 50, this adds an eighth to the 16 bytes read.
//
// Deterministic: the only atomics are on integers.
#include "matching_cuda_tile.h"
#include "matching_grid_reach.h"

namespace retinanet {
namespace {

constexpr int64_t kMaxStored = 1024;  // ground truths of which blocks store their maxima

// The bits of a number as an unsigned integer.
__device__ __forceinline__ unsigned to_bits(float v) { return __float_as_uint(v); }
__device__ __forceinline__ unsigned long long to_bits(double v) { return __double_as_longlong(v); }

template <typename T>
using Bits = std::conditional_t<std::is_same_v<T, double>, unsigned long long, unsigned>;

// The upper 16 bits of an IoU: enough to rule out blocks that cannot hold the overall maximum.
template <typename T>
__device__ __forceinline__ uint16_t upper_16(T bits) {
  return uint16_t(bits >> (8 * sizeof(T) - 16));
}

// The crowd boxes of the batch.
template <typename T>
struct Crowds {
  const Box<T>* boxes;   // [N, max]
  const int64_t* count;  // null without crowds
  int max;
};

// Writes the match of an anchor, and its label and statistics where they are asked for.
template <typename T>
__device__ __forceinline__ void write_target(const MatchOutputs<T>& out, const MatchBatch<T>& batch,
                                             int64_t image, int64_t anchor, int match,
                                             const AnchorMatch<T>& state) {
  const int64_t i = image * batch.num_anchors + anchor;
  out.matches[i] = match;
  if (out.labels)
    out.labels[i] = match >= 0 ? int(batch.gt_labels[image * batch.max_gt + match]) : match;
  if (!out.ious) return;
  out.ious[i] = state.matched_iou(batch.rules, batch.best_of(image));
  if (match >= 0) atomicAdd(&out.gt_positives[image * batch.max_gt + match], 1);
}

// Finds the best ground truth of a promoted anchor, where the tiles may have skipped it.
//
// By torchvision's rule, a promoted anchor is matched to the ground truth of its own highest IoU.
// The tiles may have skipped that ground truth only if the IoU is below bg_iou.
template <typename T>
__device__ __forceinline__ void rescan_own_best(const MatchBatch<T>& batch, int64_t image,
                                                const Box<T>& anchor, AnchorMatch<T>& state) {
  if (state.promoted < 0 || state.best_iou >= batch.rules.bg_iou ||
      batch.rules.low_quality != LowQuality::kTorchvision)
    return;
  const int num_gt = batch.num_gt(image);
  state.best_iou = -1;  // start anew, so that the first one wins a tie
  for (int gt = 0; gt < num_gt; ++gt) {
    const Box<T> box = batch.gt_boxes[image * batch.max_gt + gt];
    if (is_valid(box)) state.visit(gt, iou(box, area(box), anchor, area(anchor)));
  }
}

// Adds the number of threads with `positive` to the image's count. All threads must call it.
template <typename T>
__device__ __forceinline__ void count_positive(const MatchOutputs<T>& out, int64_t image,
                                               bool positive) {
  const int count = block_sum<kThreads>(positive ? 1 : 0);
  if (threadIdx.x == 0 && count > 0) atomicAdd(&out.num_positive[image], count);
}

// Finds the best IoU of each ground truth over the anchors of a grid. Each warp takes one ground
// truth, and its lanes divide the base anchors of a level among them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    grid_best_kernel(const __grid_constant__ MatchBatch<T> batch) {
  const int64_t image = blockIdx.y;
  const int gt = int(blockIdx.x) * (kThreads / kWarp) + int(threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (gt >= batch.max_gt) return;  // in all lanes of a warp alike
  const Grid& grid = batch.anchors.grid;
  const auto* base_anchors = static_cast<const float*>(batch.anchors.data);
  const Box<T> box = batch.gt_boxes[image * batch.max_gt + gt];
  const T box_area = area(box);
  const bool valid = gt < batch.num_gt(image) && is_valid(box);
  T best = 0;
  const auto visit = [&](int level, const float* base, int64_t y, int64_t x) {
    const Box<float> a = grid.box(level, base, y, x);
    const Box<T> anchor{T(a.x1), T(a.y1), T(a.x2), T(a.y2)};
    best = max_of(best, iou(box, box_area, anchor, area(anchor)));
  };
  // Calls f(level, base, reach) for the base anchors of this lane.
  const auto for_bases = [&](auto&& f) {
    for (int level = 0; valid && level < grid.levels; ++level) {
      for (int b = lane; b < grid.per_cell[level]; b += kWarp) {
        const float* base = base_anchors + 4 * (grid.base[level] + b);
        const BaseReach reach(grid, level, base);
        f(level, base, BoxReach(reach, box));
      }
    }
  };
  // First visit, for each base anchor, the cell whose anchor is closest to the ground truth by
  // centre. The best of these IoUs is close to the best of all.
  for_bases([&](int level, const float* base, const BoxReach& reach) {
    int64_t y, x;
    if (reach.nearest(y, x)) visit(level, base, y, x);
  });
  // Then visit every anchor that can reach this IoU. No other can be better.
  const float lower_bound = max_of(float(warp_max(best)), std::numeric_limits<float>::min());
  for_bases([&](int level, const float* base, const BoxReach& reach) {
    reach.for_rows(reach.intersection_for_iou(lower_bound), {0, grid.height[level]},
                   [&](int64_t y, Span columns) {
                     for (int64_t x = columns.begin; x < columns.end; ++x) visit(level, base, y, x);
                   });
  });
  best = warp_max(best);
  if (lane == 0) batch.best[image * batch.max_gt + gt] = best;
}

// Matches the anchors.
//
// With kBestKnown, batch.best is given (null if not needed), and the kernel decides everything.
// Without kBestKnown, the kernel decides by the thresholds alone. It also finds batch.best, which
// must be zeroed, and stores the upper bits of each block's own best in block_best [N, blocks, M].
// Either pointer may be null.
// 128-bit accesses: 1 load, 0 stores
template <typename T, bool kBestKnown>
__global__ void __launch_bounds__(kThreads)
    assign_kernel(const __grid_constant__ MatchBatch<T> batch, Crowds<T> crowds,
                  MatchOutputs<T> out, uint16_t* __restrict__ block_best) {
  __shared__ GroundTruthTile<T> tile;
  __shared__ Bits<T> tile_best[kTile];  // best IoUs over the anchors of this block
  const MatchRules<T>& rules = batch.rules;
  const bool find_best = !kBestKnown && batch.best;
  const int64_t image = blockIdx.y, a = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool active = a < batch.num_anchors;
  const Box<T> anchor = active ? batch.anchors(image, a) : Box<T>{0, 0, 0, 0};
  const T anchor_area = area(anchor);
  const BlockBounds<T> bounds(anchor, anchor_area, active);
  // While the kernel finds the best IoUs, any IoU above 0 may be one.
  const T relevant_iou =
      find_best ? min_of(rules.bg_iou, std::numeric_limits<T>::min()) : rules.bg_iou;
  const int num_gt = batch.num_gt(image);
  const int64_t block_row = (image * gridDim.x + blockIdx.x) * batch.max_gt;
  AnchorMatch<T> state;
  for (int first = 0; first < num_gt; first += kTile) {
    const int size = min(kTile, num_gt - first);
    for (int i = threadIdx.x; find_best && i < size; i += kThreads) tile_best[i] = 0;
    // Load the tile, and find its ground truths that can matter to this block.
    tile.load(batch, image, kBestKnown ? batch.best_of(image) : nullptr, relevant_iou, first, size,
              bounds);
    tile.for_relevant([&](int i) {
      T pair_iou = iou(tile.box[i], tile.area[i], anchor, anchor_area);
      state.visit(first + i, pair_iou);
      if constexpr (kBestKnown) state.promote(first + i, pair_iou, tile.promoting_iou[i]);
      // Reduce the IoU over the warp, then over the block. Most warps have no overlap and skip it.
      if (!find_best || !__any_sync(kFullMask, pair_iou > T(0))) return;
      pair_iou = warp_max(pair_iou);
      if (threadIdx.x % kWarp == 0) atomicMax(&tile_best[i], to_bits(pair_iou));
    });
    __syncthreads();
    // Reduce the best of the block over all blocks.
    for (int i = threadIdx.x; find_best && i < size; i += kThreads) {
      if (block_best) block_best[block_row + first + i] = upper_16(tile_best[i]);
      if (tile_best[i] != 0)
        atomicMax(reinterpret_cast<Bits<T>*>(batch.best) + image * batch.max_gt + first + i,
                  tile_best[i]);
    }
    // The next tile needs no barrier before it is cleared: a thread clears only the elements of
    // tile_best that it alone has read here.
  }
  // Decide the match. A crowd box turns background into ignored.
  if constexpr (kBestKnown) rescan_own_best(batch, image, anchor, state);
  int match = state.match(rules);
  const int64_t num_crowd = crowds.count ? clamp_count(crowds.count[image], crowds.max) : 0;
  for (int64_t k = 0; match == kBackground && k < num_crowd; ++k)
    if (in_crowd(anchor, crowds.boxes[image * crowds.max + k], rules.crowd_ioa)) match = kIgnored;
  if (active) write_target(out, batch, image, a, match, state);
  count_positive(out, image, active && match >= 0);
}

// Applies the low-quality rule to the results of assign_kernel<T, false>. If block_best is null,
// all blocks visit their anchors.
// 128-bit accesses: 1 load, 0 stores
template <typename T>
__global__ void __launch_bounds__(kThreads)
    promote_kernel(const __grid_constant__ MatchBatch<T> batch,
                   const uint16_t* __restrict__ block_best, MatchOutputs<T> out) {
  __shared__ GroundTruthTile<T> tile;
  const MatchRules<T>& rules = batch.rules;
  const int64_t image = blockIdx.y, a = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int num_gt = batch.num_gt(image);
  const T* best = batch.best_of(image);
  // Return if no ground truth that promotes can have its best anchor in this block.
  if (block_best) block_best += (image * gridDim.x + blockIdx.x) * batch.max_gt;
  bool may_hold_best = !block_best;
  for (int i = threadIdx.x; block_best && i < num_gt; i += kThreads)
    may_hold_best |=
        block_best[i] == upper_16(to_bits(best[i])) && rules.promoting_iou(best[i]) >= T(0);
  if (!__syncthreads_or(may_hold_best)) return;  // the whole block

  // Visit the ground truths again, with the best IoUs known.
  const bool active = a < batch.num_anchors;
  const Box<T> anchor = active ? batch.anchors(image, a) : Box<T>{0, 0, 0, 0};
  const T anchor_area = area(anchor);
  const BlockBounds<T> bounds(anchor, anchor_area, active);
  AnchorMatch<T> state;
  for (int first = 0; first < num_gt; first += kTile) {
    const int size = min(kTile, num_gt - first);
    tile.load(batch, image, best, rules.bg_iou, first, size, bounds);
    tile.for_relevant([&](int i) {
      const T pair_iou = iou(tile.box[i], tile.area[i], anchor, anchor_area);
      state.visit(first + i, pair_iou);
      state.promote(first + i, pair_iou, tile.promoting_iou[i]);
    });
    __syncthreads();
  }
  // Replace the results of promoted anchors.
  const bool promoted = active && state.promoted >= 0;
  const int before = state.match_by_iou(rules);
  if (promoted) {
    rescan_own_best(batch, image, anchor, state);
    if (out.ious && before >= 0) atomicAdd(&out.gt_positives[image * batch.max_gt + before], -1);
    write_target(out, batch, image, a, state.match(rules), state);
  }
  count_positive(out, image, promoted && before < 0);
}

// Launches the kernels for the anchors of a grid.
template <typename T>
void match_grid(const MatchBatch<T>& batch, const Crowds<T>& crowds, const MatchOutputs<T>& out,
                dim3 blocks, const CudaScope& scope) {
  if (batch.best) {
    const unsigned warps = kThreads / kWarp;
    launch("grid_best_kernel", grid_best_kernel<T>,
           dim3(unsigned(ceil_div(batch.max_gt, warps)), blocks.y), kThreads, 0, scope, batch);
  }
  launch("assign_kernel", assign_kernel<T, true>, blocks, kThreads, 0, scope, batch, crowds, out,
         nullptr);
}

// Launches the kernels for explicit anchors. `like` is a tensor on the device.
template <typename T>
void match_boxes(const MatchBatch<T>& batch, const Crowds<T>& crowds, const MatchOutputs<T>& out,
                 dim3 blocks, bool promotes, const Tensor& like, const CudaScope& scope) {
  // With more ground truths, block_best would take more memory than matches and labels.
  const bool store = batch.best && batch.max_gt <= kMaxStored;
  std::optional<Tensor> block_best;
  if (store)
    block_best =
        torch::stable::new_empty(like, {blocks.y, blocks.x, batch.max_gt}, ScalarType::Short);
  uint16_t* block_best_data = store ? data<uint16_t>(*block_best) : nullptr;
  launch("assign_kernel", assign_kernel<T, false>, blocks, kThreads, 0, scope, batch, crowds, out,
         block_best_data);
  if (promotes)
    launch("promote_kernel", promote_kernel<T>, blocks, kThreads, 0, scope, batch, block_best_data,
           out);
}

MatchResults assign_targets_cuda(const Tensor& anchors, std::vector<int64_t> grid_sizes,
                                 std::vector<double> grid_steps, const Tensor& gt_boxes,
                                 std::optional<Tensor> gt_labels, const Tensor& gt_count,
                                 std::optional<Tensor> crowd_boxes,
                                 std::optional<Tensor> crowd_count, double fg_iou, double bg_iou,
                                 std::string low_quality, double low_quality_min_iou,
                                 double crowd_ioa, bool statistics) {
  const CudaScope scope("assign_targets", gt_boxes, anchors, gt_labels, gt_count, crowd_boxes,
                        crowd_count);
  const MatchArguments args(anchors, grid_sizes, grid_steps, gt_boxes, gt_labels, gt_count,
                            crowd_boxes, crowd_count, low_quality, "assign_targets");
  check_batch("assign_targets", args.images);
  MatchResults results = args.empty_results(statistics);
  auto& [matches, labels, num_positive, ious, best_ious, gt_positives] = results;
  torch::stable::fill_(num_positive, 0);
  torch::stable::fill_(best_ious, 0);
  torch::stable::fill_(gt_positives, 0);
  const int64_t count = args.anchors.count;
  if (args.images == 0 || count == 0) return results;
  dispatch_compute(gt_boxes.scalar_type(), "assign_targets", [&](auto zero) {
    using T = decltype(zero);
    const MatchRules<T> rules{T(fg_iou), T(bg_iou), T(low_quality_min_iou), T(crowd_ioa),
                              args.low_quality};
    const bool on_grid = args.anchors.grid.levels > 0;
    const bool promotes = args.low_quality != LowQuality::kOff && args.max_gt > 0;
    const bool find_best = (promotes || statistics) && args.max_gt > 0;
    std::optional<Tensor> best;
    if (find_best) {
      best = statistics ? best_ious
             : on_grid  ? torch::stable::new_empty(gt_boxes, {args.images, args.max_gt})
                        : torch::stable::new_zeros(gt_boxes, {args.images, args.max_gt});
    }
    const MatchBatch<T> batch{args.anchors.view<T>("assign_targets"),
                              count,
                              data<Box<T>>(args.gt_boxes),
                              data<int64_t>(args.gt_labels),
                              data<int64_t>(args.gt_count),
                              int(args.max_gt),
                              rules,
                              best ? data<T>(*best) : nullptr};
    const Crowds<T> crowds{data<Box<T>>(args.crowd_boxes), data<int64_t>(args.crowd_count),
                           int(args.max_crowd)};
    const MatchOutputs<T> out = args.outputs<T>(results, statistics);
    const dim3 blocks(unsigned(ceil_div(count, kThreads)), unsigned(args.images));
    if (on_grid)
      match_grid(batch, crowds, out, blocks, scope);
    else
      match_boxes(batch, crowds, out, blocks, promotes, gt_boxes, scope);
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("assign_targets", TORCH_BOX(&assign_targets_cuda));
}

}  // namespace retinanet
