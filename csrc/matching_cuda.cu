// Matching on CUDA. blockIdx.y is the image.
//
// Work: two anchors per thread. A block takes its anchors (matching_cuda_anchors.h) through the
// ground truths of the image tile by tile:
//
//   ground truths            0 ......... 127   128 ....... 255   ...
//                          +---------------+-----------------+---
//   anchors    0 ..  255   | tile          | tile            |        block 0
//                          +---------------+-----------------+---
//            256 ..  511   | tile          | tile            |        block 1
//                          +---------------+-----------------+---
//
// The ground truths of a tile are in shared memory (matching_cuda_tile.h). Each thread visits them
// in order, but the block skips those that cannot change the result of any of its anchors: a ground
// truth that does not touch the anchors' bounds, or that is so much larger or smaller than all of
// them that every IoU is too low (matching_cuda_bounds.h).
//
// The kernels:
//   match_prepare_kernel  Clears the counts. On a grid, a warp per ground truth finds its best IoU.
//                         It looks at the few anchors that matching_grid_reach.h leaves
//                         (matching_cuda_prepare.h).
//   assign_kernel         On a grid, decides everything, since the best IoUs are known. With
//                         explicit anchors, matches each anchor by the thresholds, and finds the
//                         best IoU of each ground truth.
//   promote_kernel        With explicit anchors, applies the low-quality rule, in the few blocks
//                         that may hold a best anchor.
//   best_anchors_kernel and take_anchors_kernel
//                         With SSD's rule, run after assign_kernel, which then matches by the
//                         thresholds alone (matching_cuda_best_anchors.h).
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
#include "matching_cuda_best_anchors.h"
#include "matching_cuda_prepare.h"
#include "matching_cuda_tile.h"

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

// True if a crowd box of the image covers the anchor.
template <typename T>
__device__ __forceinline__ bool in_any_crowd(const Crowds<T>& crowds, int64_t image,
                                             const Box<T>& anchor, T threshold) {
  const int64_t count = crowds.count ? clamp_count(crowds.count[image], crowds.max) : 0;
  for (int64_t k = 0; k < count; ++k)
    if (in_crowd(anchor, crowds.boxes[image * crowds.max + k], threshold)) return true;
  return false;
}

// Finds the best ground truths of promoted anchors, where the tiles may have skipped them. All
// lanes of a warp must call it.
//
// By torchvision's rule, a promoted anchor is matched to the ground truth of its own highest IoU.
// The tiles may have skipped that ground truth only if the IoU is below bg_iou.
template <typename T>
__device__ __forceinline__ void rescan_own_best(const MatchBatch<T>& batch, int64_t image,
                                                const Box<T>& anchor, AnchorMatch<T>& match) {
  if (batch.rules.low_quality != LowQuality::kTorchvision) return;
  const int num_gt = batch.num_gt(image), lane = threadIdx.x % kWarp;
  const bool mine = match.promoted >= 0 && !(match.best_iou >= batch.rules.bg_iou);
  // The warp takes such an anchor after the other. Its lanes share the ground truths.
  for (unsigned left = __ballot_sync(kFullMask, mine); left != 0; left &= left - 1) {
    const int owner = __ffs(int(left)) - 1;
    const Box<T> box = {
        __shfl_sync(kFullMask, anchor.x1, owner), __shfl_sync(kFullMask, anchor.y1, owner),
        __shfl_sync(kFullMask, anchor.x2, owner), __shfl_sync(kFullMask, anchor.y2, owner)};
    const T box_area = area(box);
    AnchorMatch<T> found;
#pragma unroll 1
    for (int gt = lane; gt < num_gt; gt += kWarp) {
      const Box<T> gt_box = batch.gt_boxes[image * batch.max_gt + gt];
      if (is_valid(gt_box)) found.visit(gt, iou(gt_box, area(gt_box), box, box_area));
    }
    // The best of all lanes, the first one at a tie. The anchor's promoter is among the ground
    // truths, so the best IoU is not the -1 of a lane that has seen none.
    const T best_iou = warp_max(found.best_iou);
    const int candidate = found.best_iou == best_iou ? found.best : batch.max_gt;
    const int best = -warp_max(-candidate);
    if (lane == owner) {
      match.best_iou = best_iou;
      match.best = best;
    }
  }
}

