// Matching on CUDA.
//
// Work: one thread per anchor, blockIdx.y per image; ground truths pass through shared memory in
// tiles, and those that cannot matter to any anchor of the block are passed over: they do not touch
// what bounds its anchors, or are so much larger or smaller that their IoU stays below all that
// counts.
//
// On a grid one warp for each ground truth finds its best IoU first (grid_reach.h leaves a few
// anchors to look at), so that one kernel decides everything.  Explicit anchors take two: the first
// gives each anchor its match by the thresholds, and finds the best IoU of each ground truth: a
// maximum of float bits, which order like integers, so that atomicMax is exact and its result does
// not depend on order.  It keeps the upper 16 bits of each block's own maxima, by which the second
// kernel knows the few blocks that may hold a best anchor, and applies the low-quality rule there.
//
// 16 bits miss no block: a block that holds a ground truth's best anchor has the maximum over all
// anchors for its own, so the upper bits are equal too.  Where they are equal by chance (maxima
// within a 128th, of float64 a 16th), the block is visited in vain: the rule itself compares whole
// IoUs.  With more than kMostMapped ground truths nothing is kept, and every block visited.
//
// Bytes moved per anchor: 16 read (0 with a grid, whose boxes are computed), 4 written, and 4 with
// labels.  With a low-quality rule, explicit anchors have 2 more written and read for each block
// and ground truth: M / 128 per anchor, which with the atomics is a tenth of the 4 written at
// M = 46.  Blocks that may hold a best anchor read their anchors again: one or two for each ground
// truth if anchors come in a grid's order, which is an eighth of the 16 at 160000 anchors and
// M = 50.
//
// Determinism: integer atomics only.
#include "common/cuda.h"
#include "matching.h"
#include "matching_grid_reach.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;             // ground truths in shared memory
constexpr int64_t kMostMapped = 1024;  // ground truths of which blocks keep their maxima

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

// What the kernels read.
template <typename T>
struct Batch {
  Anchors<T> anchors;
  int64_t num_anchors;
  const Box<T>* gt_boxes;
  const int64_t* gt_labels;  // null without labels
  const int64_t* gt_count;
  int max_gt;
  MatchRules<T> rules;
  T* best;  // [N, M], each ground truth's over all anchors; null if nothing asks for it

  __device__ __forceinline__ int num_gt(int64_t image) const {
    return int(clamp_count(gt_count[image], max_gt));
  }
  __device__ __forceinline__ const T* best_of(int64_t image) const {
    return best ? best + image * max_gt : nullptr;
  }
};

template <typename T>
struct Crowds {
  const Box<T>* boxes;
  const int64_t* count;  // null without crowds
  int max;
};

template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = max_of(value, __shfl_xor_sync(kFullMask, value, offset));
  return value;
}

// What bounds the anchors of a block, in the threads of the block; NaN stays out.
template <typename T>
struct BlockBounds {
  Box<T> box;
  T least_area, most_area;

  // All threads must call it; it ends with a barrier.
  __device__ __forceinline__ BlockBounds(const Box<T>& anchor, T area, bool active) {
    constexpr T kMax = std::numeric_limits<T>::max();
    __shared__ T warps[kThreads / kWarp][6];
    // The opposite of a minimum is a maximum of opposites.
    const T mine[6] = {-anchor.x1, -anchor.y1, anchor.x2, anchor.y2, -area, area};
#pragma unroll
    for (int i = 0; i < 6; ++i) {
      const T most = warp_max(active ? max_of(-kMax, mine[i]) : -kMax);
      if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp][i] = most;
    }
    __syncthreads();
    T all[6];
#pragma unroll
    for (int i = 0; i < 6; ++i) {
      all[i] = warps[0][i];
      for (int w = 1; w < kThreads / kWarp; ++w) all[i] = max_of(all[i], warps[w][i]);
    }
    box = {-all[0], -all[1], all[2], all[3]};
    least_area = -all[4];
    most_area = all[5];
  }

  // False if no anchor of the block can have an IoU of `relevant_iou` with the box, or any at all.
  __device__ __forceinline__ bool may_match(const Box<T>& b, T area, T relevant_iou) const {
    if (!(relevant_iou > T(0))) return true;
    const bool touches = b.x1 < box.x2 && b.x2 > box.x1 && b.y1 < box.y2 && b.y2 > box.y1;
    // An IoU is at most the ratio of the areas; rounding is far smaller than the margin, unless the
    // product is no normal number any more.
    const T least = relevant_iou * T(1 - 1e-4);
    return touches && (relevant_iou < T(1e-30) ||
                       (!(most_area < area * least) && !(area < least_area * least)));
  }
};

