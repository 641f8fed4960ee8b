// NMS on CUDA.
//
// Work: one block per image walks the image's candidates in order, a tile of 256 at a time, one
// candidate per thread:
//
//     candidates    | tile 0 | tile 1 | tile 2 | ...              best first
//
//     kept boxes    | 0 .. 255 | 256 .. 511 | ...                 from earlier tiles of candidates
//          |  1. The kept boxes pass through shared memory, 256 at a time. A thread drops its
//          |     candidate if one of them suppresses it.
//          v
//     bit matrices  hits[256][256], same[256][256]                in shared memory
//          |  2. Each thread compares its candidate, if not dropped, with the others of the tile:
//          |     hits has the later ones that it suppresses, same the earlier ones of its class.
//          v
//     bit mask      chosen[256]
//          |  3. Thread 0 visits the remaining candidates in order. It chooses each one that no cap
//          |     excludes, and drops the later candidates that the chosen one hits.
//          v
//     4. The threads of chosen candidates append their boxes to the kept boxes.
//
// The walk ends as soon as the last slot is filled and one more survivor has shown that a cap was
// hit. Bytes moved: each candidate is read once, and each kept box once per later tile of
// candidates. No candidates x candidates matrix exists. Deterministic: there are no atomics, and
// everything is decided in the order of the candidates.
#include "common/cuda.h"
#include "nms.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;
constexpr int kWords = kThreads / 32;  // words of a bit mask of one tile

template <typename T>
struct NmsImages {
  const Box<T>* boxes;    // [N, C]
  const int64_t* order;   // [N, C] or null
  const int64_t* count;   // [N]
  const int64_t* labels;  // [N, C] or null
  int64_t candidates;
};

// The candidate of one thread.
template <typename T>
struct Candidate {
  int64_t index;
  Box<T> box;
  T area;
  int64_t label;
  bool active;  // it exists, and no box kept from an earlier tile suppresses it
};

// A block's shared memory. These are references to separate variables, because the compiler then
// knows that a store to one does not change another.
template <typename T>
struct NmsTile {
  Box<T> (&box)[kThreads];  // some of the kept boxes in step 1, the candidates from step 2 on
  int64_t (&label)[kThreads];
  unsigned (&hits)[kThreads][kWords];  // later candidates of the tile that this one suppresses
  unsigned (&same)[kThreads][kWords];  // earlier candidates of the tile of this one's class
  int64_t (&room)[kThreads];           // boxes that this one's class may still keep
  unsigned (&alive)[kWords];           // candidates that nothing has suppressed so far
  unsigned (&chosen)[kWords];          // candidates to keep
  int64_t& size;                       // boxes kept so far
  bool& capped;                        // a cap has excluded a candidate that nothing suppresses
};

__device__ __forceinline__ bool bit(const unsigned* words, int i) {
  return words[i / 32] >> (i % 32) & 1u;
}

// Candidate `c` of an image that has `count` of them.
template <typename T>
__device__ __forceinline__ Candidate<T> load_candidate(const NmsImages<T>& images, int64_t image,
                                                       int64_t c, int64_t count) {
  const int64_t first = image * images.candidates;
  const int64_t i = c >= count ? -1 : images.order ? images.order[first + c] : c;
  const bool active = i >= 0 && i < images.candidates;
  const Box<T> box = active ? images.boxes[first + i] : Box<T>{0, 0, 0, 0};
  const int64_t label = active && images.labels ? images.labels[first + i] : 0;
  return {i, box, area(box), label, active};
}

// Step 1: compares the thread's candidate with the boxes kept from earlier tiles. Returns how many
// of those boxes are of the candidate's class. The count is complete if the candidate stays active.
template <typename T>
__device__ __forceinline__ int64_t compare_with_kept(const NmsTile<T>& tile,
                                                     const NmsRules<T>& rules,
                                                     const Box<T>* kept_boxes,
                                                     const int64_t* kept_labels, int64_t kept,
                                                     Candidate<T>& mine) {
  const int t = threadIdx.x;
  int64_t of_class = 0;
  for (int64_t start = 0; start < kept; start += kThreads) {
    // Load the next 256 kept boxes, one per thread, when all have finished with the previous ones.
    __syncthreads();
    if (start + t < kept) {
      tile.box[t] = kept_boxes[start + t];
      tile.label[t] = kept_labels[start + t];
    }
    __syncthreads();
    // Compare until one of them suppresses the candidate.
    const int loaded = int(kept - start < kThreads ? kept - start : kThreads);
    for (int k = 0; mine.active && k < loaded; ++k) {
      const bool rival = tile.label[k] == mine.label;
      of_class += rival;
      if ((rival || rules.class_agnostic) &&
          rules.suppresses(tile.box[k], area(tile.box[k]), mine.box, mine.area))
        mine.active = false;
    }
  }
  return of_class;
}

