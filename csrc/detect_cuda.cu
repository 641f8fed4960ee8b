// Dense detection on CUDA.
//
// Selecting takes two kernels, which find the best keys by a radix search for the k-th largest:
//
//     logits of a level    | tile 0              | tile 1              | ...      in memory order
//                          | step | step | ...   |              a step is 256 threads x 16 bytes
//          |  select_tile_kernel, one block per tile and image, collects the keys of passing logits
//          |  in shared memory, and prunes them to the topk best before the buffer can overflow.
//          v
//     segments             | best keys of tile 0 | best keys of tile 1 | ...     in global memory
//          |  select_level_kernel, one block per level and image, selects the topk best of the
//          |  level's segments.
//          v
//     keys of an image     | level 0, topk slots | level 1, topk slots | ...     sorted at the end
//
// Decoding: one thread per candidate reads its key and its four deltas.
//
// Bytes moved: the logits are read once, 128 bits at a time. A segment's keys are written once and
// read at most nine times, mostly from the cache. Deterministic: the order in which integer atomics
// hand out slots varies, but keys are unique. The same keys survive in any order, and the final
// sort removes the order itself.
#include "common/cuda.h"
#include "common/kth_largest.h"
#include "common/sort_rows.h"
#include "detect_decode.h"

namespace retinanet {
namespace {

constexpr int kThreads = RadixSearch::kThreads;
constexpr int kBuffer = 4096;  // keys in shared memory
// Largest topk for which a pruned buffer has room for another step.
constexpr int kMaxPruned = 2048;
constexpr int kSteps = 32;  // steps of a tile, each of one 128-bit load per thread

// How the levels of an image are cut into tiles.
struct Tiles {
  int first[kMaxLevels + 1] = {0};     // the level's first tile
  int64_t slot[kMaxLevels + 1] = {0};  // the level's first slot in the output
  int64_t elements;                    // logits of a tile
  int capacity;                        // keys that a tile's segment has room for
  int topk;
};

// Prunes keys[0 .. count) in shared memory to the k < count largest, in any order, and sets
// `counter` to their number. Returns the smallest of them. All threads must call this function.
__device__ __forceinline__ int64_t prune(RadixSearch& search, int64_t* keys, int count, int k,
                                         int& counter) {
  const int64_t least = kth_largest(search, k, [&](auto&& visit) {
    for (int i = threadIdx.x; i < count; i += kThreads) visit(keys[i]);
  });
  // Take a copy, because the survivors overwrite the buffer ...
  int64_t mine[kBuffer / kThreads];
#pragma unroll
  for (int j = 0; j < kBuffer / kThreads; ++j) {
    const int i = j * kThreads + threadIdx.x;
    mine[j] = i < count ? keys[i] : kNoKey;
  }
  if (threadIdx.x == 0) counter = 0;
  __syncthreads();
  // ... and write the survivors back.
#pragma unroll
  for (int j = 0; j < kBuffer / kThreads; ++j) {
    if (mine[j] >= least) keys[atomicAdd(&counter, 1)] = mine[j];
  }
  __syncthreads();
  return least;
}

// Writes the best keys of a tile to its segment, their number to `kept`, and the number of logits
// that passed to `passed`.
// 128-bit accesses: 1 load, 0 stores
template <typename T>
__global__ void __launch_bounds__(kThreads)
    select_tile_kernel(HeadLevels<T> levels, Tiles tiles, float limit,
                       int64_t* __restrict__ segments, int* __restrict__ kept,
                       int* __restrict__ passed) {
  __shared__ RadixSearch search;
  __shared__ int64_t keys[kBuffer];
  __shared__ int counter;
  constexpr int kSize = Packed<T>::kSize;
  static_assert(kMaxPruned + kThreads * kSize <= kBuffer,
                "a pruned buffer must have room for another step");

  // Find the level of this tile, and the tile's logits [begin, end) in the level.
  const int tile = blockIdx.x;
  int l = 0;
  while (tile >= tiles.first[l + 1]) ++l;
  const HeadLevel<T>& level = levels.level[l];
  const T* x = level.data + int64_t(blockIdx.y) * level.size();
  const int64_t begin = int64_t(tile - tiles.first[l]) * tiles.elements;
  const int64_t end = begin + tiles.elements < level.size() ? begin + tiles.elements : level.size();
  const bool aligned = reinterpret_cast<uintptr_t>(x + begin) % 16 == 0;

  int64_t floor = kNoKey;  // keys up to this one are not among the topk best of the tile
  int my_passed = 0;
  if (threadIdx.x == 0) counter = 0;
  __syncthreads();
  for (int64_t step = begin; step < end; step += kThreads * kSize) {
    // Make room for the step's keys.
    const int count = counter;
    __syncthreads();  // all threads have read the counter before any adds to it
    if (count + kThreads * kSize > kBuffer) floor = prune(search, keys, count, tiles.topk, counter);
    // Load 16 bytes of logits, one by one if the tile is not aligned or ends within them.
    const int64_t first = step + int64_t(threadIdx.x) * kSize;
    Packed<T> pack;
    if (aligned && first + kSize <= end) {
      pack = load_packed(x + first);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (first + j < end) pack.v[j] = x[first + j];
      }
    }
    // Store the keys of the logits that pass and may be among the best.
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (first + j >= end) break;
      const float logit = float(pack.v[j]);
      if (!(logit >= limit)) continue;
      ++my_passed;
      const int64_t key =
          ranking_key(logit, uint32_t(level.first + level.anchor_order_of_offset(first + j)));
      if (key > floor) keys[atomicAdd(&counter, 1)] = key;
    }
    __syncthreads();
  }

