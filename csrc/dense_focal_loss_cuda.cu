// Focal loss of the heads' own tensors on CUDA.
//
// Work: a block takes a tile, kCells anchors or fewer with all their classes: of a contiguous level
// neighbouring cells of one anchor, whose logits are a run in each of K planes; of a channels_last
// level consecutive rows, whose logits are one run.  The anchors' labels and weights go to shared
// memory once; then each thread takes 16 bytes of logits at a time, aligned, whatever the shape.
// Bytes moved: each logit once, forward; once more and the gradient once, backward; 4 bytes of
// label (and 4 of weight) per anchor and pass.  Deterministic: each thread sums its packs in order,
// a block its threads by shuffles, and a second kernel the tiles of an image, in float64.
#include "dense_focal_loss.h"
#include "focal_loss_packs.h"

namespace retinanet {
namespace {

constexpr int kCells = 256;                // anchors of a tile at most
constexpr int64_t kRowElements = 1 << 15;  // elements of a tile of rows, about

// Tiles of one image, and where each level's begin.
struct FocalTiles {
  int64_t num_classes;
  int rows;  // of a tile of a channels_last level
  int first[kMaxLevels + 1] = {0};

  template <typename T>
  FocalTiles(const HeadLevels<T>& levels, int64_t num_classes_)
      : num_classes(num_classes_),
        rows(int(std::clamp<int64_t>(kRowElements / num_classes_, 1, kCells))) {
    for (int l = 0; l < levels.count; ++l) {
      const HeadLevel<T>& level = levels.level[l];
      const int64_t per_cell = level.channels / num_classes;
      const int64_t tiles = level.channels_last ? ceil_div(level.area * per_cell, rows)
                                                : per_cell * ceil_div(level.area, kCells);
      check(first[l] + tiles < (int64_t(1) << 31), "dense_focal_loss: too many anchors");
      first[l + 1] = first[l] + int(tiles);
    }
  }
};

template <typename C>
struct FocalRule {
  Focal<C> focal;
  C positive, negative;  // targets, if they are soft
};

// What an anchor's label means, in shared memory; without padding, which nothing would initialise.
template <typename C>
struct alignas(2 * sizeof(C)) AnchorTarget {
  std::conditional_t<sizeof(C) == 8, int64_t, int32_t> positive;  // kDead: its results are 0
  C weight;
};

// A run of consecutive logits; packs start at multiples of 16 bytes, the first one maybe before the
// run.
template <typename T>
struct Run {
  static constexpr int kSize = Packed<T>::kSize;
  const T* x;
  int size;

  __device__ __forceinline__ int lead() const {
    return int(reinterpret_cast<uintptr_t>(x) / sizeof(T) % kSize);
  }
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
  __device__ __forceinline__ void store(T* __restrict__ out, int begin,
                                        const Packed<T>& pack) const {
    if (whole(begin)) return store_packed(out + begin, pack);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (begin + j >= 0 && begin + j < size) out[begin + j] = pack.v[j];
    }
  }
};

// Losses or scaled gradients of one pack after another.
template <typename T, Power kPower, bool kSoft, bool kBackward>
struct PackWorker {
  using C = Compute<T>;
  const FocalRule<C>& rule;
  C scale;
  double sum = 0;

  // Forward adds the losses of a pack up; backward writes its gradients to `out`, beside run.x.
  // target(j) is called for the elements of the run in order, and says which anchor target holds,
  // and whether the element's class is the positive one.
  template <typename Target>
  __device__ __forceinline__ void operator()(const Run<T>& run, T* __restrict__ out, int begin,
                                             Target&& target) {
    constexpr int kSize = Packed<T>::kSize;
    Packed<T> pack = run.load(begin);
    C total = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (begin + j < 0 || begin + j >= run.size) continue;
      const auto [hit, weight, dead] = target(j);
      const C value = dead ? C(0) : element(C(pack.v[j]), hit, weight);
      if constexpr (kBackward) {
        pack.v[j] = T(value);
      } else {
        total += value;
      }
    }
    if constexpr (kBackward) {
      run.store(out, begin, pack);
    } else {
      sum += total;
    }
  }

