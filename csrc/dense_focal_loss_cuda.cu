// Focal loss read from the heads' own tensors on CUDA.
//
// Work: a block takes one tile, which is up to 256 anchors of one level of one image, with all
// their classes. The layout of the level decides which logits a tile has:
//
//   contiguous: one anchor slot (the a-th anchor     channels_last: consecutive rows of K logits,
//   of each cell) in neighbouring cells. One span    which form one span.
//   in each of the slot's K planes, a*K + k.
//
//     plane 0      ....[ span ]....                    ....[row|row|row| ... |row]....
//     plane 1      ....[ span ]....                        |<------ span ------->|
//     ...
//     plane K-1    ....[ span ]....
//
// A thread takes one pack of a span at a time, 16 bytes that are aligned in memory. The first and
// the last pack may reach outside the span, and are then accessed element by element:
//
//     memory   |  pack  |  pack  |  pack  |  pack  |
//     span         [==========================]
//              |---| lead
//
// The block first writes the targets of its anchors to shared memory. Bytes moved: the forward pass
// reads each logit once. The backward pass reads it once more and writes its gradient once. Each
// pass reads a label of 4 bytes (and a weight of 4 or 8) per anchor. Deterministic: each thread
// adds its packs in order, a block adds its threads by shuffles, and a second kernel adds the tiles
// of an image. All but the sum within a pack is in float64.
#include "common/cuda.h"
#include "common/partial_sums.h"
#include "dense_focal_loss.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;
constexpr int kTileAnchors = 256;  // anchors of a tile at most
// Logits of a channels_last tile at most, unless a single row has more.
constexpr int64_t kTileElements = 1 << 15;

// How the levels of one image are cut into tiles. The tiles of all levels are numbered in order.
struct FocalTiles {
  int64_t num_classes;
  int rows;                         // rows of a tile of a channels_last level
  int first[kMaxLevels + 1] = {0};  // number of each level's first tile

  template <typename T>
  FocalTiles(const HeadLevels<T>& levels, int64_t num_classes_)
      : num_classes(num_classes_),
        rows(int(std::clamp<int64_t>(kTileElements / num_classes_, 1, kTileAnchors))) {
    for (int l = 0; l < levels.count; ++l) {
      const HeadLevel<T>& level = levels.level[l];
      const int64_t per_cell = level.channels / num_classes;
      const int64_t tiles = level.channels_last ? ceil_div(level.area * per_cell, rows)
                                                : per_cell * ceil_div(level.area, kTileAnchors);
      check(first[l] + tiles < (int64_t(1) << 31),
            "dense_focal_loss: expected fewer than 2^31 tiles of anchors per image, got ",
            first[l] + tiles, " up to level ", l);
      first[l + 1] = first[l] + int(tiles);
    }
  }
};

// Consecutive logits of a tile. Packs are numbered by the position of their first element in the
// span, which is negative for a pack that starts before the span.
template <typename T>
struct LogitSpan {
  static constexpr int kSize = Packed<T>::kSize;
  const T* x;
  int size;

  // Elements between the start of the first pack, a multiple of 16 bytes, and the span.
  __device__ __forceinline__ int lead() const {
    return int(reinterpret_cast<uintptr_t>(x) / sizeof(T) % kSize);
  }
  // Whether the pack at `begin` lies inside the span.
  __device__ __forceinline__ bool whole(int begin) const {
    return begin >= 0 && begin + kSize <= size;
  }
  __device__ __forceinline__ Packed<T> load(int begin) const {
    if (whole(begin)) return load_packed(x + begin);
    Packed<T> pack;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (begin + j >= 0 && begin + j < size) pack.v[j] = x[begin + j];
    }
    return pack;
  }
  // Stores a pack. `out` is the output of the span's first element, with the same alignment.
  __device__ __forceinline__ void store(T* __restrict__ out, int begin,
                                        const Packed<T>& pack) const {
    if (whole(begin)) return stream_packed(out + begin, pack);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (begin + j >= 0 && begin + j < size) out[begin + j] = pack.v[j];
    }
  }
};

// The weighted loss of logit x or, with kBackward, its gradient times `scale`. `hit` says whether x
// belongs to its anchor's positive class.
template <Power kPower, bool kSoft, bool kBackward, typename C>
__device__ __forceinline__ C focal_value(const Focal<C>& focal, const Smoothing<C>& smoothing, C x,
                                         bool hit, C weight, C scale) {
  const C e = exp_minus<DeviceArithmetic>(std::abs(x));
  if constexpr (kSoft) {
    const C t = hit ? smoothing.positive : smoothing.negative;
    if constexpr (kBackward)
      return focal.template soft_grad<kPower, DeviceArithmetic>(x, e, t, scale * weight);
    return weight * focal.template soft_loss<kPower, DeviceArithmetic>(x, e, t);
  } else {
    if constexpr (kBackward)
      return focal.template grad<kPower, DeviceArithmetic>(x, e, hit, scale * weight);
    return weight * focal.template loss<kPower, DeviceArithmetic>(x, e, hit);
  }
}

