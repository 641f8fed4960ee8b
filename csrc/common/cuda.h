// What every CUDA file needs: launches, 128-bit accesses and deterministic sums over a block.
//
// The same kernel source also compiles as plain C++ under an emulation of the CUDA execution model
// (tools/emulator). For this reason kernels are launched through `launch` only, they contain no
// inline PTX, and no thread returns before a collective that names it in its mask.
#pragma once

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "launch.h"
#include "simd.h"

namespace retinanet {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

// The arithmetic of device code: fused multiply-add under nvcc, the host's baseline when emulated.
using DeviceArithmetic = BaselineArithmetic;

HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A pack: 16 bytes of T, loaded or stored with one 128-bit access.
template <typename T>
struct alignas(16) Packed {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

// `p` must be aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ Packed<T> load_packed(const T* p) {
  return *reinterpret_cast<const Packed<T>*>(p);
}

template <typename T>
__device__ __forceinline__ void store_packed(T* p, const Packed<T>& value) {
  *reinterpret_cast<Packed<T>*>(p) = value;
}

// As store_packed, for results that the kernel does not read again: the cache evicts them first.
// nvcc keeps this store whole where two branches that both store a pack are merged. It splits a
// plain one.
template <typename T>
__device__ __forceinline__ void stream_packed(T* p, const Packed<T>& value) {
  uint4 bits;
  std::memcpy(&bits, &value, sizeof(bits));
  __stcs(reinterpret_cast<uint4*>(p), bits);
}

// Sum over the warp in a fixed order. The result is valid in lane 0.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value += __shfl_down_sync(kFullMask, value, offset);
  return value;
}

// Sum over the block in a fixed order. The result is valid in thread 0. All threads must call it.
template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T warps[kThreads / kWarp];
  value = warp_sum(value);
  __syncthreads();  // an earlier call may still be reading `warps`
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  // The first warp adds the sums of all warps.
  if (threadIdx.x < kWarp)
    value = warp_sum(threadIdx.x < kThreads / kWarp ? warps[threadIdx.x] : T(0));
  return value;
}

}  // namespace retinanet
