// Greedy NMS of long lists by all multiprocessors. The launches depend on the shape only.
//
//     candidates    | chunk 0 | chunk 1 | chunk 2 | ...        1,024 each, best first
//
//     nms_long_load_kernel      copies the candidates in order, one thread each.
//     nms_long_masks_kernel     compares each candidate with the earlier ones of its chunk: a bit
//                               mask has those that would suppress it.
//     then for each chunk, in order:
//       nms_long_resolve_kernel   one block per image. Decides the chunk in rounds, like
//                                 nms_cuda_rounds.h, and appends the kept boxes to the result.
//       nms_long_filter_kernel    compares all later candidates with the boxes that the chunk has
//                                 kept, and marks those that are suppressed as gone:
//
//                                    later candidates
//                                 +-----------+-----------+---
//                     kept boxes  | block 0,0 | block 1,0 |      256 candidates x 32 to 128 boxes
//                     of a chunk  +-----------+-----------+---
//                                 | block 0,1 | block 1,1 |
//                                 +-----------+-----------+---
//
// This is the prefix-based greedy algorithm of Blelloch, Fineman and Shun ("Greedy sequential
// maximal independent set and matching are parallel on average", SPAA 2012).
//
// Bytes moved: the masks take 128 bytes per candidate, each candidate is read once per chunk before
// it until it is gone, and each kept box once by each block of the filter. Deterministic: the only
// atomics set bits, whose result does not depend on their order. A block may see a bit early that
// another block of the same launch has set. It then skips a candidate that is gone in any case.
#pragma once

#include "common/cuda.h"
#include "nms_cuda_images.h"

namespace retinanet {

constexpr int kLongChunk = 1024;
constexpr int kLongWords = kLongChunk / kWarp;  // words of a bit mask of one chunk
constexpr int kLongThreads = 256;               // threads of a block, except in the resolve kernel
constexpr int kLongShare = 128;                 // most kept boxes of one block of the filter

struct NmsLongState {
  NmsProgress progress;
  int fresh;  // boxes that the last chunk has kept
};

// The intermediate results for all images.
template <typename T>
struct NmsLong {
  NmsBox<T>* candidates;  // [images, padded], in order
  unsigned* gone;         // [images, padded / 32], a bit for each candidate that is suppressed
  unsigned* masks;        // [images, padded / 1024, 32 words, 1024 candidates]
  NmsBox<T>* fresh;       // [images, 1024], the boxes that the last chunk has kept
  NmsLongState* state;    // [images]
  int64_t padded;         // candidates of an image, rounded up to full chunks

