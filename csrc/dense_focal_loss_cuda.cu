// Focal loss read from the heads' own tensors on CUDA.
//
// Work: a tile is a part of one level of one image, with all classes of its anchors. The layout of
// the level decides which logits a tile has:
//
//   contiguous: packs of neighbouring cells in       channels_last: consecutive rows of K logits,
//   each of the K planes of one anchor slot, a*K+k   which form one span
//   (dense_focal_loss_cuda_planes.h).                (focal_loss_cuda_rows.h).
//
//     plane 0      ....[ packs ]....                   ....[row|row|row| ... |row]....
//     plane 1      ....[ packs ]....
//     ...
//     plane K-1    ....[ packs ]....
//
// Each layout that occurs has its own launch. A block takes one tile, or a few consecutive ones of
// bfloat16 logits, for which it first computes a table of results (focal_loss_cuda_pack.h). For
// each tile it writes the targets of the anchors to shared memory, and its threads evaluate packs
// of 16 bytes that are aligned in memory. Bytes moved: the forward pass reads each logit once. The
// backward pass reads it once more and writes its gradient once. Each pass reads a label of 4 bytes
// (and a weight of 4 or 8) per anchor. Deterministic: each thread adds its packs in order, a block
// adds its threads by shuffles, and a second kernel adds the blocks of an image. All but the sum
// within a pack is in float64.
#include "common/cuda.h"
#include "common/partial_sums.h"
#include "dense_focal_loss.h"
#include "dense_focal_loss_cuda_planes.h"
#include "focal_loss_cuda_rows.h"

namespace retinanet {
namespace {

constexpr int kTileRows = 256;  // rows of a tile of a channels_last level at most
// Logits of such a tile at most, unless a single row has more.
constexpr int64_t kTileElements = 1 << 15;

// How the levels of one image that have one of the layouts are cut into tiles. The tiles of these
// levels are numbered in order. Other levels have none.
struct FocalTiles {
  int64_t num_classes;
  int rows;                         // rows of a tile of a channels_last level
  int per_block;                    // tiles that a block takes
  int first[kMaxLevels + 1] = {0};  // number of each level's first tile
  int count;                        // tiles of an image
  // For each level, the number of its first anchor, the anchors of a cell, and the tiles of a
  // slot's planes.
  int64_t first_anchor[kMaxLevels];
  int per_cell[kMaxLevels], per_slot[kMaxLevels];

  template <typename T>
  FocalTiles(const HeadLevels<T>& levels, bool channels_last, int64_t num_classes_, int64_t images)
      : num_classes(num_classes_),
        rows(int(std::clamp<int64_t>(kTileElements / num_classes_, 1, kTileRows))) {
    for (int l = 0; l < levels.count; ++l) {
      const HeadLevel<T>& level = levels.level[l];
      first_anchor[l] = level.first / num_classes;
      const int64_t anchors = level.channels / num_classes, slot = tiles_of_planes<T>(level.area);
      const int64_t tiles = level.channels_last != channels_last ? 0
                            : channels_last ? ceil_div(level.area * anchors, rows)
                                            : anchors * slot;
      check(level.area < (int64_t(1) << 31) && first[l] + tiles < (int64_t(1) << 31),
            "dense_focal_loss: expected fewer than 2^31 cells per level and tiles per image, got ",
            level.area, " cells in level ", l, " and ", first[l] + tiles, " tiles up to it");
      first[l + 1] = first[l] + int(tiles);
      per_cell[l] = int(anchors);
      per_slot[l] = int(slot);
    }
    count = first[levels.count];
    per_block = tiles_per_block<T>(count * images);
  }