 private:
  __device__ __forceinline__ C element(C x, bool hit, C weight) const {
    const C e = exp_minus<M>(std::abs(x));
    if constexpr (kSoft) {
      const C t = hit ? rule.positive : rule.negative;
      if constexpr (kBackward)
        return rule.focal.template soft_grad<kPower, M>(x, e, t, scale * weight);
      return weight * rule.focal.template soft_loss<kPower, M>(x, e, t);
    } else {
      if constexpr (kBackward)
        return rule.focal.template grad<kPower, M>(x, e, hit, scale * weight);
      return weight * rule.focal.template loss<kPower, M>(x, e, hit);
    }
  }
};

template <typename C>
struct ElementTarget {
  bool hit;
  C weight;
  bool dead;
};

// `labels` and `weights` (or null) of all images' anchors; `grad` of each image; `out` of each
// level, backward; `partial` of each tile, forward.
// 128-bit accesses: 1 load, 0 stores (forward; backward also stores)
template <typename T, Power kPower, bool kSoft, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    dense_focal_loss_kernel(const __grid_constant__ HeadLevels<T> levels,
                            const __grid_constant__ FocalTiles tiles,
                            const int32_t* __restrict__ labels,
                            const Compute<T>* __restrict__ weights, int64_t anchors,
                            FocalRule<Compute<T>> rule, const Compute<T>* __restrict__ grad,
                            const __grid_constant__ LevelOutputs<T> out,
                            double* __restrict__ partial) {
  using C = Compute<T>;
  constexpr int kSize = Packed<T>::kSize;
  // Neighbouring lanes take neighbouring packs: the targets of elements at the same place of their
  // packs lie side by side, in different banks.
  constexpr int kStride = kCells / kSize + 1;
  __shared__ AnchorTarget<C> shared[kSize * kStride];
  const auto slot = [](int cell) { return cell % kSize * kStride + cell / kSize; };

  const int64_t image = blockIdx.y;
  int l = 0;
  while (int(blockIdx.x) >= tiles.first[l + 1]) ++l;
  const HeadLevel<T>& level = levels.level[l];
  const int64_t num_classes = tiles.num_classes, per_cell = level.channels / num_classes;
  const int tile = int(blockIdx.x) - tiles.first[l];

  // The anchors of the tile: `count` of them, from `first` on, `step` apart.
  const int per_anchor = level.channels_last ? 0 : int(ceil_div(level.area, kCells));
  const int64_t anchor = level.channels_last ? 0 : tile / per_anchor;
  const int64_t begin = level.channels_last ? int64_t(tile) * tiles.rows
                                            : int64_t(tile - anchor * per_anchor) * kCells;
  const int64_t left = (level.channels_last ? level.area * per_cell : level.area) - begin;
  const int most = level.channels_last ? tiles.rows : kCells;
  const int count = left < most ? int(left) : most;
  const int64_t step = level.channels_last ? 1 : per_cell;
  const int64_t row = image * anchors + level.first / num_classes + begin * step + anchor;
  const ClassTargets<C, int32_t> targets{labels, num_classes, weights};
  if (int(threadIdx.x) < count) {
    const RowTarget<C> target = targets.row(row + threadIdx.x * step);
    shared[slot(threadIdx.x)] = {target.dead ? kDead : target.positive, target.weight};
  }
  __syncthreads();

  PackWorker<T, kPower, kSoft, kBackward> work{rule, kBackward ? grad[image] : C(0)};
  const int64_t offset = image * level.size();
  const int classes = int(num_classes);
  if (level.channels_last) {
    const int64_t start = offset + begin * num_classes;
    const Run<T> run{level.data + start, count * classes};
    const int lead = run.lead();
    for (int p = threadIdx.x * kSize - lead; p < run.size; p += kThreads * kSize) {
      const int element = p < 0 ? 0 : p;
      int cell = element / classes, k = element - cell * classes;
      work(run, kBackward ? out.data[l] + start : nullptr, p, [&](int) {
        const AnchorTarget<C> target = shared[slot(cell)];
        const ElementTarget<C> result{target.positive == k, target.weight,
                                      target.positive == kDead};
        if (++k == classes) {
          k = 0;
          ++cell;
        }
        return result;
      });
    }
  } else {
    const int64_t plane = offset + anchor * num_classes * level.area + begin;
    // Where planes do not start at the same place of a pack, each may need one pack more.
    const Run<T> first_run{level.data + plane, count};
    const int lead_at_most = level.area % kSize == 0 ? first_run.lead() : kSize - 1;
    const int packs = (count + lead_at_most + kSize - 1) / kSize;
    for (int q = threadIdx.x; q < packs * classes; q += kThreads) {
      const int k = q / packs;
      const int64_t start = plane + k * level.area;
      const Run<T> run{level.data + start, count};
      const int p = (q - k * packs) * kSize - run.lead();
      work(run, kBackward ? out.data[l] + start : nullptr, p, [&](int j) {
        const AnchorTarget<C> target = shared[slot(p + j)];
        return ElementTarget<C>{target.positive == k, target.weight, target.positive == kDead};
      });
    }
  }
  if constexpr (!kBackward) {
    const double total = block_sum<kThreads>(work.sum);
    if (threadIdx.x == 0) partial[image * gridDim.x + blockIdx.x] = total;
  }
}