// Copies the thread's candidate to shared memory, for the other threads to see.
template <typename T>
__device__ __forceinline__ void share_candidate(const NmsTile<T>& tile, const Candidate<T>& mine,
                                                int64_t room) {
  const int t = threadIdx.x;
  const unsigned warp_alive = __ballot_sync(kFullMask, mine.active);
  __syncthreads();  // all have finished with the kept boxes
  tile.box[t] = mine.box;
  tile.label[t] = mine.label;
  tile.room[t] = room;
  if (t % kWarp == 0) tile.alive[t / kWarp] = warp_alive;
  __syncthreads();
}

// Step 2: compares the thread's candidate with the others of the tile, 32 for each word of its rows
// of both matrices.
template <typename T>
__device__ __forceinline__ void compare_in_tile(const NmsTile<T>& tile, const NmsRules<T>& rules,
                                                const Candidate<T>& mine) {
  const int t = threadIdx.x;
  for (int w = 0; w < kWords; ++w) {
    unsigned hit = 0, peer = 0;
    for (int b = 0; mine.active && b < 32; ++b) {
      const int other = w * 32 + b;
      if (!bit(tile.alive, other)) continue;
      const bool rival = tile.label[other] == mine.label;
      if (other < t && rival) peer |= 1u << b;
      if (other > t && (rival || rules.class_agnostic) &&
          rules.suppresses(mine.box, mine.area, tile.box[other], area(tile.box[other])))
        hit |= 1u << b;
    }
    tile.hits[t][w] = hit;
    tile.same[t][w] = peer;
  }
  __syncthreads();
}

// Step 3, by one thread: marks the candidates to keep, in order, and counts them in `size`.
template <typename T>
__device__ __forceinline__ void choose_in_order(const NmsTile<T>& tile, int64_t max_detections) {
  for (int w = 0; w < kWords; ++w) tile.chosen[w] = 0;
  int64_t total = tile.size;
  for (int w = 0; w < kWords && !(tile.capped && total == max_detections); ++w) {
    // Read `alive` again for each candidate: the one before it may have removed some of the rest.
    for (unsigned left = tile.alive[w]; left != 0; left = tile.alive[w] & left & (left - 1)) {
      const int k = w * 32 + __ffs(int(left)) - 1;
      // Skip it if its class is full: as many of the class have been chosen as there was room for.
      int peers = 0;
      for (int v = 0; v < kWords; ++v) peers += __popc(tile.same[k][v] & tile.chosen[v]);
      if (peers >= tile.room[k]) {
        tile.capped = true;
        continue;
      }
      if (total == max_detections) {
        tile.capped = true;
        break;
      }
      // Choose it, and drop the candidates that it suppresses.
      ++total;
      tile.chosen[w] |= 1u << (k % 32);
      for (int v = w; v < kWords; ++v) tile.alive[v] &= ~tile.hits[k][v];
    }
  }
  tile.size = total;
}

// The number of chosen candidates of the tile that come before that of thread `t`.
__device__ __forceinline__ int chosen_before(const unsigned* chosen, int t) {
  int before = __popc(chosen[t / 32] & ((1u << (t % 32)) - 1));
  for (int w = 0; w < t / 32; ++w) before += __popc(chosen[w]);
  return before;
}

