// Sigmoid focal loss on CUDA.
//
// Work with class labels: a tile is as many whole rows as fit into 16 steps of 256 packs, of 16
// bytes of consecutive logits each, and 1,024 rows at most. focal_loss_cuda_rows.h evaluates it.
//
//   logits   | pack 0 | pack 1 |  ...  | pack 255 | pack 256 | pack 257 |  ...   | tail |
//   thread       0        1                255          0          1
//            |<-------- step 0 of a tile -------->|<-------- step 1 ---- ...
//
// A block takes one tile, or a few consecutive ones of bfloat16 logits, for which it first computes
// a table of results (focal_loss_cuda_pack.h). Work with elementwise targets: a thread handles one
// pack per step. A block takes kSteps (16) steps if it sums, else one, and further ones if the grid
// is too small for all. The last pack may be incomplete, and is then accessed element by element.
//
// Bytes moved per element: the forward pass reads the logit and, unless it sums, writes the loss.
// The backward pass reads the logit (and the incoming gradient unless it is one number) and writes
// the gradient. Both read an elementwise target, also in packs of 16 bytes, or a class label once
// per row. Deterministic: there are no atomics. Each thread adds its packs in order, a block adds
// its threads by shuffles, and a second kernel adds the blocks. All but the sum within a pack is in
// float64.
#include "common/cuda.h"
#include "common/partial_sums.h"
#include "focal_loss.h"
#include "focal_loss_cuda_rows.h"

namespace retinanet {
namespace {

constexpr int kThreads = kFocalThreads;
constexpr int kSteps = 32;          // of a tile of rows, one pack per thread each
constexpr int kElementSteps = 16;   // of a block that sums losses of elementwise targets
constexpr int kMaxTileRows = 1024;  // rows of a tile at most

// Elements [begin, begin + kSize) of x[0 .. n): one 128-bit access if all of them exist.
template <typename T>
__device__ __forceinline__ Packed<T> load_pack(const T* __restrict__ x, int64_t begin, int64_t n) {
  if (begin + Packed<T>::kSize <= n) return load_packed(x + begin);
  Packed<T> pack;
#pragma unroll
  for (int j = 0; j < Packed<T>::kSize; ++j) {
    if (begin + j < n) pack.v[j] = x[begin + j];
  }
  return pack;
}

template <typename T>
__device__ __forceinline__ void store_pack(T* __restrict__ out, const Packed<T>& pack,
                                           int64_t begin, int64_t n) {
  if (begin + Packed<T>::kSize <= n) return stream_packed(out + begin, pack);
#pragma unroll
  for (int j = 0; j < Packed<T>::kSize; ++j) {
    if (begin + j < n) out[begin + j] = pack.v[j];
  }
}

// The incoming gradient, of the logits' dtype or, if it is one number, maybe of the compute dtype.
struct FocalGrad {
  const void* data;
  bool of_logits;  // whether it has the logits' dtype

  template <typename T>
  __device__ __forceinline__ Compute<T> shared() const {
    return of_logits ? Compute<T>(*static_cast<const T*>(data))
                     : *static_cast<const Compute<T>*>(data);
  }
  template <typename T>
  __device__ __forceinline__ const T* each() const {
    return static_cast<const T*>(data);
  }
};

// What a kernel makes of the logits.
enum class Result {
  kSum,              // the sum of the losses of each block
  kLosses,           // the loss of each logit
  kGradients,        // the gradient of each logit, for one incoming gradient
  kGradientsOfEach,  // the gradient of each logit, for an incoming gradient of each loss
};

// ---- Class labels ------------------------------------------------------------------------------

// How the rows are cut into tiles: whole rows, or parts of rows of very many classes.
struct RowTiles {
  int64_t logits, num_classes;
  int rows;       // rows of a tile, or 0 if tiles are parts of rows
  int size;       // logits of a tile
  int per_block;  // tiles that a block takes
  int64_t count;

  template <typename T>
  static RowTiles make(int64_t logits, int64_t num_classes, bool one_scale) {
    const int64_t most = kSteps * kThreads * Packed<T>::kSize;
    const int rows = int(std::min<int64_t>(most / num_classes, kMaxTileRows));
    const int size = int(rows > 0 ? rows * num_classes : most);
    const int64_t count = ceil_div(logits, size);
    return {logits, num_classes, rows, size, one_scale ? tiles_per_block<T>(count) : 1, count};
  }

  int64_t blocks() const { return ceil_div(count, per_block); }
};

// Labels of the rows, int32 or int64.
struct RowLabels {
  const void* data;
  bool wide;

