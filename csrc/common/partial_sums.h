// The second pass of sums on CUDA: the blocks' partial sums, in a fixed order, in float64.
#pragma once

#include "cuda.h"

namespace retinanet {

constexpr int kSumThreads = 256;

// out[row] = the sum of the n numbers of row blockIdx.x.
template <typename C>
__global__ void __launch_bounds__(kSumThreads)
    sum_partials_kernel(const double* __restrict__ partial, int64_t n, C* __restrict__ out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) sum += partial[blockIdx.x * n + i];
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = C(sum);
}

}  // namespace retinanet
