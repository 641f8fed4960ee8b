// Kernels with one planted bug each, for tests/tools/test_emulation.py. The line that the emulator
// must name is marked with "BUG: <name>". Apart from DYNAMIC_SHARED, all compile with nvcc without
// a warning.
#include <functional>
#include <map>
#include <vector>

#include "bugs.h"

namespace {

constexpr int kThreads = 256;
constexpr int kTiles = 4;
constexpr unsigned kFullMask = 0xffffffffu;

// ---- Races -------------------------------------------------------------------------------------

__global__ void missing_barrier(const float* in, float* out) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = s[kThreads - 1 - threadIdx.x];  // BUG: missing_barrier
}

// If the threads run in order, each reads a value that is already written. Only another order or
// the race detector exposes the bug.
__global__ void missing_barrier_in_order(const float* in, float* out) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = threadIdx.x > 0 ? s[threadIdx.x - 1] : 0;  // BUG: missing_barrier_in_order
}

__global__ void missing_barrier_in_loop(const float* in, float* out) {
  __shared__ float s[kThreads];
  float sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    s[threadIdx.x] = in[tile * kThreads + threadIdx.x];  // BUG: missing_barrier_in_loop
    __syncthreads();
    sum += s[(threadIdx.x + 1) % kThreads];
  }
  out[threadIdx.x] = sum;
}

// The threads access neighbouring bytes, which the race detector must tell apart.
__global__ void missing_barrier_of_bools(const float* in, float* out) {
  __shared__ bool s[kThreads];
  s[threadIdx.x] = in[threadIdx.x] > 0;
  if (threadIdx.x % 2) out[threadIdx.x] = s[threadIdx.x - 1];  // BUG: missing_barrier_of_bools
}

// Each thread writes two halves, and another thread reads only the first one.
__global__ void missing_barrier_of_halves(float* out) {
  __shared__ unsigned short s[2 * kThreads];
  s[2 * threadIdx.x] = 1;
  s[2 * threadIdx.x + 1] = 2;
  const unsigned other = kThreads - 1 - threadIdx.x;
  out[threadIdx.x] = s[2 * other];  // BUG: missing_barrier_of_halves
}

__global__ void missing_syncwarp(const float* in, float* out) {
  __shared__ float s[32];
  s[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = s[31 - threadIdx.x];  // BUG: missing_syncwarp
}

__global__ void two_threads_race(float* out) {
  __shared__ float flag;
  if (threadIdx.x == 40) flag = 0;
  __syncthreads();
  if (threadIdx.x == 100) flag = 7;
  if (threadIdx.x == 37) out[0] = flag;  // BUG: two_threads_race
}

__global__ void race_of_blocks(float* out) {
  if (threadIdx.x == 0) *out += 1;  // BUG: race_of_blocks
}

__global__ void plain_read_of_atomic(int* out) {
  if (threadIdx.x == 0) atomicAdd(out, 1);
  if (threadIdx.x == 1) out[1] = *out;  // BUG: plain_read_of_atomic
}

__global__ void uninitialised_shared(float* out) {
  __shared__ float s[kThreads];
  if (threadIdx.x < kThreads / 2) s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];  // BUG: uninitialised_shared
}

__global__ void uninitialised_bools(float* out) {
  __shared__ bool s[kThreads];
  if (threadIdx.x % 2) s[threadIdx.x] = true;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];  // BUG: uninitialised_bools
}

// ---- Memory ------------------------------------------------------------------------------------

__global__ void shared_overrun(const float* in, float* out) {
  __shared__ float s[kThreads];
  s[threadIdx.x + 1] = in[threadIdx.x];  // BUG: shared_overrun
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}

__global__ void shared_overrun_by_pointer(const float* in, float* out, int offset) {
  __shared__ float s[kThreads];
  float* p = s;
  s[threadIdx.x] = 0;
  __syncthreads();
  p[threadIdx.x + offset] = in[threadIdx.x];  // BUG: shared_overrun_by_pointer
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}

__global__ void dynamic_shared_overrun(const float* in, float* out) {
  DYNAMIC_SHARED(float, s);
  s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x + 1];  // BUG: dynamic_shared_overrun
}

__global__ void global_overrun(const float* in, float* out, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i <= n) out[i] = in[0];  // BUG: global_overrun
}

