// What every CUDA file needs: device guard and stream, the one place that launches kernels, 128-bit
// accesses and deterministic block sums.
//
// Kernels are written so that the same source also compiles as plain C++ under an emulation of the
// CUDA execution model: launches go through `launch`, there is no inline PTX, and no thread returns
// before a collective that names it.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "common.h"

namespace retinanet {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

// Makes the tensor's device current for a scope and names its current stream.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Launches kernel(arguments...) on the scope's stream and checks the launch.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            const CudaScope& scope, Arguments&&... arguments) {
  kernel<<<grid, block, shared_bytes, scope.stream()>>>(static_cast<Parameters>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, "CUDA kernel launch failed: ", cudaGetErrorString(error));
}

HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 16 bytes of T, loaded and stored with one access.
template <typename T>
struct alignas(16) Packed {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

template <typename T>
__device__ __forceinline__ Packed<T> load_packed(const T* p) {
  return *reinterpret_cast<const Packed<T>*>(p);
}

template <typename T>
__device__ __forceinline__ void store_packed(T* p, const Packed<T>& value) {
  *reinterpret_cast<Packed<T>*>(p) = value;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value += __shfl_down_sync(kFullMask, value, offset);
  return value;
}

// Sum over the block in a fixed order; the result is valid in thread 0.  All threads must call it.
template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T warps[kThreads / kWarp];
  value = warp_sum(value);
  __syncthreads();  // an earlier call may still be reading `warps`
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x < kWarp)
    value = warp_sum(threadIdx.x < kThreads / kWarp ? warps[threadIdx.x] : T(0));
  return value;
}

}  // namespace retinanet