// Calls f(T{}, power, soft): hard targets with gamma 2 have kernels of their own; those of soft
// ones serve all the rest.
template <typename F>
void dispatch_dense(const DenseFocalArguments& args, double alpha, double gamma, const char* op,
                    F&& f) {
  dispatch_floating(args.heads.dtype(), op, [&](auto zero) {
    using C = Compute<decltype(zero)>;
    const FocalRule<C> rule{Focal<C>::make(alpha, gamma), C(args.smoothing.positive),
                            C(args.smoothing.negative)};
    if (rule.focal.power() == Power::kTwo && args.smoothing.none())
      f(zero, rule, std::integral_constant<Power, Power::kTwo>{}, std::false_type{});
    else
      f(zero, rule, std::integral_constant<Power, Power::kAny>{}, std::true_type{});
  });
}

Tensor dense_focal_loss_cuda(std::vector<Tensor> cls_logits, const Tensor& labels,
                             std::optional<Tensor> weight, int64_t num_classes, double alpha,
                             double gamma, double label_smoothing) {
  const DenseFocalArguments args(cls_logits, labels, weight, num_classes, label_smoothing,
                                 "dense_focal_loss");
  const CudaScope scope(labels);
  const int64_t images = args.heads.images;
  Tensor out = torch::stable::new_empty(labels, {images}, args.heads.compute_dtype());
  if (images == 0) return out;
  check_batch("dense_focal_loss", images);
  dispatch_dense(
      args, alpha, gamma, "dense_focal_loss", [&](auto zero, auto rule, auto power, auto soft) {
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
                 data<int32_t>(args.labels), data<C>(args.weight), args.anchors, rule, nullptr,
                 LevelOutputs<T>{}, data<double>(partial));
        launch("sum_partials_kernel", sum_partials_kernel<C>, unsigned(images), kSumThreads, 0,
               scope, data<double>(partial), num_tiles, data<C>(out));
      });
  return out;
}

std::vector<Tensor> dense_focal_loss_backward_cuda(const Tensor& grad,
                                                   std::vector<Tensor> cls_logits,
                                                   const Tensor& labels,
                                                   std::optional<Tensor> weight,
                                                   int64_t num_classes, double alpha, double gamma,
                                                   double label_smoothing) {
  const DenseFocalArguments args(cls_logits, labels, weight, num_classes, label_smoothing,
                                 "dense_focal_loss_backward");
  args.heads.check_grad(grad, "dense_focal_loss_backward");
  const CudaScope scope(labels);
  const Tensor scales = contiguous_aligned(grad);
  std::vector<Tensor> out = args.heads.empty_like();
  check_batch("dense_focal_loss_backward", args.heads.images);
  dispatch_dense(
      args, alpha, gamma, "dense_focal_loss_backward",
      [&](auto zero, auto rule, auto power, auto soft) {
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
               data<int32_t>(args.labels), data<C>(args.weight), args.anchors, rule,
               data<C>(scales), pointers, nullptr);
      });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("dense_focal_loss", TORCH_BOX(&dense_focal_loss_cuda));
  m.impl("dense_focal_loss_backward", TORCH_BOX(&dense_focal_loss_backward_cuda));
}

}  // namespace retinanet