// The ground truths that pass through shared memory together.
template <typename T>
struct Tile {
  Box<T> box[kTile];
  T area[kTile], promoting_iou[kTile];
  unsigned wanted[kTile / kWarp];  // a bit for each that may matter to the block

  // Loads ground truths first .. first + size - 1 of the image; ends with a barrier.  Where their
  // best IoUs are not known (null), IoUs from `relevant_iou` on matter.
  __device__ __forceinline__ void load(const Batch<T>& batch, int64_t image, const T* best,
                                       T relevant_iou, int first, int size,
                                       const BlockBounds<T>& bounds) {
    const int i = threadIdx.x;
    bool matters = false;
    if (i < size) {
      box[i] = batch.gt_boxes[image * batch.max_gt + first + i];
      area[i] = retinanet::area(box[i]);
      const MatchRules<T>& rules = batch.rules;
      promoting_iou[i] = best ? rules.promoting_iou(best[first + i]) : T(-1);
      if (best) relevant_iou = rules.relevant_iou(promoting_iou[i]);
      matters = is_valid(box[i]) && bounds.may_match(box[i], area[i], relevant_iou);
    }
    const unsigned bits = __ballot_sync(kFullMask, matters);
    if (i < kTile && i % kWarp == 0) wanted[i / kWarp] = bits;
    __syncthreads();
  }

  // Calls f(i) for those that matter, in order.
  template <typename F>
  __device__ __forceinline__ void for_wanted(F&& f) const {
    for (int word = 0; word < kTile / kWarp; ++word)
      for (unsigned bits = wanted[word]; bits != 0; bits &= bits - 1)
        f(word * kWarp + __ffs(int(bits)) - 1);
  }
};

