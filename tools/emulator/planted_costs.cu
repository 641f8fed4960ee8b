// Kernels that waste a GPU's time, each in one way, and `even`, which does the same work well.
// tests/tools/test_kernel_times.py checks that the cost model reports each waste. They evaluate a
// polynomial many times for each element, so that issue binds `even`.
// The last two kernels load four values per thread, which overlap in one of them only. `packs`
// loops over packs of 16 bytes, a few of which take a longer way. `steps` does so with a barrier
// after four packs.
#include <functional>
#include <map>
#include <vector>

#include "emulator.h"
#include "planted_costs.h"

namespace {

constexpr int kThreads = 256, kSteps = 500;

template <int kExtra>
float evaluate(float x) {
  float sum = 0;
  for (int i = 0; i < kSteps * (100 + kExtra) / 100; ++i) sum = sum * x + 1;
  return sum;
}

__global__ void even(const float* in, float* out, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = evaluate<0>(in[i]);
}

__global__ void more_instructions(const float* in, float* out, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = evaluate<20>(in[i]);
}

__global__ void one_block(const float* in, float* out, int n) {
  for (int i = int(threadIdx.x); i < n; i += kThreads) out[i] = evaluate<0>(in[i]);
}

// The first warp does the work of all eight.
__global__ void one_warp(const float* in, float* out, int n) {
  const int first = int(blockIdx.x * blockDim.x);
  if (threadIdx.x >= 32) return;
  for (int i = int(threadIdx.x); i < kThreads; i += 32)
    if (first + i < n) out[first + i] = evaluate<0>(in[first + i]);
}

struct alignas(16) Pack {
  float v[4];
};

__global__ void packs(const float* in, float* out, int n) {
  const int first = int(blockIdx.x * blockDim.x + threadIdx.x) * 4;
  float sum = evaluate<0>(1.f);  // outside the loop
  for (int i = first; i < n; i += int(gridDim.x * blockDim.x) * 4) {
    const Pack pack = *reinterpret_cast<const Pack*>(in + i);
    for (float v : pack.v) sum = sum * v + 1;
    if (i < kThreads * 4) sum += evaluate<0>(sum);
  }
  out[first / 4] = sum;
}

// Loads four packs between two barriers.
__global__ void steps(const float* in, float* out, int n) {
  const int step = int(gridDim.x * blockDim.x) * 16;
  float sum = 0;
  for (int i = 0; i < n; i += step) {
    for (int k = 0; k < 4; ++k) {
      const int place =
          i + ((k * int(gridDim.x) + int(blockIdx.x)) * int(blockDim.x) + int(threadIdx.x)) * 4;
      const Pack pack = *reinterpret_cast<const Pack*>(in + place % n);
      for (float v : pack.v) sum = sum * v + 1;
    }
    sum = evaluate<0>(sum);
    __syncthreads();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

__global__ void independent_loads(const float* in, float* out, int n) {
  float sum = 0;
  for (int k = 0; k < 4; ++k) {
    const int i = (k * int(blockDim.x) + int(threadIdx.x)) * 16;
    if (i < n) sum += in[i];
  }
  out[threadIdx.x] = sum;
}

__global__ void dependent_loads(const float* in, float* out, int n) {
  int i = int(threadIdx.x) * 16;
  for (int k = 0; k < 4; ++k)
    if (i < n) i += 16 * int(blockDim.x) + int(in[i]);
  out[threadIdx.x] = float(i);
}

}  // namespace

void run_planted_cost(const std::string& name) {
  const int n = 1 << 21, few = 1 << 12;
  std::vector<float> in(n, 0.5f), out(n);
  const auto launch = [&](auto kernel, int elements, int blocks) {
    emulator::launch_kernel(name.c_str(), kernel, blocks, kThreads, 0, in.data(), out.data(),
                            elements);
  };
  const std::map<std::string, std::function<void()>> kernels = {
      {"even", [&] { launch(even, n, n / kThreads); }},
      {"more_instructions", [&] { launch(more_instructions, n, n / kThreads); }},
      {"one_block", [&] { launch(one_block, few, 1); }},
      {"one_warp", [&] { launch(one_warp, n, n / kThreads); }},
      {"packs", [&] { launch(packs, n, n / kThreads / 32); }},
      {"steps", [&] { launch(steps, n, n / kThreads / 64); }},
      {"independent_loads", [&] { launch(independent_loads, n, 1); }},
      {"dependent_loads", [&] { launch(dependent_loads, n, 1); }},
  };
  kernels.at(name)();
}
