// A first floor for each level: a key that at least topk + 1 candidates of the level reach.
//
// One block of 1,024 threads per level and image reads a sample of the level's logits, in chunks of
// one pack per lane that are spread evenly:
//
//     level     |chunk 0|   ...   |chunk 1|   ...   |chunk 2|   ...            about 64 topk logits
//
// If more than topk of the sample pass, so that the level has many candidates, the topk + 1 best of
// the sample give the floor. The tiles then collect a few times topk keys in all, instead of
// several times topk each. If not, there is no floor, and the sample has cost one read.
#pragma once

#include "detect_cuda_tile.h"

namespace retinanet {

constexpr int kSampleThreads = 1024;
constexpr int kSampleRatio = 64;  // logits of the sample for each of topk

// The sample of one level of one image.
template <typename T>
struct Sample {
  const T* x;       // the first logit at a multiple of 16 bytes
  int64_t spacing;  // packs from the start of one chunk to that of the next
  int chunks;       // one pack per lane of a warp each

  __device__ Sample(const HeadLevel<T>& level, int64_t image, int topk) {
    constexpr int kSize = Packed<T>::kSize;
    x = level.data + image * level.size();
    const int lead = int((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T));
    x += lead;
    const int64_t packs = (level.size() - lead) / kSize;
    const int64_t wanted = int64_t(topk) * kSampleRatio / (kSize * kWarp);
    // The chunks cover at most half of the level, and do not overlap.
    chunks = int(wanted < packs / (2 * kWarp) ? wanted : packs / (2 * kWarp));
    spacing = chunks > 0 ? packs / chunks : 0;
  }

  // Visits the sample's logits that pass, each as the lowest key that it can have. All threads take
  // part.
  template <typename F>
  __device__ __forceinline__ void for_keys(float limit, const F& visit) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll 4
    for (int c = int(threadIdx.x) / kWarp; c < chunks; c += kSampleThreads / kWarp) {
      const Packed<T> pack = load_packed(x + (c * spacing + lane) * Packed<T>::kSize);
#pragma unroll
      for (int j = 0; j < Packed<T>::kSize; ++j) {
        const float logit = float(pack.v[j]);
        if (logit >= limit) visit(ranking_key(logit, 0xffffffffu));
      }
    }
  }
};

// Writes the floor of each level and image, kNoKey if it has none.
// 128-bit accesses: 1 load, 0 stores
template <typename T>
__global__ void __launch_bounds__(kSampleThreads)
    sample_kernel(HeadLevels<T> levels, int topk, float limit, int64_t* __restrict__ floors) {
  __shared__ BestKeysSearch<kSampleThreads> search;
  const Sample<T> sample(levels.level[blockIdx.x], blockIdx.y, topk);
  // One more than topk, so that a floor implies a truncated level.
  const int64_t floor = best_keys(search, topk + 1, topk + 1 + topk / 4, [&](auto&& visit) {
                          sample.for_keys(limit, visit);
                        }).least;
  if (threadIdx.x == 0) floors[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = floor;
}

}  // namespace retinanet