  template <typename C>
  __device__ __forceinline__ RowTarget<C> target(int64_t row, int64_t num_classes) const {
    const int64_t label = wide ? static_cast<const int64_t*>(data)[row]
                               : int64_t(static_cast<const int32_t*>(data)[row]);
    return RowTarget<C>::make(label, num_classes, C(1));
  }
};

// Writes the sum of each block to `partial`, or one result per logit to `out`.
// 128-bit accesses: 1 load, 0 stores (kSum; the others also store)
// 128-bit loops: loads and stores
// Hot loop: one loop over packs takes nearly all of the time
template <typename T, Power kPower, Result kResult>
__global__ void __launch_bounds__(kThreads, kFocalBlocks<T, kPower, true>)
    focal_loss_rows_kernel(const T* __restrict__ x, RowLabels labels, RowTiles tiles,
                           const Compute<T>* __restrict__ pos_weight,
                           FocalFormula<Compute<T>, kPower, false> formula, FocalGrad grad,
                           T* __restrict__ out, double* __restrict__ partial) {
  using C = Compute<T>;
  constexpr bool kGrad = kResult >= Result::kGradients, kStores = kResult != Result::kSum;
  constexpr bool kEach = kResult == Result::kGradientsOfEach;
  using Packs = FocalPacks<T, kPower, false, kGrad, !kEach>;
  __shared__ RowTarget<C> targets[kMaxTileRows];
  __shared__ typename Packs::BlockMemory block_memory;

  const C scale = kGrad && !kEach ? grad.shared<T>() : C(1);
  Packs packs{formula, pos_weight};
  packs.prepare(scale, block_memory);
  const int64_t begin_tile = int64_t(blockIdx.x) * tiles.per_block;
  const int64_t end_tile =
      begin_tile + tiles.per_block < tiles.count ? begin_tile + tiles.per_block : tiles.count;
  double sum = 0;
#pragma unroll 1
  for (int64_t tile = begin_tile; tile < end_tile; ++tile) {
    const int64_t begin = tile * tiles.size, left = tiles.logits - begin;
    const int size = left < tiles.size ? int(left) : tiles.size;
    const int64_t row = tiles.rows > 0 ? tile * tiles.rows : begin / tiles.num_classes;
    const int first_class = int(begin - row * tiles.num_classes);
    const int rows =
        int((unsigned(first_class) + unsigned(size) - 1) / unsigned(tiles.num_classes)) + 1;
    __syncthreads();  // an earlier tile may still be in use
#pragma unroll 1
    for (int i = threadIdx.x; i < rows; i += kThreads)
      targets[i] = packs.prepared(labels.target<C>(row + i, tiles.num_classes), scale);
    __syncthreads();
    sum += evaluate_rows<kStores>(
        packs.ready(), x + begin, kStores ? out + begin : nullptr, size, first_class,
        int(tiles.num_classes), targets,
        IncomingGrad<T, kEach>{scale, kEach ? grad.each<T>() + begin : nullptr});
  }
  if constexpr (kResult == Result::kSum) {
    const double total = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
  }
}

// ---- Elementwise targets -----------------------------------------------------------------------

// The class at a place in a period of classes, or a few places behind its end.
template <typename C>
__device__ __forceinline__ unsigned class_at(const ElementRules<C>& rules, unsigned place) {
  const unsigned in_period = place - rules.by_period.quotient(place) * unsigned(rules.period);
  return rules.by_inner.quotient(in_period);
}

// The targets of one pack, and the results that they give. Targets of 0 and 1 take the same formula
// as class labels, so that both give the same results.
template <typename C, Power kPower, int kSize, typename Target>
struct PackTargets {
  static constexpr int kPart = Packed<Target>::kSize;
  // Several packs if Target is wider than the logits.
  Packed<Target> parts[kSize / kPart];

  __device__ __forceinline__ PackTargets(const Target* __restrict__ targets, int64_t begin,
                                         int64_t n) {
#pragma unroll
    for (int i = 0; i < kSize / kPart; ++i) parts[i] = load_pack(targets, begin + i * kPart, n);
  }