// 128-bit accesses: 1 load, 1 store
template <typename T>
__global__ void __launch_bounds__(kThreads)
    nms_kernel(NmsImages<T> images, NmsRules<T> rules, Box<T>* __restrict__ kept_boxes,
               int64_t* __restrict__ kept_labels, int64_t* __restrict__ index,
               int64_t* __restrict__ kept_count, bool* __restrict__ truncated) {
  __shared__ Box<T> box[kThreads];
  __shared__ int64_t label[kThreads], room[kThreads];
  __shared__ unsigned hits[kThreads][kWords], same[kThreads][kWords];
  __shared__ unsigned alive[kWords], chosen[kWords];
  __shared__ int64_t size;
  __shared__ bool capped;
  const NmsTile<T> tile{box, label, hits, same, room, alive, chosen, size, capped};

  const int64_t image = blockIdx.x, row = image * rules.max_detections;
  const int64_t count =
      images.count[image] < images.candidates ? images.count[image] : images.candidates;
  const int t = threadIdx.x;
  if (t == 0) {
    tile.size = 0;
    tile.capped = false;
  }
  __syncthreads();

  for (int64_t first = 0; first < count; first += kThreads) {
    // All threads must agree on leaving: `size` and `capped` change only between the last two
    // barriers of the loop.
    if (tile.size == rules.max_detections && tile.capped) break;
    const int64_t kept_before = tile.size;

    // Each thread takes a candidate, and drops it if a box kept from an earlier tile suppresses it.
    Candidate<T> mine = load_candidate(images, image, first + t, count);
    const int64_t of_class =
        compare_with_kept(tile, rules, kept_boxes + row, kept_labels + row, kept_before, mine);

    // Compare the candidates that are left with each other.
    share_candidate(tile, mine,
                    rules.max_per_class > 0 ? rules.max_per_class - of_class : images.candidates);
    compare_in_tile(tile, rules, mine);

    // Choose the candidates to keep, in order.
    if (t == 0) choose_in_order(tile, rules.max_detections);
    __syncthreads();

    // Append the chosen candidates to the kept boxes.
    if (bit(tile.chosen, t)) {
      const int64_t slot = row + kept_before + chosen_before(tile.chosen, t);
      kept_boxes[slot] = mine.box;
      kept_labels[slot] = mine.label;
      index[slot] = mine.index;
    }
    // No barrier is needed here: the next iteration has one before it reads what was written.
  }

  // Mark the unused slots, and write the image's count and flag.
  for (int64_t slot = tile.size + t; slot < rules.max_detections; slot += kThreads)
    index[row + slot] = -1;
  if (t == 0) {
    kept_count[image] = tile.size;
    truncated[image] = tile.capped;
  }
}

std::tuple<Tensor, Tensor, Tensor> nms_sorted_cuda(const Tensor& boxes, std::optional<Tensor> order,
                                                   const Tensor& count,
                                                   std::optional<Tensor> labels,
                                                   double iou_threshold, int64_t max_detections,
                                                   int64_t max_per_class, bool class_agnostic) {
  const CudaScope scope("nms_sorted", boxes, order, count, labels);
  const NmsArguments args(boxes, order, count, labels, max_detections);
  Tensor index = torch::stable::new_empty(boxes, {args.images, max_detections}, ScalarType::Long);
  Tensor kept = torch::stable::new_empty(boxes, {args.images}, ScalarType::Long);
  Tensor truncated = torch::stable::new_empty(boxes, {args.images}, ScalarType::Bool);
  if (args.images == 0) return {index, kept, truncated};
  dispatch_compute(boxes.scalar_type(), "nms_sorted", [&](auto zero) {
    using T = decltype(zero);
    const NmsRules<T> rules{T(iou_threshold), max_detections, max_per_class, class_agnostic};
    Tensor kept_boxes = torch::stable::new_empty(boxes, {args.images, max_detections, 4});
    Tensor kept_labels =
        torch::stable::new_empty(boxes, {args.images, max_detections}, ScalarType::Long);
    const NmsImages<T> images{data<Box<T>>(args.boxes), data<int64_t>(args.order),
                              data<int64_t>(args.count), data<int64_t>(args.labels),
                              args.candidates};
    launch("nms_kernel", nms_kernel<T>, unsigned(args.images), kThreads, 0, scope, images, rules,
           data<Box<T>>(kept_boxes), data<int64_t>(kept_labels), data<int64_t>(index),
           data<int64_t>(kept), data<bool>(truncated));
  });
  return {index, kept, truncated};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("nms_sorted", TORCH_BOX(&nms_sorted_cuda));
}

}  // namespace retinanet