// Matches the anchors.
//
// On a grid, batch.best is given (null if not needed), and the kernel decides everything. With
// explicit anchors, the kernel decides by the thresholds alone. It also finds batch.best, which
// must be zeroed, and stores the upper bits of each block's own best in block_best [N, blocks, M].
// Either pointer may be null.
// 128-bit accesses: 1 load, 0 stores
template <typename T, bool kOnGrid>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 8 : 4)
    assign_kernel(const __grid_constant__ MatchBatch<T> batch, Crowds<T> crowds,
                  MatchOutputs<T> out, uint16_t* __restrict__ block_best) {
  __shared__ GroundTruthTile<T> tile;
  __shared__ Bits<T> tile_best[kTile];  // best IoUs over the anchors of this block
  const MatchRules<T>& rules = batch.rules;
  const int64_t image = blockIdx.y;
  // Load the anchors, and find the bounds that hold for all of the block.
  BlockAnchors block;
  if constexpr (kOnGrid)
    block = BlockAnchors::of_grid(batch);
  else
    block = BlockAnchors::of_boxes(batch);
  ThreadAnchors<T> mine = ThreadAnchors<T>::template load<kOnGrid>(batch, image, block);
  BlockBounds<T> bounds;
  if constexpr (kOnGrid)
    bounds = BlockBounds<T>::of_cells(batch.anchors.grid, batch.level_bounds[block.level], block);
  else
    bounds = BlockBounds<T>::of_boxes(mine);
  // While the kernel finds the best IoUs, any IoU above 0 may be one.
  const bool find_best = !kOnGrid && batch.best;
  const T relevant_iou =
      find_best ? min_of(rules.bg_iou, std::numeric_limits<T>::min()) : rules.bg_iou;
  const bool zero_is_relevant = rules.zero_is_relevant();
  const int num_gt = batch.num_gt(image);
  const int64_t block_row = (image * gridDim.x + blockIdx.x) * batch.max_gt;
  for (int first = 0; first < num_gt; first += kTile) {
    const int size = min(kTile, num_gt - first);
    if (find_best) tile_best[threadIdx.x] = 0;
    // Load the tile, and find its ground truths that can matter to this block. Other threads may
    // still be reading the previous tile.
    if (first > 0) __syncthreads();
    tile.load(batch, image, kOnGrid ? batch.best_of(image) : nullptr, relevant_iou, first, size,
              bounds);
    tile.for_relevant([&](int i) {
      const T best = tile.visit(first, i, zero_is_relevant, mine);
      // Reduce the IoU over the warp, then over the block. Most warps have no overlap and skip it.
      if (!find_best || !__any_sync(kFullMask, best > T(0))) return;
      const Bits<T> warp_best = warp_max(to_bits(best));
      if (threadIdx.x % kWarp == 0) atomicMax(&tile_best[i], warp_best);
    });
    if (!find_best) continue;
    // Reduce the best of the block over all blocks. The next tile needs no barrier before it is
    // cleared: a thread clears only the element of tile_best that it alone has read here.
    __syncthreads();
    const int i = threadIdx.x;
    if (i >= size) continue;
    if (block_best) block_best[block_row + first + i] = upper_16(tile_best[i]);
    if (tile_best[i] != 0)
      atomicMax(reinterpret_cast<Bits<T>*>(batch.best) + image * batch.max_gt + first + i,
                tile_best[i]);
  }
  // Decide the matches. A crowd box turns background into ignored.
  int positive = 0;
#pragma unroll
  for (int k = 0; k < kThreadAnchors; ++k) {
    if constexpr (kOnGrid) rescan_own_best(batch, image, mine.box[k], mine.match[k]);
    const bool active = mine.active(k);
    int match = mine.match[k].match(rules);
    if (match == kBackground && in_any_crowd(crowds, image, mine.box[k], rules.crowd_ioa))
      match = kIgnored;
    if (active)
      write_target(out, batch, image, block.first + mine.in_block(k), match, mine.match[k]);
    positive += __popc(__ballot_sync(kFullMask, active && match >= 0));
  }
  if (threadIdx.x % kWarp == 0 && positive > 0) atomicAdd(&out.num_positive[image], positive);
}

// Applies the low-quality rule to the results of assign_kernel<T, false>. If block_best is null,
// all blocks visit their anchors.
// 128-bit accesses: 1 load, 0 stores
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 8 : 4)
    promote_kernel(const __grid_constant__ MatchBatch<T> batch,
                   const uint16_t* __restrict__ block_best, MatchOutputs<T> out) {
  __shared__ GroundTruthTile<T> tile;
  const MatchRules<T>& rules = batch.rules;
  const int64_t image = blockIdx.y;
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
  const BlockAnchors block = BlockAnchors::of_boxes(batch);
  ThreadAnchors<T> mine = ThreadAnchors<T>::template load<false>(batch, image, block);
  const BlockBounds<T> bounds = BlockBounds<T>::of_boxes(mine);
  const bool zero_is_relevant = rules.zero_is_relevant();
  for (int first = 0; first < num_gt; first += kTile) {
    if (first > 0) __syncthreads();  // other threads may still be reading the previous tile
    tile.load(batch, image, best, rules.bg_iou, first, min(kTile, num_gt - first), bounds);
    tile.for_relevant([&](int i) { tile.visit(first, i, zero_is_relevant, mine); });
  }
  // Replace the results of promoted anchors.
  int positive = 0;
#pragma unroll
  for (int k = 0; k < kThreadAnchors; ++k) {
    AnchorMatch<T>& match = mine.match[k];
    const bool promoted = mine.active(k) && match.promoted >= 0;
    const int before = match.match_by_iou(rules);
    rescan_own_best(batch, image, mine.box[k], match);
    if (promoted) {
      if (out.ious && before >= 0) atomicAdd(&out.gt_positives[image * batch.max_gt + before], -1);
      write_target(out, batch, image, block.first + mine.in_block(k), match.match(rules), match);
    }
    positive += __popc(__ballot_sync(kFullMask, promoted && before < 0));
  }
  if (threadIdx.x % kWarp == 0 && positive > 0) atomicAdd(&out.num_positive[image], positive);
}