template <typename T>
__device__ __forceinline__ void write_target(const MatchOutputs<T>& out, const Batch<T>& batch,
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

// A promoted anchor takes the ground truth of its highest IoU, which may be a lower one than the
// tiles care for.
template <typename T>
__device__ __forceinline__ void complete(const Batch<T>& batch, int64_t image, const Box<T>& anchor,
                                         AnchorMatch<T>& state) {
  if (state.promoted < 0 || state.best_iou >= batch.rules.bg_iou ||
      batch.rules.low_quality != LowQuality::kTorchvision)
    return;
  const int num_gt = batch.num_gt(image);
  state.best_iou = -1;  // equal ones have to come in order, too
  for (int gt = 0; gt < num_gt; ++gt) {
    const Box<T> box = batch.gt_boxes[image * batch.max_gt + gt];
    if (is_valid(box)) state.visit(gt, iou(box, area(box), anchor, area(anchor)));
  }
}

// Adds the threads for which `positive` holds to the image's count.  All threads must call it.
template <typename T>
__device__ __forceinline__ void count_positive(const MatchOutputs<T>& out, int64_t image,
                                               bool positive) {
  const int count = block_sum<kThreads>(positive ? 1 : 0);
  if (threadIdx.x == 0 && count > 0) atomicAdd(&out.num_positive[image], count);
}

// The best IoU of each ground truth over a grid's anchors; a warp each.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    grid_best_kernel(const __grid_constant__ Batch<T> batch) {
  const int64_t image = blockIdx.y;
  const int gt = int(blockIdx.x) * (kThreads / kWarp) + int(threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (gt >= batch.max_gt) return;  // whole warps
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
  // Calls f(level, base, reach) for this lane's share of the base anchors.
  const auto for_bases = [&](auto&& f) {
    for (int level = 0; valid && level < grid.levels; ++level) {
      for (int b = lane; b < grid.per_cell[level]; b += kWarp) {
        const float* base = base_anchors + 4 * (grid.base[level] + b);
        const BaseReach reach(grid, level, base);
        f(level, base, BoxReach(reach, box));
      }
    }
  };
  for_bases([&](int level, const float* base, const BoxReach& reach) {
    int64_t y, x;
    if (reach.nearest(y, x)) visit(level, base, y, x);
  });
  // That is about the best; no anchor out of its reach is better.
  const float found = max_of(float(warp_max(best)), std::numeric_limits<float>::min());
  for_bases([&](int level, const float* base, const BoxReach& reach) {
    reach.for_rows(reach.intersection_for_iou(found), {0, grid.height[level]},
                   [&](int64_t y, Span columns) {
                     for (int64_t x = columns.begin; x < columns.end; ++x) visit(level, base, y, x);
                   });
  });
  best = warp_max(best);
  if (lane == 0) batch.best[image * batch.max_gt + gt] = best;
}

// With kBestKnown decides everything; else by the thresholds alone, finds `batch.best`, which
// starts as 0, and keeps each block's own [N, blocks, M], if these are not null.
// 128-bit accesses: 1 load, 0 stores
template <typename T, bool kBestKnown>
__global__ void __launch_bounds__(kThreads)
    assign_kernel(const __grid_constant__ Batch<T> batch, Crowds<T> crowds, MatchOutputs<T> out,
                  uint16_t* __restrict__ block_best) {
  __shared__ Tile<T> tile;
  __shared__ Bits<T> tile_best[kTile];  // over the anchors of this block
  const MatchRules<T>& rules = batch.rules;
  const bool find_best = !kBestKnown && batch.best;
  const int64_t image = blockIdx.y, a = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool active = a < batch.num_anchors;
  const Box<T> anchor = active ? batch.anchors(image, a) : Box<T>{0, 0, 0, 0};
  const T anchor_area = area(anchor);
  const BlockBounds<T> bounds(anchor, anchor_area, active);
  // Before the best is known, any IoU above 0 may be it.
  const T relevant_iou =
      find_best ? min_of(rules.bg_iou, std::numeric_limits<T>::min()) : rules.bg_iou;
  const int num_gt = batch.num_gt(image);
  const int64_t block_row = (image * gridDim.x + blockIdx.x) * batch.max_gt;
  AnchorMatch<T> state;
  for (int first = 0; first < num_gt; first += kTile) {
    const int size = min(kTile, num_gt - first);
    for (int i = threadIdx.x; find_best && i < size; i += kThreads) tile_best[i] = 0;
    tile.load(batch, image, kBestKnown ? batch.best_of(image) : nullptr, relevant_iou, first, size,
              bounds);
    tile.for_wanted([&](int i) {
      T overlap = iou(tile.box[i], tile.area[i], anchor, anchor_area);
      state.visit(first + i, overlap);
      if constexpr (kBestKnown) state.promote(first + i, overlap, tile.promoting_iou[i]);
      if (!find_best || !__any_sync(kFullMask, overlap > T(0))) return;
      overlap = warp_max(overlap);
      if (threadIdx.x % kWarp == 0) atomicMax(&tile_best[i], to_bits(overlap));
    });
    __syncthreads();
    if (!find_best) continue;
    for (int i = threadIdx.x; i < size; i += kThreads) {
      if (block_best) block_best[block_row + first + i] = upper_16(tile_best[i]);
      if (tile_best[i] != 0)
        atomicMax(reinterpret_cast<Bits<T>*>(batch.best) + image * batch.max_gt + first + i,
                  tile_best[i]);
    }
    // No barrier here: a thread clears only what it alone has read.
  }
  if constexpr (kBestKnown) complete(batch, image, anchor, state);
  int match = state.match(rules);
  const int64_t num_crowd = crowds.count ? clamp_count(crowds.count[image], crowds.max) : 0;
  for (int64_t k = 0; match == kBackground && k < num_crowd; ++k)
    if (in_crowd(anchor, crowds.boxes[image * crowds.max + k], rules.crowd_ioa)) match = kIgnored;
  if (active) write_target(out, batch, image, a, match, state);
  count_positive(out, image, active && match >= 0);
}

// 128-bit accesses: 1 load, 0 stores
template <typename T>
__global__ void __launch_bounds__(kThreads)
    promote_kernel(const __grid_constant__ Batch<T> batch, const uint16_t* __restrict__ block_best,
                   MatchOutputs<T> out) {
  __shared__ Tile<T> tile;
  const MatchRules<T>& rules = batch.rules;
  const int64_t image = blockIdx.y, a = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int num_gt = batch.num_gt(image);
  const T* best = batch.best_of(image);
  if (block_best) block_best += (image * gridDim.x + blockIdx.x) * batch.max_gt;
  bool may_hold_best = !block_best;
  for (int i = threadIdx.x; block_best && i < num_gt; i += kThreads)
    may_hold_best |=
        block_best[i] == upper_16(to_bits(best[i])) && rules.promoting_iou(best[i]) >= T(0);
  if (!__syncthreads_or(may_hold_best)) return;  // the whole block

  const bool active = a < batch.num_anchors;
  const Box<T> anchor = active ? batch.anchors(image, a) : Box<T>{0, 0, 0, 0};
  const T anchor_area = area(anchor);
  const BlockBounds<T> bounds(anchor, anchor_area, active);
  AnchorMatch<T> state;
  for (int first = 0; first < num_gt; first += kTile) {
    const int size = min(kTile, num_gt - first);
    tile.load(batch, image, best, rules.bg_iou, first, size, bounds);
    tile.for_wanted([&](int i) {
      const T overlap = iou(tile.box[i], tile.area[i], anchor, anchor_area);
      state.visit(first + i, overlap);
      state.promote(first + i, overlap, tile.promoting_iou[i]);
    });
    __syncthreads();
  }
  const bool promoted = active && state.promoted >= 0;
  const int before = state.match_by_iou(rules);
  if (promoted) {
    complete(batch, image, anchor, state);
    if (out.ious && before >= 0) atomicAdd(&out.gt_positives[image * batch.max_gt + before], -1);
    write_target(out, batch, image, a, state.match(rules), state);
  }
  count_positive(out, image, promoted && before < 0);
}

MatchResults assign_targets_cuda(const Tensor& anchors, std::vector<int64_t> grid_sizes,
                                 std::vector<double> grid_steps, const Tensor& gt_boxes,
                                 std::optional<Tensor> gt_labels, const Tensor& gt_count,
                                 std::optional<Tensor> crowd_boxes,
                                 std::optional<Tensor> crowd_count, double fg_iou, double bg_iou,
                                 std::string low_quality, double low_quality_min_iou,
                                 double crowd_ioa, bool statistics) {
  const CudaScope scope(gt_boxes);
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
    const Batch<T> batch{args.anchors.view<T>("assign_targets"),
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
    const dim3 grid(unsigned(ceil_div(count, kThreads)), unsigned(args.images));
    if (on_grid) {
      const unsigned warps = kThreads / kWarp;
      if (find_best)
        launch("grid_best_kernel", grid_best_kernel<T>,
               dim3(unsigned(ceil_div(args.max_gt, warps)), unsigned(args.images)), kThreads, 0,
               scope, batch);
      launch("assign_kernel", assign_kernel<T, true>, grid, kThreads, 0, scope, batch, crowds, out,
             nullptr);
      return;
    }
    // Beyond so many ground truths the map would be the larger part of the memory.
    const bool map = find_best && args.max_gt <= kMostMapped;
    std::optional<Tensor> block_best;
    if (map)
      block_best =
          torch::stable::new_empty(gt_boxes, {args.images, grid.x, args.max_gt}, ScalarType::Short);
    uint16_t* block_best_data = map ? data<uint16_t>(*block_best) : nullptr;
    launch("assign_kernel", assign_kernel<T, false>, grid, kThreads, 0, scope, batch, crowds, out,
           block_best_data);
    if (promotes)
      launch("promote_kernel", promote_kernel<T>, grid, kThreads, 0, scope, batch, block_best_data,
             out);
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("assign_targets", TORCH_BOX(&assign_targets_cuda));
}

}  // namespace retinanet
