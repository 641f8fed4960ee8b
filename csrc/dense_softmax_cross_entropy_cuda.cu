// Softmax cross-entropy read from the heads' own tensors on CUDA.
//
// Work: a tile is kWarp anchors of one level of one image. blockIdx.y is the image. The layout of
// the level decides which threads take a logit:
//
//   contiguous: lane i takes anchor i, and           channels_last: a warp takes every kWarps-th
//   warp w takes every kWarps-th plane               row, and its lanes take the logits in turn
//
//     plane 0      ....[0|1|2| ... |31]....            row 0    [0|1|2| ... |31|0|1| ... ]
//     plane 1      ....[0|1|2| ... |31]....            row 1    [0|1|2| ... |31|0|1| ... ]
//
// The anchors of a contiguous level are numbered by anchor slot and then by cell, so a tile may
// have cells of several slots. Either way, the accesses of an instruction are to consecutive
// addresses, except at the end of a plane. Packs of 16 bytes would not fit planes and rows whose
// length is no multiple of them, such as 361 cells or 91 classes.
//
// Bytes moved per logit: the forward kernel reads it once, and a second time from the first-level
// cache. The backward kernel writes a gradient, and reads the logits of anchors that count.
//
// Deterministic: the sum of an anchor has a fixed order. Anchors are independent.
#include "common/boxes.h"  // higher
#include "common/cuda.h"
#include "dense_softmax_cross_entropy.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// The number of the first tile of each level in an image, then the number of tiles.
struct LevelTiles {
  int64_t first[kMaxLevels + 1] = {0};

  template <typename T>
  LevelTiles(const HeadLevels<T>& levels, int64_t num_classes) {
    for (int l = 0; l < levels.count; ++l)
      first[l + 1] = first[l] + ceil_div(levels.level[l].size() / num_classes, kWarp);
    check(first[levels.count] < (int64_t(1) << 31),
          "dense_softmax_cross_entropy: expected fewer than 2^31 tiles per image, got ",
          first[levels.count]);
    for (int l = levels.count; l < kMaxLevels; ++l) first[l + 1] = first[l];
  }
};

// A tile: anchors begin .. begin + count - 1 of a level of the image blockIdx.y.
template <typename T>
struct Tile {
  const HeadLevel<T>& level;
  int index;  // of the level
  int64_t num_classes, anchors, begin;
  int count;

  __device__ __forceinline__ static Tile of_block(const HeadLevels<T>& levels,
                                                  const LevelTiles& tiles, int64_t anchors,
                                                  int64_t num_classes) {
    int l = 0;
    while (int64_t(blockIdx.x) >= tiles.first[l + 1]) ++l;
    const HeadLevel<T>& level = levels.level[l];
    const int64_t begin = (int64_t(blockIdx.x) - tiles.first[l]) * kWarp;
    const int64_t left = level.size() / num_classes - begin;
    return {level, l, num_classes, anchors, begin, left < kWarp ? int(left) : kWarp};
  }

  // Where an anchor is: its number in the batch, and the offset of its first logit and the distance
  // between its logits in the level's tensor.
  struct Place {
    int64_t anchor, offset, step;
  };

  __device__ __forceinline__ Place place(int i) const {
    const int64_t number = begin + i, image = blockIdx.y;
    const int64_t first = image * anchors + level.first / num_classes;
    const int64_t start = image * level.size();
    if (level.channels_last) return {first + number, start + number * num_classes, 1};
    const int64_t slot = number / level.area, cell = number - slot * level.area;
    return {first + cell * (level.channels / num_classes) + slot,
            start + slot * num_classes * level.area + cell, level.area};
  }
};

// The maximum of an anchor's logits first, first + stride, ...; -inf without any.
template <typename T>
__device__ __forceinline__ Compute<T> most_of(const T* x, int64_t step, int first, int stride,
                                              int64_t num_classes) {
  using C = Compute<T>;
  C most = -std::numeric_limits<C>::infinity();
#pragma unroll 4
  for (int64_t k = first; k < num_classes; k += stride) most = higher(most, C(x[k * step]));
  return most;
}