  // Write the best keys to the tile's segment.
  if (counter > tiles.capacity) prune(search, keys, counter, tiles.capacity, counter);
  const int64_t segment = int64_t(blockIdx.y) * gridDim.x + tile;
  const int count = counter;
  for (int i = threadIdx.x; i < count; i += kThreads)
    segments[segment * tiles.capacity + i] = keys[i];
  const int total = block_sum<kThreads>(my_passed);
  if (threadIdx.x == 0) {
    kept[segment] = count;
    passed[segment] = total;
  }
}

// Writes the topk best keys of a level to its slots.
__global__ void __launch_bounds__(kThreads)
    select_level_kernel(Tiles tiles, int num_tiles, const int64_t* __restrict__ segments,
                        const int* __restrict__ kept, const int* __restrict__ passed,
                        int64_t* __restrict__ keys, bool* __restrict__ truncated) {
  __shared__ RadixSearch search;
  __shared__ int64_t level_kept, level_passed;
  __shared__ int counter;
  const int l = blockIdx.x;
  const int64_t image = blockIdx.y;
  // Add up the numbers of kept and of passed logits over the level's tiles.
  int64_t my_kept = 0, my_passed = 0;
  for (int tile = tiles.first[l] + int(threadIdx.x); tile < tiles.first[l + 1]; tile += kThreads) {
    my_kept += kept[image * num_tiles + tile];
    my_passed += passed[image * num_tiles + tile];
  }
  my_kept = block_sum<kThreads>(my_kept);
  my_passed = block_sum<kThreads>(my_passed);
  if (threadIdx.x == 0) {
    level_kept = my_kept;
    level_passed = my_passed;
    counter = 0;
  }
  __syncthreads();

  // Visits every key of the level's segments. A warp takes a segment, and its lanes the keys.
  const auto for_keys = [&](auto&& visit) {
    for (int tile = tiles.first[l] + int(threadIdx.x) / kWarp; tile < tiles.first[l + 1];
         tile += kThreads / kWarp) {
      const int64_t segment = image * num_tiles + tile;
      for (int i = threadIdx.x % kWarp; i < kept[segment]; i += kWarp)
        visit(segments[segment * tiles.capacity + i]);
    }
  };
  // Find the smallest key to select. If the keys fit in the level's slots, select all.
  const int64_t slots = tiles.slot[l + 1] - tiles.slot[l];
  const int64_t least =
      level_kept > slots ? kth_largest(search, unsigned(slots), for_keys) : kNoKey;
  // Write the selected keys to the level's slots, and mark the unused slots.
  int64_t* out = keys + image * tiles.slot[gridDim.x] + tiles.slot[l];
  for_keys([&](int64_t key) {
    if (key >= least) out[atomicAdd(&counter, 1)] = key;
  });
  __syncthreads();
  for (int64_t i = int64_t(counter) + threadIdx.x; i < slots; i += kThreads) out[i] = kNoKey;
  if (threadIdx.x == 0) truncated[image * gridDim.x + l] = level_passed > tiles.topk;
}

