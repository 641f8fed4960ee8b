// The second pass of a sum on CUDA: adds the partial sums that the blocks of a first kernel wrote.
//
// Work: one block per row of `n` partial sums. Bytes moved: 8 per partial sum. Deterministic: each
// thread adds every kSumThreads-th number in order and the block adds its threads in a fixed order,
// all in float64.
#pragma once

#include "cuda.h"

namespace retinanet {

constexpr int kSumThreads = 256;

// out[row] = the sum of partial[row][0 .. n), for row = blockIdx.x.
template <typename C>
__global__ void __launch_bounds__(kSumThreads)
    sum_partials_kernel(const double* __restrict__ partial, int64_t n, C* __restrict__ out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) sum += partial[blockIdx.x * n + i];
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = C(sum);
}

}  // namespace retinanet