// The sum of the terms of an anchor's logits first, first + stride, ...
template <typename T>
__device__ __forceinline__ Compute<T> sum_of(const T* x, int64_t step, int first, int stride,
                                             int64_t num_classes, Compute<T> most) {
  using C = Compute<T>;
  C sum = 0;
#pragma unroll 4
  for (int64_t k = first; k < num_classes; k += stride)
    sum += softmax_term<DeviceArithmetic>(most, C(x[k * step]));
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dense_softmax_cross_entropy_kernel(const __grid_constant__ HeadLevels<T> levels,
                                       const __grid_constant__ LevelTiles tiles,
                                       const int* __restrict__ targets, int64_t anchors,
                                       int64_t num_classes, Compute<T>* __restrict__ loss,
                                       Softmax<Compute<T>>* __restrict__ saved) {
  using C = Compute<T>;
  __shared__ C parts[kWarps][kWarp];
  const auto tile = Tile<T>::of_block(levels, tiles, anchors, num_classes);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto finish = [&](const typename Tile<T>::Place& at, const Softmax<C>& softmax) {
    const int target = targets[at.anchor];
    saved[at.anchor] = softmax;
    loss[at.anchor] = is_class(target, num_classes)
                          ? softmax.loss(C(tile.level.data[at.offset + target * at.step]))
                          : loss_without_class<C>(target);
  };
  if (tile.level.channels_last) {
    for (int i = warp; i < tile.count; i += kWarps) {  // the same rows in all lanes of a warp
      const auto at = tile.place(i);
      const T* x = tile.level.data + at.offset;
      C most = most_of(x, 1, lane, kWarp, num_classes);
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2)
        most = higher(most, __shfl_xor_sync(kFullMask, most, offset));
      const C sum = warp_sum(sum_of(x, 1, lane, kWarp, num_classes, most));
      if (lane == 0) finish(at, {most, sum});
    }
    return;
  }
  // Lanes behind the last anchor take the last one again, and write nothing.
  const auto at = tile.place(lane < tile.count ? lane : tile.count - 1);
  const T* x = tile.level.data + at.offset;
  parts[warp][lane] = most_of(x, at.step, warp, kWarps, num_classes);
  __syncthreads();
  C most = parts[0][lane];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) most = higher(most, parts[w][lane]);
  __syncthreads();
  parts[warp][lane] = sum_of(x, at.step, warp, kWarps, num_classes, most);
  __syncthreads();
  if (warp > 0 || lane >= tile.count) return;
  C sum = parts[0][lane];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += parts[w][lane];
  finish(at, {most, sum});
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dense_softmax_cross_entropy_backward_kernel(const Compute<T>* __restrict__ grads,
                                                const __grid_constant__ HeadLevels<T> levels,
                                                const __grid_constant__ LevelTiles tiles,
                                                const int* __restrict__ targets,
                                                const Softmax<Compute<T>>* __restrict__ saved,
                                                int64_t anchors, int64_t num_classes,
                                                const __grid_constant__ LevelOutputs<T> out) {
  using C = Compute<T>;
  const auto tile = Tile<T>::of_block(levels, tiles, anchors, num_classes);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // Sets the gradients of logits first, first + stride, ... of anchor i of the tile.
  const auto set = [&](int i, int first, int stride) {
    const auto at = tile.place(i);
    const int target = targets[at.anchor];
    const auto gradient =
        SoftmaxGradient<C>::make(saved[at.anchor], grads[at.anchor], target, num_classes);
    const T* x = tile.level.data + at.offset;
    T* to = out.data[tile.index] + at.offset;
#pragma unroll 4
    for (int64_t k = first; k < num_classes; k += stride) {
      C value = 0;
      if (gradient.counts())
        value = gradient.template of<DeviceArithmetic>(C(x[k * at.step]), k == target);
      to[k * at.step] = T(value);
    }
  };
  if (!tile.level.channels_last) {
    if (lane < tile.count) set(lane, warp, kWarps);
    return;
  }
  for (int i = warp; i < tile.count; i += kWarps) set(i, lane, kWarp);
}

// The arguments of a launch.
template <typename T>
struct CrossEntropyCall {
  const CrossEntropyArguments& args;
  HeadLevels<T> levels = args.heads.view<T>();
  LevelTiles tiles{levels, args.num_classes};

  dim3 grid() const { return dim3(unsigned(tiles.first[kMaxLevels]), unsigned(args.heads.images)); }
};

std::tuple<Tensor, Tensor> dense_softmax_cross_entropy_cuda(std::vector<Tensor> cls_logits,
                                                            const Tensor& targets,
                                                            int64_t num_classes) {
  const char* op = "dense_softmax_cross_entropy";
  const CrossEntropyArguments args(cls_logits, targets, num_classes, op);
  const CudaScope scope(op, targets, cls_logits);
  check_batch(op, args.heads.images);
  Tensor out = args.new_loss(), softmax = args.new_softmax();
  if (out.numel() == 0) return {out, softmax};
  dispatch_floating(args.heads.dtype(), op, [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const CrossEntropyCall<T> call{args};
    launch("dense_softmax_cross_entropy_kernel", dense_softmax_cross_entropy_kernel<T>, call.grid(),
           kThreads, 0, scope, call.levels, call.tiles, data<int>(args.targets), args.anchors,
           num_classes, data<C>(out), reinterpret_cast<Softmax<C>*>(data<C>(softmax)));
  });
  return {out, softmax};
}

std::vector<Tensor> dense_softmax_cross_entropy_backward_cuda(const Tensor& grad,
                                                              std::vector<Tensor> cls_logits,
                                                              const Tensor& targets,
                                                              const Tensor& softmax,
                                                              int64_t num_classes) {
  const char* op = "dense_softmax_cross_entropy_backward";
  const CrossEntropyArguments args(cls_logits, targets, num_classes, op);
  args.check_backward(grad, softmax, op);
  const CudaScope scope(op, targets, cls_logits, grad, softmax);
  check_batch(op, args.heads.images);
  const Tensor all_grads = contiguous_aligned(grad), all_softmax = contiguous_aligned(softmax);
  std::vector<Tensor> out = args.heads.empty_like();
  if (args.targets.numel() == 0) return out;
  dispatch_floating(args.heads.dtype(), op, [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const CrossEntropyCall<T> call{args};
    LevelOutputs<T> results;
    for (size_t l = 0; l < out.size(); ++l) results.data[l] = data<T>(out[l]);
    launch("dense_softmax_cross_entropy_backward_kernel",
           dense_softmax_cross_entropy_backward_kernel<T>, call.grid(), kThreads, 0, scope,
           data<C>(all_grads), call.levels, call.tiles, data<int>(args.targets),
           reinterpret_cast<const Softmax<C>*>(data<C>(all_softmax)), args.anchors, num_classes,
           results);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("dense_softmax_cross_entropy", TORCH_BOX(&dense_softmax_cross_entropy_cuda));
  m.impl("dense_softmax_cross_entropy_backward",
         TORCH_BOX(&dense_softmax_cross_entropy_backward_cuda));
}

}  // namespace retinanet
