// Ranking of candidates by their scores on CUDA.
//
// A candidate from `counts` on, or whose score is NaN or -inf, is ranked by the score -inf.
//
// Short rows: rank_by_counting_kernel counts, for each candidate, those that precede it, which is
// its place in the order. This takes C^2 comparisons, which all multiprocessors share, but a single
// launch.
//
// Long rows:
//
//     scores    [N, C]
//          |  rank_keys_kernel: a key per candidate
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
// Bytes moved: counting reads a row once per 16 candidates, from the cache. The other kernels read
// and write each element once. Deterministic: the index decides between equal scores, so no two
// candidates of a row have the same place. The keys of integers are unique, and float64 scores are
// sorted by a stable sort.
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

// The scores of one image, of which the first `count` are those of candidates.
template <typename T>
struct RankRow {
  const T* scores;
  int64_t count;

  __device__ __forceinline__ RankRow(const T* all, const int64_t* counts, int64_t image,
                                     int64_t candidates)
      : scores(all + image * candidates), count(counts ? counts[image] : candidates) {}

  // The score by which candidate i is ranked.
  __device__ __forceinline__ Compute<T> score(int64_t i) const {
    constexpr Compute<T> kNone = -std::numeric_limits<Compute<T>>::infinity();
    const Compute<T> score(scores[i]);
    return score > kNone && i < count ? score : kNone;
  }
};

// Candidates that a block of rank_by_counting_kernel ranks. Each thread compares its scores with
// all of them.
constexpr int kRankShare = 16;

// blockIdx.y is the image.
template <typename T>
__global__ void __launch_bounds__(kRankThreads, 2)
    rank_by_counting_kernel(const T* __restrict__ scores, const int64_t* __restrict__ counts,
                            int candidates, int64_t* __restrict__ order,
                            int64_t* __restrict__ valid) {
  __shared__ int places[kRankShare], all_valid;
  constexpr Compute<T> kNone = -std::numeric_limits<Compute<T>>::infinity();
  const int64_t image = blockIdx.y;
  const RankRow<T> row(scores, counts, image, candidates);
  const int first = int(blockIdx.x) * kRankShare, t = threadIdx.x;
  if (t < kRankShare) places[t] = 0;
  if (t == 0) all_valid = 0;
  Compute<T> mine[kRankShare];
  int before[kRankShare], num_valid = 0;
#pragma unroll
  for (int k = 0; k < kRankShare; ++k) {
    mine[k] = row.score(min(first + k, candidates - 1));
    before[k] = 0;
  }
  __syncthreads();
  // If scores are equal, the lower index comes first. Candidates before this share win a tie.
#pragma unroll 2
  for (int i = t; i < first; i += kRankThreads) {
    const Compute<T> score = row.score(i);
    num_valid += score > kNone;
#pragma unroll
    for (int k = 0; k < kRankShare; ++k) before[k] += score >= mine[k];
  }
#pragma unroll 2
  for (int i = first + kRankShare + t; i < candidates; i += kRankThreads) {
    const Compute<T> score = row.score(i);
    num_valid += score > kNone;
#pragma unroll
    for (int k = 0; k < kRankShare; ++k) before[k] += score > mine[k];
  }
  if (t < kRankShare && first + t < candidates) {
    const Compute<T> score = row.score(first + t);
    num_valid += score > kNone;
#pragma unroll
    for (int k = 0; k < kRankShare; ++k) before[k] += t < k ? score >= mine[k] : score > mine[k];
  }
  const int lane = t % kWarp;
#pragma unroll
  for (int k = 0; k < kRankShare; ++k) {
    const int sum = warp_sum(before[k]);
    if (lane == 0) atomicAdd(&places[k], sum);
  }
  num_valid = warp_sum(num_valid);
  if (lane == 0) atomicAdd(&all_valid, num_valid);
  __syncthreads();
  if (t < kRankShare && first + t < candidates) order[image * candidates + places[t]] = first + t;
  if (blockIdx.x == 0 && t == 0) valid[image] = all_valid;
}

template <typename T>
__global__ void __launch_bounds__(kRankThreads)
    rank_keys_kernel(const T* __restrict__ scores, const int64_t* __restrict__ counts,
                     int64_t candidates, RankKey<T>* __restrict__ keys) {
  const int64_t image = blockIdx.y, i = int64_t(blockIdx.x) * kRankThreads + threadIdx.x;
  if (i < candidates)
    keys[image * candidates + i] =
        rank_key<T>(RankRow<T>(scores, counts, image, candidates).score(i), i);
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

// Comparisons up to which counting takes less time than the 13 GPU operations of PyTorch's sort.
constexpr int64_t kMaxComparisons = int64_t(1) << 27;

// Whether to rank the rows by counting. Depends on the shape only.
inline bool is_short(int64_t images, int64_t candidates) {
  return candidates <= kMaxComparisons / candidates / images;
}

inline std::tuple<Tensor, Tensor> rank_scores_cuda(const Tensor& scores,
                                                   std::optional<Tensor> counts) {
  const char* op = "rank_scores";
  const CudaScope scope(op, scores, counts);
  const RankArguments args(scores, counts);
  Tensor order = torch::stable::new_empty(scores, {args.images, args.candidates}, ScalarType::Long);
  Tensor valid = torch::stable::new_empty(scores, {args.images}, ScalarType::Long);
  if (args.images == 0) return {order, valid};
  if (args.candidates == 0) return {order, torch::stable::fill_(valid, 0)};
  check_batch(op, args.images);
  if (is_short(args.images, args.candidates)) {
    dispatch_floating(scores.scalar_type(), op, [&](auto zero) {
      using T = decltype(zero);
      launch("rank_by_counting_kernel", rank_by_counting_kernel<T>,
             dim3(unsigned(ceil_div(args.candidates, kRankShare)), unsigned(args.images)),
             kRankThreads, 0, scope, data<T>(args.scores), data<int64_t>(args.counts),
             int(args.candidates), data<int64_t>(order), data<int64_t>(valid));
    });
    return {order, valid};
  }
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