// Calls value(j, x) for the pack's elements inside the span, in order. The forward pass returns the
// sum of the values. The backward pass stores the values. `out` is the output of the span's first
// element.
template <bool kBackward, typename T, typename F>
__device__ __forceinline__ Compute<T> map_pack(const LogitSpan<T>& span, T* __restrict__ out,
                                               int begin, F&& value) {
  using C = Compute<T>;
  constexpr int kSize = Packed<T>::kSize;
  Packed<T> pack = span.load(begin);
  C sum = 0;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    if (begin + j < 0 || begin + j >= span.size) continue;
    const C result = value(j, C(pack.v[j]));
    if constexpr (kBackward) {
      pack.v[j] = T(result);
    } else {
      sum += result;
    }
  }
  if constexpr (kBackward) span.store(out, begin, pack);
  return sum;
}

// `labels` and `weights` (or null) have one element per anchor of all images, and `grad` has one
// per image. The forward pass writes the sum of each tile to `partial`. The backward pass writes
// the gradients to `out`.
// 128-bit accesses: 1 load, 0 stores (forward; backward also stores)
template <typename T, Power kPower, bool kSoft, bool kBackward>
__global__ void __launch_bounds__(kThreads) dense_focal_loss_kernel(
    const __grid_constant__ HeadLevels<T> levels, const __grid_constant__ FocalTiles tiles,
    const int32_t* __restrict__ labels, const Compute<T>* __restrict__ weights, int64_t anchors,
    Focal<Compute<T>> focal, Smoothing<Compute<T>> smoothing, const Compute<T>* __restrict__ grad,
    const __grid_constant__ LevelOutputs<T> out, double* __restrict__ partial) {
  using C = Compute<T>;
  constexpr int kSize = Packed<T>::kSize;
  // Neighbouring lanes take neighbouring packs. The targets of the j-th elements of all packs lie
  // side by side, so that the lanes access different banks of shared memory.
  constexpr int kStride = kTileAnchors / kSize + 1;
  __shared__ RowTarget<C> shared[kSize * kStride];
  const auto slot = [](int i) { return i % kSize * kStride + i / kSize; };

  // The image, the level and the number of the tile within the level.
  const int64_t image = blockIdx.y;
  int l = 0;
  while (int(blockIdx.x) >= tiles.first[l + 1]) ++l;
  const HeadLevel<T>& level = levels.level[l];
  const int64_t num_classes = tiles.num_classes, per_cell = level.channels / num_classes;
  const int tile = int(blockIdx.x) - tiles.first[l];

  // The tile's anchors. A channels_last tile has rows from `begin` on. A contiguous tile has cells
  // from `begin` on, of anchor slot `anchor`.
  const int per_anchor = level.channels_last ? 0 : int(ceil_div(level.area, kTileAnchors));
  const int64_t anchor = level.channels_last ? 0 : tile / per_anchor;
  const int64_t begin = level.channels_last ? int64_t(tile) * tiles.rows
                                            : int64_t(tile - anchor * per_anchor) * kTileAnchors;
  // The number of anchors. It may be lower in the last tile of a level, or of a slot's planes.
  const int64_t left = (level.channels_last ? level.area * per_cell : level.area) - begin;
  const int most = level.channels_last ? tiles.rows : kTileAnchors;
  const int count = left < most ? int(left) : most;
  // Labels are in the order of (cell, anchor), so those of neighbouring cells lie `step` apart.
  const int64_t step = level.channels_last ? 1 : per_cell;
  const int64_t row = image * anchors + level.first / num_classes + begin * step + anchor;
  // The first `count` threads write one target each.
  const ClassTargets<C, int32_t> targets{labels, num_classes, weights};
  if (int(threadIdx.x) < count) shared[slot(threadIdx.x)] = targets.row(row + threadIdx.x * step);
  __syncthreads();

  const C scale = kBackward ? grad[image] : C(0);
  // The result of logit x, of class k of the tile's i-th anchor.
  const auto value = [&](int i, int k, C x) {
    const RowTarget<C> target = shared[slot(i)];
    if (target.masked()) return C(0);
    return focal_value<kPower, kSoft, kBackward>(focal, smoothing, x, target.positive == k,
                                                 target.weight, scale);
  };
  // Each thread takes every kThreads-th pack, and adds or stores its results.
  double sum = 0;
  const int64_t offset = image * level.size();
  const int classes = int(num_classes);
  if (level.channels_last) {
    const int64_t start = offset + begin * num_classes;
    const LogitSpan<T> span{level.data + start, count * classes};
    T* const span_out = kBackward ? out.data[l] + start : nullptr;
    for (int p = threadIdx.x * kSize - span.lead(); p < span.size; p += kThreads * kSize) {
      // The anchor i and class k of the pack's first element inside the span. They advance with the
      // elements.
      const int element = p < 0 ? 0 : p;
      int i = element / classes, k = element - i * classes;
      sum += map_pack<kBackward>(span, span_out, p, [&](int, C x) {
        const C result = value(i, k, x);
        if (++k == classes) {
          k = 0;
          ++i;
        }
        return result;
      });
    }
  } else {
    const int64_t plane = offset + anchor * num_classes * level.area + begin;
    // Every span gets the same number of packs. If planes are not a multiple of 16 bytes, the
    // spans' leads differ, so allow for the longest.
    const LogitSpan<T> first_span{level.data + plane, count};
    const int longest_lead = level.area % kSize == 0 ? first_span.lead() : kSize - 1;
    const int packs = (count + longest_lead + kSize - 1) / kSize;
    for (int q = threadIdx.x; q < packs * classes; q += kThreads) {
      const int k = q / packs;
      const int64_t start = plane + k * level.area;
      const LogitSpan<T> span{level.data + start, count};
      const int p = (q - k * packs) * kSize - span.lead();
      sum += map_pack<kBackward>(span, kBackward ? out.data[l] + start : nullptr, p,
                                 [&](int j, C x) { return value(p + j, k, x); });
    }
  }
  if constexpr (!kBackward) {
    const double total = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) partial[image * gridDim.x + blockIdx.x] = total;
  }
}

