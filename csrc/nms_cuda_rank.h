// Ranking of candidates by their scores on CUDA, with PyTorch's sort.
//
//     scores    [N, C]
//          |  rank_keys_kernel: one key per candidate. A candidate from `counts` on, or whose score
//          |  is NaN or -inf, gets the key of score -inf.
//          v
//     keys      [N, C]    64-bit integers that hold the score and the index; for float64 scores,
//          |              the scores themselves
//          |  PyTorch's sort, descending
//          v
//     keys      [N, C]
//          |  rank_order_kernel: the indices, and where the valid candidates of a row end.
//          v
//     order     [N, C], valid [N]
//
// Bytes moved: both kernels read and write each element once. Deterministic: the keys of integers
// are unique, and float64 scores are sorted by a stable sort.
#pragma once

#include "common/cuda.h"
#include "common/ranking_key.h"
#include "common/sort_rows.h"
#include "nms.h"

namespace retinanet {

constexpr int kRankThreads = 256;

// The type of the keys of scores of type T.
template <typename T>
using RankKey = std::conditional_t<std::is_same_v<T, double>, double, int64_t>;

template <typename T>
HOST_DEVICE RankKey<T> rank_key(Compute<T> score, int64_t index) {
  if constexpr (std::is_same_v<T, double>) {
    return score + 0.0;  // turns -0 into 0, which the sort may tell from 0
  } else {
    return ranking_key(score, uint32_t(index));
  }
}

// Whether a key belongs to a score above -inf.
HOST_DEVICE bool is_valid_key(double key) { return key > -std::numeric_limits<double>::infinity(); }
HOST_DEVICE bool is_valid_key(int64_t key) {
  return key_value(key) > -std::numeric_limits<float>::infinity();
}

template <typename T>
__global__ void __launch_bounds__(kRankThreads)
    rank_keys_kernel(const T* __restrict__ scores, const int64_t* __restrict__ counts,
                     int64_t candidates, RankKey<T>* __restrict__ keys) {
  const int64_t image = blockIdx.y, i = int64_t(blockIdx.x) * kRankThreads + threadIdx.x;
  if (i >= candidates) return;
  constexpr Compute<T> kNone = -std::numeric_limits<Compute<T>>::infinity();
  const Compute<T> score(scores[image * candidates + i]);
  const bool valid = score > kNone && (!counts || i < counts[image]);
  keys[image * candidates + i] = rank_key<T>(valid ? score : kNone, i);
}

// Integers hold their indices. For float64 scores, `order` is there already, and stays as it is.
template <typename Key>
__global__ void __launch_bounds__(kRankThreads)
    rank_order_kernel(const Key* __restrict__ keys, int64_t candidates, int64_t* __restrict__ order,
                      int64_t* __restrict__ valid) {
  const int64_t image = blockIdx.y, i = int64_t(blockIdx.x) * kRankThreads + threadIdx.x;
  if (i >= candidates) return;
  const Key* row = keys + image * candidates;
  const Key key = row[i];
  if constexpr (std::is_same_v<Key, int64_t>) order[image * candidates + i] = key_index(key);
  // One thread of the row finds the end of the valid candidates.
  const bool is_valid = is_valid_key(key);
  if (i == 0 && !is_valid) valid[image] = 0;
  if (is_valid && (i + 1 == candidates || !is_valid_key(row[i + 1]))) valid[image] = i + 1;
}

inline std::tuple<Tensor, Tensor> rank_scores_cuda(const Tensor& scores,
                                                   std::optional<Tensor> counts) {
  const char* op = "rank_scores";
  const CudaScope scope(op, scores, counts);
  const RankArguments args(scores, counts);
  Tensor order = torch::stable::new_empty(scores, {args.images, args.candidates}, ScalarType::Long);
  Tensor valid = torch::stable::new_zeros(scores, {args.images}, ScalarType::Long);
  if (args.images == 0 || args.candidates == 0) return {order, valid};
  check_batch(op, args.images);
  const dim3 grid(unsigned(ceil_div(args.candidates, kRankThreads)), unsigned(args.images));
  dispatch_floating(scores.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using Key = RankKey<T>;
    constexpr bool kIsDouble = std::is_same_v<T, double>;
    const int64_t keys_shape[] = {args.images, args.candidates};
    Tensor keys = torch::stable::new_empty(scores, keys_shape,
                                           kIsDouble ? ScalarType::Double : ScalarType::Long);
    launch("rank_keys_kernel", rank_keys_kernel<T>, grid, kRankThreads, 0, scope,
           data<T>(args.scores), data<int64_t>(args.counts), args.candidates, data<Key>(keys));
    auto [sorted, columns] = sort_descending(keys, kIsDouble);
    if constexpr (kIsDouble) order = columns;
    launch("rank_order_kernel", rank_order_kernel<Key>, grid, kRankThreads, 0, scope,
           data<Key>(std::as_const(sorted)), args.candidates, data<int64_t>(order),
           data<int64_t>(valid));
  });
  return {order, valid};
}

}  // namespace retinanet