// Launches the kernels for the anchors of a grid. `like` is a tensor on the device.
template <typename T>
void match_grid(MatchBatch<T> batch, const Crowds<T>& crowds, const MatchOutputs<T>& out,
                int64_t images, const Tensor& like, const CudaScope& scope) {
  const Grid& grid = batch.anchors.grid;
  batch.first_block[0] = 0;
  for (int l = 0; l < grid.levels; ++l)
    batch.first_block[l + 1] =
        batch.first_block[l] + unsigned(ceil_div(grid.first[l + 1] - grid.first[l], kBlockAnchors));
  const int64_t shape[] = {grid.levels, int64_t(sizeof(LevelBounds) / sizeof(float))};
  Tensor level_bounds = torch::stable::new_empty(like, shape, ScalarType::Float);
  batch.level_bounds = data<LevelBounds>(level_bounds);
  prepare_matching(batch, out, images, scope);
  launch("assign_kernel", assign_kernel<T, true>,
         dim3(batch.first_block[grid.levels], unsigned(images)), kThreads, 0, scope, batch, crowds,
         out, nullptr);
}

// Launches the kernels for explicit anchors. `like` is a tensor on the device.
template <typename T>
void match_boxes(const MatchBatch<T>& batch, const Crowds<T>& crowds, const MatchOutputs<T>& out,
                 int64_t images, bool promotes, const Tensor& like, const CudaScope& scope) {
  const int64_t blocks = ceil_div(batch.num_anchors, kBlockAnchors);
  // With more ground truths, block_best would take more memory than matches and labels.
  const bool store = batch.best && batch.max_gt <= kMaxStored;
  std::optional<Tensor> block_best;
  const int64_t shape[] = {images, blocks, batch.max_gt};
  if (store) block_best = torch::stable::new_empty(like, shape, ScalarType::Short);
  uint16_t* block_best_data = store ? data<uint16_t>(*block_best) : nullptr;
  const auto grid = dim3(unsigned(blocks), unsigned(images));
  prepare_matching(batch, out, images, scope);
  launch("assign_kernel", assign_kernel<T, false>, grid, kThreads, 0, scope, batch, crowds, out,
         block_best_data);
  if (promotes)
    launch("promote_kernel", promote_kernel<T>, grid, kThreads, 0, scope, batch, block_best_data,
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
  const int64_t count = args.anchors.count;
  if (args.images == 0 || count == 0) {
    torch::stable::fill_(num_positive, 0);
    torch::stable::fill_(best_ious, 0);
    torch::stable::fill_(gt_positives, 0);
    return results;
  }
  dispatch_compute(gt_boxes.scalar_type(), "assign_targets", [&](auto zero) {
    using T = decltype(zero);
    const MatchRules<T> rules{T(fg_iou), T(bg_iou), T(low_quality_min_iou), T(crowd_ioa),
                              args.low_quality};
    const bool on_grid = args.anchors.grid.levels > 0;
    const bool promotes = args.low_quality != LowQuality::kOff && args.max_gt > 0;
    const bool takes_best = args.takes_best && args.max_gt > 0;
    const bool find_best = (promotes || statistics || takes_best) && args.max_gt > 0;
    std::optional<Tensor> best;
    const int64_t shape[] = {args.images, args.max_gt};
    if (find_best) best = statistics ? best_ious : torch::stable::new_empty(gt_boxes, shape);
    MatchBatch<T> batch{args.anchors.view<T>("assign_targets"),
                        count,
                        data<Box<T>>(args.gt_boxes),
                        data<int64_t>(args.gt_labels),
                        data<int64_t>(args.gt_count),
                        int(args.max_gt),
                        rules,
                        best && !takes_best ? data<T>(*best) : nullptr,
                        {},
                        nullptr};
    const Crowds<T> crowds{data<Box<T>>(args.crowd_boxes), data<int64_t>(args.crowd_count),
                           int(args.max_crowd)};
    const MatchOutputs<T> out = args.outputs<T>(results, statistics);
    if (on_grid)
      match_grid(batch, crowds, out, args.images, gt_boxes, scope);
    else
      match_boxes(batch, crowds, out, args.images, promotes, gt_boxes, scope);
    if (!takes_best) return;
    batch.best = data<T>(*best);
    take_best_anchors(batch, out, args.images, gt_boxes, scope);
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("assign_targets", TORCH_BOX(&assign_targets_cuda));
}

}  // namespace retinanet