__global__ void misaligned_load(const float* in, float* out) {
  const float4* p = reinterpret_cast<const float4*>(in + 1);
  const float4 v = p[threadIdx.x];  // BUG: misaligned_load
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

// ---- Barriers and collectives ------------------------------------------------------------------

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 100) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    __syncthreads();  // BUG: divergent_barrier
  }
}

__global__ void early_return(float* out, unsigned n) {
  if (threadIdx.x >= n) return;
  __syncthreads();  // BUG: early_return
  out[threadIdx.x] = 1;
}

__global__ void full_mask_in_half_a_warp(float* out) {
  float v = threadIdx.x;
  if (threadIdx.x % 32 < 16)
    v += __shfl_xor_sync(kFullMask, v, 1);  // BUG: full_mask_in_half_a_warp
  out[threadIdx.x] = v;
}

__global__ void outside_of_its_mask(float* out) {
  out[threadIdx.x] = __any_sync(0xffffu, 1);  // BUG: outside_of_its_mask
}

__global__ void different_masks(float* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x1ffffu : 0xffff0000u;
  out[threadIdx.x] = __ballot_sync(mask, 1);  // BUG: different_masks
}

__global__ void different_collectives(float* out) {
  if (threadIdx.x % 2)
    out[threadIdx.x] = __any_sync(kFullMask, 1);
  else
    out[threadIdx.x] = __shfl_sync(kFullMask, 1.0f, 0);  // BUG: different_collectives
}

__global__ void shuffles_of_two_lines(float* out) {
  const float v = threadIdx.x;
  if (threadIdx.x % 2)
    out[threadIdx.x] = __shfl_xor_sync(kFullMask, v, 1);
  else
    out[threadIdx.x] = __shfl_xor_sync(kFullMask, v, 2);  // BUG: shuffles_of_two_lines
}

__global__ void deadlock(float* out) {
  if (threadIdx.x % 32 == 0) __syncwarp();  // BUG: deadlock
  __syncthreads();
  out[threadIdx.x] = 1;
}

// ---- No bug ------------------------------------------------------------------------------------

// Uses shared memory with its barriers, shuffles, votes and atomics correctly.
__global__ void no_bug(const float* in, float* out, int* counter) {
  __shared__ float s[kThreads];
  __shared__ bool is_odd[kThreads];
  DYNAMIC_SHARED(float, d);
  float sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    s[threadIdx.x] = d[threadIdx.x] = in[tile * kThreads + threadIdx.x];
    __syncthreads();
    sum += s[kThreads - 1 - threadIdx.x] + d[(threadIdx.x + 1) % kThreads];
    __syncthreads();
  }
  s[threadIdx.x] = sum;
  __syncwarp();
  sum += s[threadIdx.x ^ 31];
  sum += __shfl_up_sync(kFullMask, sum, 1) + __shfl_down_sync(kFullMask, sum, 2);
  if (threadIdx.x % 32 < 16) sum += __shfl_sync(0xffffu, sum, 3);
  is_odd[threadIdx.x] = threadIdx.x % 2;
  // No barrier is needed: each thread reads only the byte that it wrote, beside its neighbours'.
  sum += __shfl_xor_sync(kFullMask, sum, 1);
  sum += is_odd[threadIdx.x];
  __syncthreads();
  sum += is_odd[kThreads - 1 - threadIdx.x];
  if (__any_sync(kFullMask, sum < 0) || __syncthreads_or(sum < 0)) sum = -1;
  atomicAdd(counter, __reduce_max_sync(kFullMask, int(threadIdx.x)));
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// ---- Memory traffic, wasteful and good ---------------------------------------------------------

__global__ void one_element_per_thread(const float* in, float* out, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = 2 * in[i];
}

__global__ void two_passes(const float* in, float* out, int n) {
  float sum = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = int(threadIdx.x) * 4; i + 4 <= n; i += int(blockDim.x) * 4) {
      const float4 v = *reinterpret_cast<const float4*>(in + i);
      sum += v.x + v.y + v.z + v.w;
    }
    __syncthreads();
  }
  out[threadIdx.x] = sum;
}

__global__ void sixteen_bytes_per_thread(const float* in, float* out, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (i + 4 > n) return;
  float4 v = *reinterpret_cast<const float4*>(in + i);
  v.x *= 2, v.y *= 2, v.z *= 2, v.w *= 2;
  *reinterpret_cast<float4*>(out + i) = v;
}

}  // namespace