// Calls f(T{}, focal, power, soft), the last two as compile-time constants. Hard targets with gamma
// 2 have their own kernels. All other cases share the kernels for soft targets and any gamma.
template <typename F>
void dispatch_dense(const DenseFocalArguments& args, double alpha, double gamma, const char* op,
                    F&& f) {
  dispatch_floating(args.heads.dtype(), op, [&](auto zero) {
    const auto focal = Focal<Compute<decltype(zero)>>::make(alpha, gamma);
    if (focal.power() == Power::kTwo && !args.soft())
      f(zero, focal, std::integral_constant<Power, Power::kTwo>{}, std::false_type{});
    else
      f(zero, focal, std::integral_constant<Power, Power::kAny>{}, std::true_type{});
  });
}

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
  dispatch_dense(
      args, alpha, gamma, "dense_focal_loss", [&](auto zero, auto focal, auto power, auto soft) {
        using T = decltype(zero);
        using C = Compute<T>;
        const HeadLevels<T> levels = args.heads.view<T>();
        const FocalTiles tiles(levels, num_classes);
        const int num_tiles = tiles.first[levels.count];
        Tensor partial = torch::stable::new_empty(labels, {images, num_tiles}, ScalarType::Double);
        if (num_tiles > 0)
          launch("dense_focal_loss_kernel",
                 dense_focal_loss_kernel<T, decltype(power)::value, decltype(soft)::value, false>,
                 dim3(num_tiles, unsigned(images)), kThreads, 0, scope, levels, tiles,
                 data<int32_t>(args.labels), data<C>(args.anchor_weight), args.anchors, focal,
                 Smoothing<C>::make(label_smoothing), nullptr, LevelOutputs<T>{},
                 data<double>(partial));
        launch("sum_partials_kernel", sum_partials_kernel<C>, unsigned(images), kSumThreads, 0,
               scope, data<double>(partial), num_tiles, data<C>(out));
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
  dispatch_dense(
      args, alpha, gamma, "dense_focal_loss_backward",
      [&](auto zero, auto focal, auto power, auto soft) {
        using T = decltype(zero);
        using C = Compute<T>;
        const HeadLevels<T> levels = args.heads.view<T>();
        const FocalTiles tiles(levels, num_classes);
        const int num_tiles = tiles.first[levels.count];
        if (args.heads.images == 0 || num_tiles == 0) return;
        LevelOutputs<T> pointers;
        for (int l = 0; l < levels.count; ++l) pointers.data[l] = data<T>(out[l]);
        launch("dense_focal_loss_kernel",
               dense_focal_loss_kernel<T, decltype(power)::value, decltype(soft)::value, true>,
               dim3(num_tiles, unsigned(args.heads.images)), kThreads, 0, scope, levels, tiles,
               data<int32_t>(args.labels), data<C>(args.anchor_weight), args.anchors, focal,
               Smoothing<C>::make(label_smoothing), data<C>(scales), pointers, nullptr);
      });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("dense_focal_loss", TORCH_BOX(&dense_focal_loss_cuda));
  m.impl("dense_focal_loss_backward", TORCH_BOX(&dense_focal_loss_backward_cuda));
}

}  // namespace retinanet