  unsigned blocks() const { return unsigned(ceil_div(count, per_block)); }
};

// Where the blocks of a launch write the sums of their losses: partial[image][blockIdx.x].
struct BlockSums {
  double* partial;
  int64_t per_image;
};

// Evaluates the levels that are channels_last (kRows) or those that are not. `labels` and `weights`
// (or null) have one element per anchor of all images, and `grad` has one per image. The forward
// pass writes `sums`. The backward pass writes the gradients to `out`. For sm_100 and sm_120, nvcc
// splits the loads of soft targets in half.
// 128-bit accesses: 0 loads, 0 stores (soft targets; others load and the backward pass stores)
// 128-bit loops: loads and stores
// Hot loop: one loop over packs takes nearly all of the time
template <typename T, Power kPower, bool kSoft, bool kBackward, bool kRows>
__global__ void __launch_bounds__(kFocalThreads, kFocalBlocks<T, kPower, kRows>)
    dense_focal_loss_kernel(const __grid_constant__ HeadLevels<T> levels,
                            const __grid_constant__ FocalTiles tiles,
                            const int32_t* __restrict__ labels,
                            const Compute<T>* __restrict__ weights, int64_t anchors,
                            FocalFormula<Compute<T>, kPower, kSoft> formula,
                            const Compute<T>* __restrict__ grad,
                            const __grid_constant__ LevelOutputs<T> out, BlockSums sums) {
  using C = Compute<T>;
  using Packs = FocalPacks<T, kPower, kSoft, kBackward>;
  static_assert(kTileRows <= TileCells<T>::kCount);
  __shared__ RowTarget<C> shared[TileCells<T>::kCount];
  __shared__ typename Packs::BlockMemory block_memory;

  const int64_t image = blockIdx.y;
  const C scale = kBackward ? grad[image] : C(1);
  Packs packs{formula};
  packs.prepare(scale, block_memory);

  const int64_t num_classes = tiles.num_classes;
  const int begin_tile = int(blockIdx.x) * tiles.per_block;
  const int end_tile =
      tiles.count - begin_tile < tiles.per_block ? tiles.count : begin_tile + tiles.per_block;
  int l = 0;
  double sum = 0;
#pragma unroll 1
  for (int number = begin_tile; number < end_tile; ++number) {
    // The level of the tile, and the tile's number within the level.
    while (number >= tiles.first[l + 1]) ++l;
    const HeadLevel<T> level = levels.level[l];
    const int tile = number - tiles.first[l];
    const int64_t image_offset = image * level.size();
    const int64_t first_row = image * anchors + tiles.first_anchor[l];
    const ClassTargets<C, int32_t> targets{labels, num_classes, weights};
    __syncthreads();  // an earlier tile may still be in use
    if constexpr (kRows) {
      const int64_t begin = int64_t(tile) * tiles.rows,
                    left = level.area * tiles.per_cell[l] - begin;
      const int count = left < tiles.rows ? int(left) : tiles.rows;
      if (int(threadIdx.x) < count)
        shared[threadIdx.x] = packs.prepared(targets.row(first_row + begin + threadIdx.x), scale);
      __syncthreads();
      const int64_t start = image_offset + begin * num_classes;
      sum += evaluate_rows<kBackward>(
          packs.ready(), level.data + start, kBackward ? out.data[l] + start : nullptr,
          count * int(num_classes), 0, int(num_classes), shared, IncomingGrad<T, false>{scale});
    } else {
      const int anchor = tile / tiles.per_slot[l];
      const TileCells<T> cells(tile - anchor * tiles.per_slot[l]);
      bool has_positives = false;
#pragma unroll 1
      for (int i = threadIdx.x; i < TileCells<T>::kCount; i += kFocalThreads) {
        // Labels are in the order of (cell, anchor).
        const int64_t cell = cells.first + i;
        if (cell < 0 || cell >= level.area) continue;
        shared[i] =
            packs.prepared(targets.row(first_row + cell * tiles.per_cell[l] + anchor), scale);
        has_positives |= shared[i].positive >= 0;
      }
      has_positives = __syncthreads_or(has_positives) != 0;
      const int64_t start = image_offset + anchor * num_classes * level.area;
      sum += evaluate_planes<kBackward>(packs.ready(), level.data + start,
                                        kBackward ? out.data[l] + start : nullptr, start,
                                        gridDim.y * level.size(), level.area, int(num_classes),
                                        cells, shared, has_positives, scale);
    }
  }
  if constexpr (!kBackward) {
    const double total = block_sum<kFocalThreads>(sum);
    if (threadIdx.x == 0) sums.partial[image * sums.per_image + blockIdx.x] = total;
  }
}

// Calls f(T{}, formula). Hard targets with gamma 2 have their own kernels. All other cases share
// the kernels for soft targets and any gamma.
template <typename F>
void dispatch_dense(const DenseFocalArguments& args, double alpha, double gamma, const char* op,
                    F&& f) {
  dispatch_floating(args.heads.dtype(), op, [&](auto zero) {
    using C = Compute<decltype(zero)>;
    const auto focal = Focal<C>::make(alpha, gamma);
    const auto targets = Smoothing<C>::make(args.label_smoothing);
    if (focal.power() == Power::kTwo && !args.soft())
      f(zero, FocalFormula<C, Power::kTwo, false>{focal});
    else
      f(zero, FocalFormula<C, Power::kAny, true>{focal, targets.positive, targets.negative});
  });
}

// The tensors and tiles of a call for logits of type T.
template <typename T>
struct DenseCall {
  const DenseFocalArguments& args;
  const CudaScope& scope;
  HeadLevels<T> levels = args.heads.view<T>();
  FocalTiles contiguous{levels, false, args.num_classes, args.heads.images};
  FocalTiles channels_last{levels, true, args.num_classes, args.heads.images};