  // The loss of x, which is the j-th element and belongs to class k, or its derivative times
  // `scale`.
  template <bool kGrad>
  __device__ __forceinline__ C result(const FocalFormula<C, kPower, false>& formula,
                                      const ElementRules<C>& rules, C x, int j, unsigned k,
                                      C scale) const {
    const C t = C(parts[j / kPart].v[j % kPart]);
    const C factor = rules.pos_weight ? factor_of_target(rules.pos_weight[k], t) : C(1);
    if (t == rules.ignored || factor == C(0)) return C(0);
    if (t == C(0) || t == C(1))
      return kGrad ? formula.grad(x, t == C(1), factor * scale)
                   : factor * formula.loss(x, t == C(1));
    const C e = exp_minus<DeviceArithmetic>(std::abs(x));
    if constexpr (kGrad)
      return formula.focal.template soft_grad<kPower, DeviceArithmetic>(x, e, t, factor * scale);
    return factor * formula.focal.template soft_loss<kPower, DeviceArithmetic>(x, e, t);
  }
};

// Writes the sum of each block to `partial`, or one result per logit to `out`.
// 128-bit accesses: 2 loads, 0 stores (kSum; the others also store)
// 128-bit loops: loads and stores
template <typename T, typename Target, Power kPower, Result kResult>
__global__ void __launch_bounds__(kThreads)
    focal_loss_elements_kernel(const T* __restrict__ x, const Target* __restrict__ targets,
                               int64_t n, ElementRules<Compute<T>> rules,
                               FocalFormula<Compute<T>, kPower, false> formula, FocalGrad grad,
                               T* __restrict__ out, double* __restrict__ partial) {
  using C = Compute<T>;
  constexpr bool kGrad = kResult >= Result::kGradients, kEach = kResult == Result::kGradientsOfEach;
  constexpr int kSize = Packed<T>::kSize, kStep = kThreads * kSize;
  const C scale = kGrad && !kEach ? grad.shared<T>() : C(1);
  // The steps of this block, as elements from `first` to `last`, `stride` apart.
  const int64_t first = int64_t(blockIdx.x) * kStep * (kResult == Result::kSum ? kElementSteps : 1);
  const int64_t last = kResult == Result::kSum ? first + kStep * kElementSteps : n;
  const int64_t stride = kResult == Result::kSum ? kStep : int64_t(gridDim.x) * kStep;
  double sum = 0;
  int64_t begin = first + threadIdx.x * kSize;
  // Where the pack starts in a period of classes, and how much further on the next pack does.
  // Without factors of classes, both stay 0.
  const unsigned period = unsigned(rules.period);
  unsigned place = rules.pos_weight ? unsigned(begin % period) : 0u;
  const unsigned ahead = rules.pos_weight ? unsigned(stride % period) : 0u;
#pragma unroll 1
  for (; begin < last && begin < n; begin += stride) {
    const Packed<T> pack = load_pack(x, begin, n);
    const PackTargets<C, kPower, kSize, Target> pack_targets(targets, begin, n);
    Packed<T> grads, results;
    if constexpr (kEach) grads = load_pack(grad.each<T>(), begin, n);
    C pack_sum = 0;  // a pack is short enough to be summed in the compute type
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (begin + j >= n) break;
      const unsigned k = rules.pos_weight ? class_at(rules, place + j) : 0u;
      const C result = pack_targets.template result<kGrad>(formula, rules, C(pack.v[j]), j, k,
                                                           kEach ? C(grads.v[j]) : scale);
      if constexpr (kResult == Result::kSum) {
        pack_sum += result;
      } else {
        results.v[j] = T(result);
      }
    }
    if constexpr (kResult == Result::kSum) {
      sum += pack_sum;
    } else {
      store_pack(out, results, begin, n);
    }
    place = min(place + ahead, place + ahead - period);  // without a branch
  }
  if constexpr (kResult == Result::kSum) {
    const double total = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
  }
}

// ---- Launches ----------------------------------------------------------------------------------

// The number of blocks of the kernel for elementwise targets.
template <typename T, Result kResult>
int64_t element_blocks(int64_t n) {
  const int64_t steps = ceil_div(n, kThreads * Packed<T>::kSize);
  return kResult == Result::kSum ? ceil_div(steps, kElementSteps)
                                 : std::min<int64_t>(steps, (int64_t(1) << 31) - 1);
}

// The tensors and numbers of a call.
struct FocalCall {
  const CudaScope& scope;
  const Tensor& x;
  FocalGrad grad;
  Tensor& out;  // the sum in the compute dtype (kSum), or a tensor like x
};

// Launches a kernel of this many blocks and, for a sum, the kernel that adds their sums.
template <Result kResult, typename T, typename Kernel, typename Formula, typename... Arguments>
void launch_blocks(const char* name, Kernel kernel, int64_t blocks, FocalCall& call,
                   const Formula& formula, const Arguments&... arguments) {
  using C = Compute<T>;
  constexpr bool kSum = kResult == Result::kSum;
  const int64_t shape[] = {kSum ? blocks : 0};
  Tensor partial = torch::stable::new_empty(call.x, shape, ScalarType::Double);
  T* const out = kSum ? nullptr : static_cast<T*>(call.out.mutable_data_ptr());
  launch(name, kernel, unsigned(blocks), kThreads, 0, call.scope, data<T>(call.x), arguments...,
         formula, call.grad, out, data<double>(partial));
  if (kSum)
    launch("sum_partials_kernel", sum_partials_kernel<C>, 1, kSumThreads, 0, call.scope,
           data<double>(partial), blocks, static_cast<C*>(call.out.mutable_data_ptr()));
}

template <Result kResult, typename T, Power kPower, typename Label>
void run_targets(FocalCall& call, const ClassTargets<Compute<T>, Label>& targets,
                 const FocalFormula<Compute<T>, kPower, false>& formula) {
  const RowTiles tiles =
      RowTiles::make<T>(call.x.numel(), targets.num_classes, kResult != Result::kGradientsOfEach);
  const RowLabels labels{targets.labels, sizeof(Label) == 8};
  launch_blocks<kResult, T>("focal_loss_rows_kernel", focal_loss_rows_kernel<T, kPower, kResult>,
                            tiles.blocks(), call, formula, labels, tiles, targets.pos_weight);
}

template <Result kResult, typename T, Power kPower, typename Target>
void run_targets(FocalCall& call, const ElementTargets<Target>& targets,
                 const FocalFormula<Compute<T>, kPower, false>& formula) {
  const int64_t n = call.x.numel();
  launch_blocks<kResult, T>(
      "focal_loss_elements_kernel", focal_loss_elements_kernel<T, Target, kPower, kResult>,
      element_blocks<T, kResult>(n), call, formula, targets.data, n, targets.rules);
}

template <Result kResult>
void run(FocalCall call, const FocalTargets& given, double alpha, double gamma, const char* op) {
  dispatch_focal(call.x, given, op, [&](auto zero, const auto view) {
    using T = decltype(zero);
    using C = Compute<T>;
    // Gamma 2 has its own kernels. All other gammas share those of kAny.
    const auto focal = Focal<C>::make(alpha, gamma);
    if (focal.power() == Power::kTwo)
      run_targets<kResult, T>(call, view, FocalFormula<C, Power::kTwo, false>{focal});
    else
      run_targets<kResult, T>(call, view, FocalFormula<C, Power::kAny, false>{focal});
  });
}

Tensor sigmoid_focal_loss_cuda(const Tensor& inputs, const Tensor& targets,
                               std::optional<Tensor> pos_weight, double alpha, double gamma,
                               std::optional<double> ignore_value, bool reduce) {
  const CudaScope scope("sigmoid_focal_loss", inputs, targets, pos_weight);
  const FocalTargets given("sigmoid_focal_loss", inputs, targets, pos_weight, ignore_value);
  const Tensor x = contiguous_aligned(inputs);
  Tensor out = reduce ? torch::stable::new_empty(x, {}, FocalTargets::compute_type(x))
                      : torch::stable::empty_like(x);
  if (x.numel() == 0) return reduce ? torch::stable::fill_(out, 0) : out;
  const auto run_result = reduce ? run<Result::kSum> : run<Result::kLosses>;
  run_result({scope, x, {}, out}, given, alpha, gamma, "sigmoid_focal_loss");
  return out;
}

Tensor sigmoid_focal_loss_backward_cuda(const Tensor& grad, const Tensor& inputs,
                                        const Tensor& targets, std::optional<Tensor> pos_weight,
                                        double alpha, double gamma,
                                        std::optional<double> ignore_value) {
  const char* op = "sigmoid_focal_loss_backward";
  const CudaScope scope(op, inputs, grad, targets, pos_weight);
  const FocalTargets given(op, inputs, targets, pos_weight, ignore_value);
  check_focal_loss_grad(grad, inputs, op);
  const Tensor g = contiguous_aligned(grad), x = contiguous_aligned(inputs);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  const auto run_result = g.dim() == 0 ? run<Result::kGradients> : run<Result::kGradientsOfEach>;
  const FocalGrad incoming{g.const_data_ptr(), g.scalar_type() == x.scalar_type()};
  run_result({scope, x, incoming, out}, given, alpha, gamma, op);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss_cuda));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward_cuda));
}

}  // namespace retinanet