#define LAUNCH(kernel, grid, block, shared_bytes, ...) \
  emulator::launch_kernel(#kernel, kernel, grid, block, shared_bytes, __VA_ARGS__)

std::vector<float> run_bug(const std::string& name) {
  std::vector<float> in(1 << 18), out(1 << 18);
  std::vector<int> counter(2);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(i % 1000);
  const int n = int(in.size());
  const float* x = in.data();
  float* y = out.data();
  const std::map<std::string, std::function<void()>> bugs = {
      {"missing_barrier", [&] { LAUNCH(missing_barrier, 1, kThreads, 0, x, y); }},
      {"missing_barrier_in_order", [&] { LAUNCH(missing_barrier_in_order, 1, kThreads, 0, x, y); }},
      {"missing_barrier_in_loop", [&] { LAUNCH(missing_barrier_in_loop, 1, kThreads, 0, x, y); }},
      {"missing_barrier_of_bools", [&] { LAUNCH(missing_barrier_of_bools, 1, kThreads, 0, x, y); }},
      {"missing_barrier_of_halves", [&] { LAUNCH(missing_barrier_of_halves, 1, kThreads, 0, y); }},
      {"missing_syncwarp", [&] { LAUNCH(missing_syncwarp, 1, 32, 0, x, y); }},
      {"two_threads_race", [&] { LAUNCH(two_threads_race, 1, kThreads, 0, y); }},
      {"race_of_blocks", [&] { LAUNCH(race_of_blocks, 8, 32, 0, y); }},
      {"plain_read_of_atomic", [&] { LAUNCH(plain_read_of_atomic, 1, 32, 0, counter.data()); }},
      {"uninitialised_shared", [&] { LAUNCH(uninitialised_shared, 2, kThreads, 0, y); }},
      {"uninitialised_bools", [&] { LAUNCH(uninitialised_bools, 1, kThreads, 0, y); }},
      {"shared_overrun", [&] { LAUNCH(shared_overrun, 1, kThreads, 0, x, y); }},
      {"shared_overrun_by_pointer",
       [&] { LAUNCH(shared_overrun_by_pointer, 1, kThreads, 0, x, y, 1); }},
      {"dynamic_shared_overrun",
       [&] { LAUNCH(dynamic_shared_overrun, 1, 33, 33 * sizeof(float), x, y); }},
      {"global_overrun", [&] { LAUNCH(global_overrun, n / kThreads + 1, kThreads, 0, x, y, n); }},
      {"misaligned_load", [&] { LAUNCH(misaligned_load, 1, 32, 0, x, y); }},
      {"divergent_barrier", [&] { LAUNCH(divergent_barrier, 1, kThreads, 0, y); }},
      {"early_return", [&] { LAUNCH(early_return, 1, kThreads, 0, y, 200u); }},
      {"full_mask_in_half_a_warp", [&] { LAUNCH(full_mask_in_half_a_warp, 1, kThreads, 0, y); }},
      {"outside_of_its_mask", [&] { LAUNCH(outside_of_its_mask, 1, 32, 0, y); }},
      {"different_masks", [&] { LAUNCH(different_masks, 1, 32, 0, y); }},
      {"different_collectives", [&] { LAUNCH(different_collectives, 1, 32, 0, y); }},
      {"shuffles_of_two_lines", [&] { LAUNCH(shuffles_of_two_lines, 1, 32, 0, y); }},
      {"deadlock", [&] { LAUNCH(deadlock, 1, 64, 0, y); }},
      {"too_many_threads", [&] { LAUNCH(race_of_blocks, 1, 2048, 0, y); }},
      {"no_blocks", [&] { LAUNCH(race_of_blocks, 0, 32, 0, y); }},
      {"too_many_blocks", [&] { LAUNCH(race_of_blocks, dim3(1, 65536), 32, 0, y); }},
      {"too_much_shared_memory", [&] { LAUNCH(race_of_blocks, 1, 32, 49153, y); }},
      {"no_bug",
       [&] { LAUNCH(no_bug, 3, kThreads, kThreads * sizeof(float), x, y, counter.data()); }},
      {"one_element_per_thread",
       [&] { LAUNCH(one_element_per_thread, n / kThreads, kThreads, 0, x, y, n); }},
      {"two_passes", [&] { LAUNCH(two_passes, 1, kThreads, 0, x, y, n); }},
      {"sixteen_bytes_per_thread",
       [&] { LAUNCH(sixteen_bytes_per_thread, n / 4 / kThreads, kThreads, 0, x, y, n); }},
  };
  bugs.at(name)();
  out.resize(3 * kThreads);
  out.push_back(float(counter[0]));
  return out;
}