std::tuple<Tensor, Tensor> select_candidates_cuda(std::vector<Tensor> cls_logits,
                                                  int64_t num_classes, double score_threshold,
                                                  int64_t topk) {
  const HeadTensors heads(cls_logits, "select_candidates", "cls_logits");
  check_select_candidates(heads, num_classes, topk, "select_candidates");
  check(topk < (int64_t(1) << 31), "select_candidates: expected topk < 2^31, got ", topk);
  check_batch("select_candidates", heads.images);
  const CudaScope scope("select_candidates", cls_logits[0], cls_logits);
  const int num_levels = int(heads.tensors.size());
  const float limit = logit_limit(score_threshold);
  Tiles tiles;
  const std::vector<int64_t> slots = candidate_slots(heads, topk);
  for (int l = 0; l < num_levels; ++l) tiles.slot[l + 1] = tiles.slot[l] + slots[l];
  Tensor keys = torch::stable::new_empty(cls_logits[0], {heads.images, tiles.slot[num_levels]},
                                         ScalarType::Long);
  Tensor truncated =
      torch::stable::new_empty(cls_logits[0], {heads.images, num_levels}, ScalarType::Bool);
  if (heads.images == 0) return {keys, truncated};
  dispatch_floating(cls_logits[0].scalar_type(), "select_candidates", [&](auto zero) {
    using T = decltype(zero);
    const HeadLevels<T> levels = heads.view<T>();
    const int64_t step = kThreads * Packed<T>::kSize;
    // If topk keys and another step do not fit in the buffer, a tile is one step: its keys always
    // fit.
    tiles.elements = topk <= kMaxPruned ? kSteps * step : step;
    tiles.capacity = int(std::min(topk, tiles.elements));
    tiles.topk = int(topk);
    for (int l = 0; l < num_levels; ++l)
      tiles.first[l + 1] = tiles.first[l] + int(ceil_div(levels.level[l].size(), tiles.elements));
    const int num_tiles = tiles.first[num_levels];
    Tensor segments = torch::stable::new_empty(
        cls_logits[0], {heads.images, num_tiles, tiles.capacity}, ScalarType::Long);
    Tensor kept =
        torch::stable::new_empty(cls_logits[0], {heads.images, num_tiles}, ScalarType::Int);
    Tensor passed =
        torch::stable::new_empty(cls_logits[0], {heads.images, num_tiles}, ScalarType::Int);
    const unsigned images = unsigned(heads.images);
    if (num_tiles > 0)
      launch("select_tile_kernel", select_tile_kernel<T>, dim3(num_tiles, images), kThreads, 0,
             scope, levels, tiles, limit, data<int64_t>(segments), data<int>(kept),
             data<int>(passed));
    launch("select_level_kernel", select_level_kernel, dim3(num_levels, images), kThreads, 0, scope,
           tiles, num_tiles, data<int64_t>(segments), data<int>(kept), data<int>(passed),
           data<int64_t>(keys), data<bool>(truncated));
  });
  return {sorted_descending(keys), truncated};
}

// 128-bit accesses: 0 loads, 1 store
template <typename T, typename Delta>
__global__ void __launch_bounds__(kThreads)
    decode_candidates_kernel(CandidateDecoder<T, Delta> decode, const int64_t* __restrict__ keys,
                             int64_t slots, DecodeOutputs<T> out) {
  const int64_t image = blockIdx.y;
  for (int64_t slot = int64_t(blockIdx.x) * kThreads + threadIdx.x; slot < slots;
       slot += int64_t(gridDim.x) * kThreads) {
    const int64_t i = image * slots + slot;
    out.write(i, decode(image, keys[i]));
  }
}

DecodeResults decode_candidates_cuda(const Tensor& keys, std::vector<Tensor> box_deltas,
                                     const Tensor& anchors, std::vector<int64_t> grid_sizes,
                                     std::vector<double> grid_steps,
                                     std::optional<Tensor> image_sizes, int64_t num_classes,
                                     std::vector<double> coder_weights,
                                     std::optional<double> min_log_ratio,
                                     std::optional<double> max_log_ratio, double offset) {
  const CudaScope scope("decode_candidates", keys, box_deltas, anchors, image_sizes);
  const DecodeArguments args(box_deltas, anchors, grid_sizes, grid_steps, image_sizes, num_classes,
                             "decode_candidates");
  const Tensor rows = args.checked_keys(keys);
  const int64_t slots = rows.size(1);
  DecodeResults results = args.empty_results(rows);
  if (args.images == 0 || slots == 0) return results;
  check_batch(args.op, args.images);
  dispatch_floating(args.deltas.dtype(), args.op, [&](auto zero) {
    using Delta = decltype(zero);
    dispatch_compute(args.box_dtype, args.op, [&](auto compute_zero) {
      using T = decltype(compute_zero);
      const CandidateDecoder<T, Delta> decode = args.decoder<T, Delta>(
          box_coder<T>(coder_weights, min_log_ratio, max_log_ratio, offset, args.op));
      const dim3 grid(unsigned(std::min<int64_t>(ceil_div(slots, kThreads), 1 << 20)),
                      unsigned(args.images));
      launch("decode_candidates_kernel", decode_candidates_kernel<T, Delta>, grid, kThreads, 0,
             scope, decode, data<int64_t>(rows), slots, args.outputs<T>(results));
    });
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("select_candidates", TORCH_BOX(&select_candidates_cuda));
  m.impl("decode_candidates", TORCH_BOX(&decode_candidates_cuda));
}

}  // namespace retinanet
