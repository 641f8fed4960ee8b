// From an image's selected keys to its detections: one block of 1,024 threads per image.
//
//     keys          | level 0, topk slots | level 1, topk slots | ...        in any order
//          |  1. The next 256 to 512 best keys are found and sorted (nms_cuda_order.h).
//          v
//     batch         | chunk 0 | chunk 1 |                                    in shared memory
//          |  2. Each thread decodes the box of one key of the chunk.
//          |  3. The block decides which boxes of the chunk to keep (nms_cuda_rounds.h), and writes
//          |     those to their slots.
//          v
//     slots         | 0 | 1 | 2 | ...                                        best first
//
// This repeats until the slots are filled and the image is known to be truncated, or until no key
// is left. Most images need one batch. Too many keys for repeated searches come sorted, and step 1
// then just moves on.
//
// Bytes moved: the keys are read three times per batch, mostly from the cache, and four deltas per
// decoded key. Deterministic, see the two headers.
#pragma once

#include "detect_slots.h"
#include "nms_cuda_order.h"
#include "nms_cuda_rounds.h"

namespace retinanet {

// The selected keys of all images.
struct SelectedKeys {
  const int64_t* keys;    // [N, S]
  const bool* truncated;  // [N, L]
  int64_t slots;          // S
  int levels;             // L
  bool sorted;            // the keys of an image are in descending order
};

// Writes the detections of an image. `kept` has room for max_detections boxes of each image.
template <typename T, typename Delta>
__global__ void __launch_bounds__(NmsRounds<T>::kThreads)
    finish_kernel(CandidateDecoder<T, Delta> decode, NmsRules<T> rules, SelectedKeys selected,
                  NmsBox<T>* __restrict__ kept, DetectionSlots<T> out) {
  constexpr int kChunk = NmsRounds<T>::kChunk;
  __shared__ NmsRounds<T> rounds;
  __shared__ NmsOrder order;
  const int64_t image = blockIdx.x;
  const int64_t* keys = selected.keys + image * selected.slots;
  NmsProgress progress;
  // If a level has dropped a candidate, the image is truncated whatever follows.
  for (int l = 0; l < selected.levels; ++l)
    progress.capped = progress.capped || selected.truncated[image * selected.levels + l];

  int64_t start = 0;                // the next key, if they are sorted
  uint64_t ceiling = ~uint64_t(0);  // the keys below it are left, if they are not
  bool left = true;
  while (left && !is_complete(progress, rules)) {
    // Find the next batch.
    const int64_t* batch = order.keys;
    int size;
    if (selected.sorted) {
      batch = keys + start;
      size = int(std::min<int64_t>(selected.slots - start, kChunk));
      start += size;
      left = start < selected.slots && keys[start] != kNoKey;
    } else {
      size = next_batch(order, [&](int64_t i) { return keys[i]; }, selected.slots, ceiling);
      left = ceiling != 0;
    }
    for (int first = 0; first < size && !is_complete(progress, rules); first += kChunk) {
      // Decode a chunk of it, one key per thread of the first 256.
      const int c = first + int(threadIdx.x);
      const int64_t key = threadIdx.x < kChunk && c < size ? batch[c] : kNoKey;
      NmsBox<T> mine{};
      if (key != kNoKey) {
        const int64_t index = key_index(key), anchor = index / decode.num_classes;
        mine.box = decode.box(image, anchor);
        mine.area = area(mine.box);
        mine.label = index - anchor * decode.num_classes;
      }
      // Decide the chunk, and write what is kept.
      const int64_t slot = decide_chunk(rounds, rules, mine, key != kNoKey,
                                        kept + image * rules.max_detections, progress);
      // The thread's candidate is still in shared memory, which saves registers.
      if (slot >= 0) out.write(image, slot, rounds.candidates[threadIdx.x].box, batch[c]);
    }
  }

  // Mark the unused slots, and write the image's count and flag.
  for (int64_t slot = progress.size + threadIdx.x; slot < out.slots; slot += blockDim.x)
    out.clear(image, slot);
  if (threadIdx.x == 0) {
    out.count[image] = progress.size;
    out.truncated[image] = progress.capped;
  }
}

}  // namespace retinanet