  // Launches the kernel for the levels of one layout, if there are any.
  template <bool kBackward, bool kRows, Power kPower, bool kSoft>
  void launch_layout(const FocalFormula<Compute<T>, kPower, kSoft>& formula, const Compute<T>* grad,
                     const LevelOutputs<T>& out, BlockSums sums) const {
    using C = Compute<T>;
    const FocalTiles& tiles = kRows ? channels_last : contiguous;
    if (tiles.count == 0 || args.heads.images == 0) return;
    const dim3 grid(tiles.blocks(), unsigned(args.heads.images));
    launch("dense_focal_loss_kernel", dense_focal_loss_kernel<T, kPower, kSoft, kBackward, kRows>,
           grid, kFocalThreads, 0, scope, levels, tiles, data<int32_t>(args.labels),
           data<C>(args.anchor_weight), args.anchors, formula, grad, out, sums);
  }
};

Tensor dense_focal_loss_cuda(std::vector<Tensor> cls_logits, const Tensor& labels,
                             std::optional<Tensor> anchor_weight, int64_t num_classes, double alpha,
                             double gamma, double label_smoothing) {
  const DenseFocalArguments args(cls_logits, labels, anchor_weight, num_classes, label_smoothing,
                                 "dense_focal_loss");
  const CudaScope scope("dense_focal_loss", labels, cls_logits, anchor_weight);
  const int64_t images = args.heads.images;
  Tensor out = torch::stable::new_empty(labels, {images}, args.heads.compute_dtype());
  if (images == 0) return out;
  check_batch("dense_focal_loss", images);
  dispatch_dense(args, alpha, gamma, "dense_focal_loss", [&](auto zero, const auto formula) {
    using T = decltype(zero);
    using C = Compute<T>;
    const DenseCall<T> call{args, scope};
    const int64_t before = call.contiguous.blocks(), blocks = before + call.channels_last.blocks();
    const int64_t shape[] = {images, blocks};
    Tensor partial = torch::stable::new_empty(labels, shape, ScalarType::Double);
    double* const sums = data<double>(partial);
    call.template launch_layout<false, false>(formula, nullptr, {}, {sums, blocks});
    call.template launch_layout<false, true>(formula, nullptr, {}, {sums + before, blocks});
    launch("sum_partials_kernel", sum_partials_kernel<C>, unsigned(images), kSumThreads, 0, scope,
           sums, blocks, data<C>(out));
  });
  return out;
}

std::vector<Tensor> dense_focal_loss_backward_cuda(const Tensor& grad,
                                                   std::vector<Tensor> cls_logits,
                                                   const Tensor& labels,
                                                   std::optional<Tensor> anchor_weight,
                                                   int64_t num_classes, double alpha, double gamma,
                                                   double label_smoothing) {
  const DenseFocalArguments args(cls_logits, labels, anchor_weight, num_classes, label_smoothing,
                                 "dense_focal_loss_backward");
  args.heads.check_grad(grad, "dense_focal_loss_backward");
  const CudaScope scope("dense_focal_loss_backward", labels, grad, cls_logits, anchor_weight);
  const Tensor scales = contiguous_aligned(grad);
  std::vector<Tensor> out = args.heads.empty_like();
  check_batch("dense_focal_loss_backward", args.heads.images);
  dispatch_dense(args, alpha, gamma, "dense_focal_loss_backward",
                 [&](auto zero, const auto formula) {
                   using T = decltype(zero);
                   using C = Compute<T>;
                   const DenseCall<T> call{args, scope};
                   LevelOutputs<T> pointers;
                   for (size_t l = 0; l < out.size(); ++l) pointers.data[l] = data<T>(out[l]);
                   call.template launch_layout<true, false>(formula, data<C>(scales), pointers, {});
                   call.template launch_layout<true, true>(formula, data<C>(scales), pointers, {});
                 });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("dense_focal_loss", TORCH_BOX(&dense_focal_loss_cuda));
  m.impl("dense_focal_loss_backward", TORCH_BOX(&dense_focal_loss_backward_cuda));
}

}  // namespace retinanet