  // The masks of the chunk that starts at candidate `first`.
  __device__ __forceinline__ unsigned* masks_of(int64_t image, int64_t first) const {
    return masks + (image * padded + first) * kLongWords;
  }
};

// 128-bit accesses: 1 load, 1 store
template <typename T>
__global__ void __launch_bounds__(kLongThreads)
    nms_long_load_kernel(NmsImages<T> images, NmsLong<T> lists) {
  const int64_t image = blockIdx.y, c = int64_t(blockIdx.x) * kLongThreads + threadIdx.x;
  const int64_t i = c < images.size(image) ? images.row(image, c) : -1;
  lists.candidates[image * lists.padded + c] = i < 0 ? NmsBox<T>{} : images.load(image, i);
  const unsigned gone = __ballot_sync(kFullMask, i < 0);
  if (c % kWarp == 0) lists.gone[(image * lists.padded + c) / kWarp] = gone;
  if (c == 0) lists.state[image] = NmsLongState{};
}

// A warp compares 32 candidates with 32 earlier ones of their chunk, which are one word of the
// masks. A block does so for eight words.
// 128-bit accesses: 2 loads, 0 stores
template <typename T>
__global__ void __launch_bounds__(kLongThreads)
    nms_long_masks_kernel(NmsRules<T> rules, NmsLong<T> lists) {
  __shared__ NmsBox<T> others[kLongThreads / kWarp][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t image = blockIdx.z, group = blockIdx.x, chunk = group / kLongWords * kLongChunk;
  const int my_word = int(group % kLongWords),
            word = int(blockIdx.y) * (kLongThreads / kWarp) + warp;
  // Skip the blocks in which all words are behind the candidates, and candidates that do not exist.
  if (int(blockIdx.y) * (kLongThreads / kWarp) > my_word) return;
  if (lists.gone[image * lists.padded / kWarp + group] == kFullMask) return;
  const NmsBox<T>* candidates = lists.candidates + image * lists.padded + chunk;
  unsigned bits = 0;
  if (word <= my_word) {
    others[warp][lane] = candidates[word * kWarp + lane];
    __syncwarp();
    const NmsBox<T> mine = candidates[my_word * kWarp + lane];
    const int earlier = word < my_word ? kWarp : lane;
    for (int b = 0; b < earlier; ++b)
      bits |= unsigned(suppresses(rules, others[warp][b], mine)) << b;
  }
  lists.masks_of(image, chunk)[word * kLongChunk + my_word * kWarp + lane] = bits;
}

// A thread decides one candidate of the chunk that starts at `first`.
// 128-bit accesses: 2 loads, 2 stores
template <typename T>
__global__ void __launch_bounds__(kLongChunk)
    nms_long_resolve_kernel(NmsImages<T> images, NmsRules<T> rules, NmsLong<T> lists, int64_t first,
                            NmsOutputs out) {
  __shared__ unsigned open[kLongWords], kept[kLongWords];
  __shared__ int kept_before[kLongWords];
  const int t = threadIdx.x, lane = t % kWarp, warp = t / kWarp;
  const int64_t image = blockIdx.x, place = image * lists.padded + first;
  NmsLongState state = lists.state[image];
  state.fresh = 0;
  if (!is_complete(state.progress, rules)) {
    bool is_open = !(lists.gone[place / kWarp + warp] >> lane & 1u);
    const unsigned opened = __ballot_sync(kFullMask, is_open);
    if (lane == 0) {
      open[warp] = opened;
      kept[warp] = 0;
    }
    __syncthreads();
    // Find the words of the candidate's mask that matter. They are few.
    const unsigned* mask = lists.masks_of(image, first) + t;
    constexpr int kBatch =
        kLongThreads / kWarp;  // words that the masks kernel has written together
    unsigned words = 0;
    for (int batch = 0; is_open && batch <= warp; batch += kBatch) {
      unsigned loaded[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) loaded[j] = mask[(batch + j) * kLongChunk];
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
        words |= (loaded[j] & open[batch + j] ? 1u : 0u) << (batch + j);
    }
    // Rounds: drop the candidates that a kept one suppresses, and keep those for which no earlier
    // one is open that would.
    while (__syncthreads_or(is_open)) {
      unsigned suppressed = 0, waits = 0;
      for (unsigned left = is_open ? words : 0u; left != 0; left &= left - 1) {
        const int w = __ffs(int(left)) - 1;
        const unsigned bits = mask[w * kLongChunk];
        suppressed |= bits & kept[w];
        waits |= bits & open[w];
      }
      const bool keep = is_open && !suppressed && !waits;
      is_open = is_open && !suppressed && waits;
      const unsigned newly_kept = __ballot_sync(kFullMask, keep),
                     still_open = __ballot_sync(kFullMask, is_open);
      __syncthreads();  // all have read the masks
      if (lane == 0) {
        kept[warp] |= newly_kept;
        open[warp] = still_open;
      }
    }
    // Count the kept candidates before each word.
    if (warp == 0) {
      int sum = __popc(kept[lane]);
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const int other = __shfl_up_sync(kFullMask, sum, offset);
        if (lane >= offset) sum += other;
      }
      kept_before[lane] = sum - __popc(kept[lane]);
    }
    __syncthreads();
    // Append the kept candidates while there are slots, and pass their boxes on to the filter.
    if (kept[warp] >> lane & 1u) {
      const int rank = kept_before[warp] + __popc(kept[warp] & ((1u << lane) - 1));
      const int64_t slot = state.progress.size + rank;
      if (slot < rules.max_detections)
        out.index[image * rules.max_detections + slot] = images.row(image, first + t);
      lists.fresh[image * kLongChunk + rank] = lists.candidates[place + t];
    }
    state.fresh = kept_before[kLongWords - 1] + __popc(kept[kLongWords - 1]);
    const int64_t total = state.progress.size + state.fresh;
    state.progress.capped = state.progress.capped || total > rules.max_detections;
    state.progress.size = total < rules.max_detections ? total : rules.max_detections;
  }
  if (first + kLongChunk == lists.padded) out.finish(image, rules, state.progress);
  __syncthreads();  // all have read the state
  if (t == 0) lists.state[image] = state;
}

// A thread compares one candidate from `first` on with up to `share` of the boxes that the last
// chunk has kept.
// 128-bit accesses: 2 loads, 0 stores
template <typename T>
__global__ void __launch_bounds__(kLongThreads)
    nms_long_filter_kernel(NmsRules<T> rules, NmsLong<T> lists, int64_t first, int share) {
  __shared__ NmsBox<T> tile[kLongShare];
  const int64_t image = blockIdx.z, c = first + int64_t(blockIdx.x) * kLongThreads + threadIdx.x;
  const NmsLongState& state = lists.state[image];
  const int start = int(blockIdx.y) * share, size = min(state.fresh - start, share);
  if (size <= 0 || is_complete(state.progress, rules)) return;  // the whole block
  // Skip candidates that are gone. Other blocks set bits in the meantime, so read them atomically.
  const int lane = threadIdx.x % kWarp;
  unsigned* word = lists.gone + (image * lists.padded + c) / kWarp;
  unsigned gone = 0;
  if (lane == 0) gone = atomicOr(word, 0u);
  gone = __shfl_sync(kFullMask, gone, 0);
  const bool was_open = !(gone >> lane & 1u);
  if (!__syncthreads_or(was_open)) return;  // the whole block
  if (int(threadIdx.x) < size)
    tile[threadIdx.x] = lists.fresh[image * kLongChunk + start + threadIdx.x];
  NmsBox<T> mine{};
  if (was_open) mine = lists.candidates[image * lists.padded + c];
  __syncthreads();
  // Compare until one of the boxes suppresses the candidate.
  bool open = was_open;
  for (int k = 0; open && k < size; ++k) open = !suppresses(rules, tile[k], mine);
  const unsigned newly_gone = __ballot_sync(kFullMask, was_open && !open);
  if (lane == 0 && newly_gone != 0) atomicOr(word, newly_gone);
}

// Whether a list and its result may be so long that one block per image would take more time.
inline bool is_long(int64_t candidates, int64_t max_detections, int64_t max_per_class) {
  return candidates > kLongChunk && max_detections > kLongChunk / 2 && max_per_class == 0;
}

// The kept boxes of one block of the filter: fewer where there are few blocks, so that no
// multiprocessor is without work. `columns` is the number of blocks for the same kept boxes.
inline int filter_share(int64_t columns) {
  constexpr int64_t kEnough = 512;  // blocks
  int share = kLongShare;
  while (share > kWarp && columns * (kLongChunk / share) < kEnough) share /= 2;
  return share;
}

// Bytes of the intermediate results that one group of images may take, unless one image needs more.
constexpr int64_t kLongBytes = 32 << 20;

// Runs the kernels on all images, in groups that bound the intermediate memory. `like` is a tensor
// on the device of the images.
template <typename T>
void launch_long_nms(const CudaScope& scope, const Tensor& like, NmsImages<T> images,
                     int64_t num_images, const NmsRules<T>& rules, NmsOutputs out) {
  const auto empty = [&](int64_t bytes) {
    return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  };
  const int64_t padded = ceil_div(images.candidates, kLongChunk) * kLongChunk;
  const int64_t mask_bytes = padded * kLongWords * int64_t(sizeof(unsigned));
  const int64_t group = std::min(num_images, std::max<int64_t>(1, kLongBytes / mask_bytes));
  Tensor candidates = empty(group * padded * NmsBox<T>::kBytes), gone = empty(group * padded / 8),
         masks = empty(group * mask_bytes), fresh = empty(group * kLongChunk * NmsBox<T>::kBytes),
         state = empty(group * int64_t(sizeof(NmsLongState)));
  const NmsLong<T> lists{data<NmsBox<T>>(candidates), data<unsigned>(gone),
                         data<unsigned>(masks),       data<NmsBox<T>>(fresh),
                         data<NmsLongState>(state),   padded};
  for (int64_t start = 0; start < num_images; start += group) {
    const unsigned size = unsigned(std::min(group, num_images - start));
    launch("nms_long_load_kernel", nms_long_load_kernel<T>,
           dim3(unsigned(padded / kLongThreads), size), kLongThreads, 0, scope, images, lists);
    launch("nms_long_masks_kernel", nms_long_masks_kernel<T>,
           dim3(unsigned(padded / kWarp), kLongWords / (kLongThreads / kWarp), size), kLongThreads,
           0, scope, rules, lists);
    for (int64_t first = 0; first < padded; first += kLongChunk) {
      launch("nms_long_resolve_kernel", nms_long_resolve_kernel<T>, size, kLongChunk, 0, scope,
             images, rules, lists, first, out);
      const int64_t next = first + kLongChunk;
      if (next == padded) break;
      const unsigned columns = unsigned((padded - next) / kLongThreads);
      const int share = filter_share(int64_t(columns) * size);
      launch("nms_long_filter_kernel", nms_long_filter_kernel<T>,
             dim3(columns, unsigned(kLongChunk / share), size), kLongThreads, 0, scope, rules,
             lists, next, share);
    }
    images.skip(group);
    out.skip(group, rules.max_detections);
  }
}

}  // namespace retinanet
