// Kernels that stream through global memory, for tests/tools/test_kernel_resources.py: one that is
// right, one that lost its 128-bit stores, and one with over 20 % more instructions per element.
#include <cstdint>

namespace retinanet {
namespace {

struct alignas(16) Pack {
  float v[4];
};

__device__ __forceinline__ float formula(float x) { return 1.0f / (1.0f + x * x) + x; }

__device__ __forceinline__ Pack map(Pack pack) {
  for (float& x : pack.v) x = formula(x);
  return pack;
}

// 128-bit accesses: 1 load, 1 store
// 128-bit loops: loads and stores
__global__ void wide_kernel(const Pack* in, Pack* out, int64_t packs) {
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) out[i] = map(in[i]);
}

// 128-bit accesses: 1 load, 0 stores
// 128-bit loops: loads and stores
__global__ void split_kernel(const Pack* in, float* out, int64_t packs) {
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    const Pack pack = map(in[i]);
    for (int j = 0; j < 4; ++j) out[4 * i + j] = pack.v[j];
  }
}

// 128-bit accesses: 1 load, 1 store
// 128-bit loops: loads and stores
__global__ void longer_kernel(const Pack* in, Pack* out, int64_t packs) {
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    Pack pack = map(in[i]);
    for (float& x : pack.v) x = (x + 3) * x + (x - 4) * (x - 5);
    out[i] = pack;
  }
}

}  // namespace
}  // namespace retinanet
