// Small kernels that measure the constants of the cost model on a GPU. calibrate.py compiles this
// file into a shared library and calls the functions at its end.
//
// Each kernel repeats one kind of instruction. One thread measures the cycles with clock64(). All
// steps of a chain depend on each other, so that a step lasts as long as its latency.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kSteps = 1024;

// Copies 16 bytes per thread and step.
__global__ void copy_kernel(const uint4* in, uint4* out, int64_t n) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    out[i] = in[i];
  }
}

// kSteps times 16 fused multiply-adds and 8 integer instructions, in independent chains: the mix of
// a kernel that is bound by issue.
__global__ void arithmetic_kernel(float* out, int64_t* cycles, float a, int b) {
  float x[8];
  int y[4];
  for (int k = 0; k < 8; ++k) x[k] = float(threadIdx.x + k);
  for (int k = 0; k < 4; ++k) y[k] = int(threadIdx.x) * k;
  const int64_t begin = clock64();
  for (int i = 0; i < kSteps; ++i) {
    for (int k = 0; k < 8; ++k) x[k] = (x[k] * a + a) * a + a;
    for (int k = 0; k < 4; ++k) y[k] = (y[k] ^ b) + i;
  }
  const int64_t end = clock64();
  float sum = 0;
  for (int k = 0; k < 8; ++k) sum += x[k];
  for (int k = 0; k < 4; ++k) sum += float(y[k]);
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0) cycles[blockIdx.x] = end - begin;
}

// Follows the indices in `next` from 0 on. Its size decides which cache holds it.
__global__ void chase_kernel(const int* next, int* out, int64_t* cycles, int steps) {
  int i = 0;
  for (int s = 0; s < steps; ++s) i = next[i];  // fills the caches
  const int64_t begin = clock64();
  for (int s = 0; s < steps; ++s) i = next[i];
  *cycles = clock64() - begin;
  *out = i;
}

__global__ void shared_chase_kernel(int* out, int64_t* cycles) {
  __shared__ int next[kSteps];
  for (int i = int(threadIdx.x); i < kSteps; i += int(blockDim.x)) next[i] = (i + 33) % kSteps;
  __syncthreads();
  int i = 0;
  const int64_t begin = clock64();
  for (int s = 0; s < kSteps; ++s) i = next[i];
  *cycles = clock64() - begin;
  *out = i;
}

__global__ void barrier_kernel(int64_t* cycles) {
  const int64_t begin = clock64();
  for (int s = 0; s < kSteps; ++s) __syncthreads();
  if (threadIdx.x == 0) *cycles = clock64() - begin;
}

__global__ void shuffle_kernel(int* out, int64_t* cycles) {
  int value = int(threadIdx.x);
  const int64_t begin = clock64();
  for (int s = 0; s < kSteps; ++s) value = __shfl_xor_sync(0xffffffffu, value, value & 31) + 1;
  const int64_t end = clock64();
  out[threadIdx.x] = value;
  if (threadIdx.x == 0) *cycles = end - begin;
}

// Every step waits for the result of the atomic operation before it.
__global__ void shared_atomic_kernel(int* out, int64_t* cycles) {
  __shared__ int counters[kSteps];
  for (int i = int(threadIdx.x); i < kSteps; i += int(blockDim.x)) counters[i] = 0;
  __syncthreads();
  const int zero = int(threadIdx.x) >> 10;  // unknown to the compiler
  int i = int(threadIdx.x);
  const int64_t begin = clock64();
  for (int s = 0; s < kSteps; ++s) i = (i + 33 + atomicAdd(&counters[i], zero)) % kSteps;
  const int64_t end = clock64();
  out[threadIdx.x] = i;
  if (threadIdx.x == 0) *cycles = end - begin;
}

// All threads of the grid add to one address.
__global__ void global_atomic_kernel(int* counter) {
  for (int s = 0; s < 64; ++s) atomicAdd(counter, int(threadIdx.x) & 1);
}

__global__ void empty_kernel() {}

}  // namespace

// The host side. Buffers belong to the caller. Every function returns the error of its launch.
#define EXPORT extern "C" __attribute__((visibility("default"))) int

EXPORT copy(const void* in, void* out, int64_t bytes, int blocks, cudaStream_t stream) {
  copy_kernel<<<blocks, 512, 0, stream>>>(static_cast<const uint4*>(in), static_cast<uint4*>(out),
                                          bytes / 16);
  return int(cudaGetLastError());
}
EXPORT arithmetic(float* out, int64_t* cycles, int blocks, int threads, cudaStream_t stream) {
  arithmetic_kernel<<<blocks, threads, 0, stream>>>(out, cycles, 0.5f, 7);
  return int(cudaGetLastError());
}
EXPORT chase(const int* next, int* out, int64_t* cycles, int steps, cudaStream_t stream) {
  chase_kernel<<<1, 1, 0, stream>>>(next, out, cycles, steps);
  return int(cudaGetLastError());
}
EXPORT shared_chase(int* out, int64_t* cycles, cudaStream_t stream) {
  shared_chase_kernel<<<1, 32, 0, stream>>>(out, cycles);
  return int(cudaGetLastError());
}
EXPORT barrier(int64_t* cycles, int threads, cudaStream_t stream) {
  barrier_kernel<<<1, threads, 0, stream>>>(cycles);
  return int(cudaGetLastError());
}
EXPORT shuffle(int* out, int64_t* cycles, cudaStream_t stream) {
  shuffle_kernel<<<1, 32, 0, stream>>>(out, cycles);
  return int(cudaGetLastError());
}
EXPORT shared_atomic(int* out, int64_t* cycles, cudaStream_t stream) {
  shared_atomic_kernel<<<1, 32, 0, stream>>>(out, cycles);
  return int(cudaGetLastError());
}
EXPORT global_atomic(int* counter, int blocks, cudaStream_t stream) {
  global_atomic_kernel<<<blocks, 256, 0, stream>>>(counter);
  return int(cudaGetLastError());
}
EXPORT empty(cudaStream_t stream) {
  empty_kernel<<<1, 32, 0, stream>>>();
  return int(cudaGetLastError());
}
