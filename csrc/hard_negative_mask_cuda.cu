// Hard negative mining on CUDA.
//
// The anchors of an image are cut into up to 16 tiles, in packs of four. A histogram of the losses
// narrows the search for the last hard negative down to one bin, so that only few keys remain to be
// compared:
//
//     image                 | tile 0          | tile 1          | ...      one block per tile
//          |  The count kernel counts the tile's positives, and its background anchors in each bin.
//          v
//     TileCounts            | 2,048 bins      | 2,048 bins      | ...
//          |  The split kernel, one block per tile, adds the image's counts and finds the bin of
//          |  the last hard negative. It marks the anchors of higher bins in the mask, and lists
//          |  the anchors of that bin.
//          v
//     lists of anchors      | tile 0          | tile 1          | ...
//          |  The finish kernel, one block per image, finds the key of the last hard negative among
//          |  the listed anchors by a radix search, and marks the anchors that rank as high.
//          v
//     mask
//
// If many losses are nearly equal, many anchors are listed, and one block searches them all.
//
// Bytes moved: two reads of labels and losses and one write of the mask, 128 bits of each input at
// a time. In addition, each block of split_kernel reads the counts of its image, 8 KiB per tile,
// and finish_kernel reads the listed anchors and their losses once per digit of the search.
// Deterministic: the atomics are integer counts. The order of a list varies, but keys are unique,
// so exactly the wanted number of anchors reaches the last key.
#include "common/cuda.h"
#include "common/kth_largest.h"
#include "hard_negative_mask.h"

namespace retinanet {
namespace {

constexpr int kThreads = 1024;
constexpr int kPack = Packed<float>::kSize;  // anchors of a pack
constexpr int kMaxTiles = 16;                // tiles of an image
constexpr int kBlocks = 128;                 // blocks that the tiles of all images should make

// A bin holds the losses that agree in sign, exponent and the first 6 bits of the fraction. The
// bins cover 2^-20 to 2^12. Smaller losses belong to the lowest bin, larger ones to the highest.
constexpr int kBins = 2048, kBinShift = 17;
constexpr int kLowest = (127 - 20) << (23 - kBinShift);
constexpr int kBinsPerThread = kBins / kThreads;

// The background anchors of a tile in each bin, and the tile's positives.
struct alignas(8) TileCounts {
  unsigned bins[kBins];
  unsigned positives;
};

// The part of a tile's background anchors that is not decided by the bins.
struct TileList {
  unsigned size;  // listed anchors of the tile
  int bin;        // the bin that they belong to
  unsigned rank;  // the last hard negative is the one of this rank among the image's listed anchors
};

// How the anchors of all images are cut into tiles.
struct Tiles {
  int anchors;  // anchors of an image
  int tiles;    // tiles of an image
  int packs;    // packs of a tile

  __device__ __forceinline__ int64_t image() const { return blockIdx.x / tiles; }
  __device__ __forceinline__ int tile() const { return int(blockIdx.x) % tiles; }

  // The first anchor of a tile of this image, counted over all images. It is a multiple of a pack,
  // and therefore may belong to the image before.
  __device__ __forceinline__ int64_t begin(int64_t image, int tile) const {
    return (image * anchors / kPack + int64_t(tile) * packs) * kPack;
  }

  // The place of a tile's list of anchors.
  __device__ __forceinline__ int64_t list(int64_t image, int tile) const {
    return (image * tiles + tile) * packs * kPack;
  }
};

// The labels and losses of four anchors. Anchors of other images count as ignored.
struct AnchorPack {
  int64_t first;       // the first anchor, counted over all images
  bool whole;          // all four anchors belong to the image
  bool inside[kPack];  // whether this anchor does, if not all do
  Packed<int32_t> label;
  Packed<float> loss;
};

// Calls f(pack) for each pack of the block's tile that this thread processes.
template <typename F>
__device__ __forceinline__ void for_packs(const Tiles& tiles, const float* __restrict__ losses,
                                          const int32_t* __restrict__ labels, const F& f) {
  const int64_t image = tiles.image();
  const int64_t begin = image * tiles.anchors, end = begin + tiles.anchors;
  const int64_t tile = tiles.begin(image, tiles.tile());
  for (int p = threadIdx.x; p < tiles.packs; p += kThreads) {
    AnchorPack pack;
    pack.first = tile + int64_t(p) * kPack;
    if (pack.first >= end) break;
    pack.whole = pack.first >= begin && pack.first + kPack <= end;
    if (pack.whole) {
      pack.label = load_packed(labels + pack.first);
      pack.loss = load_packed(losses + pack.first);
    } else {
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const int64_t anchor = pack.first + j;
        pack.inside[j] = anchor >= begin && anchor < end;
        pack.label.v[j] = pack.inside[j] ? labels[anchor] : kIgnored;
        pack.loss.v[j] = pack.inside[j] ? losses[anchor] : 0;
      }
    }
    f(pack);
  }
}

__device__ __forceinline__ int bin_of(float loss) {
  const int bin = int(hard_negative_key(loss, 0) >> (32 + kBinShift)) - kLowest;
  return bin < 0 ? 0 : bin < kBins ? bin : kBins - 1;
}

// 128-bit accesses: 2 loads, 0 stores
__global__ void __launch_bounds__(kThreads)
    hard_negative_count_kernel(const float* __restrict__ losses, const int32_t* __restrict__ labels,
                               Tiles tiles, TileCounts* __restrict__ counts) {
  __shared__ unsigned histogram[kBins], all_positives;
  for (int b = threadIdx.x; b < kBins; b += kThreads) histogram[b] = 0;
  if (threadIdx.x == 0) all_positives = 0;
  __syncthreads();
  // Count the tile's anchors. Many losses are tiny, so the lowest bin is counted in a register. A
  // thread adds a run of anchors of one bin at once.
  unsigned positives = 0, lowest = 0, run = 0;
  int run_bin = 0;
  for_packs(tiles, losses, labels, [&](const AnchorPack& pack) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      positives += pack.label.v[j] >= 0;
      if (pack.label.v[j] != kBackground) continue;
      const int bin = bin_of(pack.loss.v[j]);
      if (bin == 0) {
        ++lowest;
        continue;
      }
      if (bin != run_bin) {
        if (run > 0) atomicAdd(&histogram[run_bin], run);
        run_bin = bin;
        run = 0;
      }
      ++run;
    }
  });
  if (run > 0) atomicAdd(&histogram[run_bin], run);
  lowest = warp_sum(lowest);
  positives = warp_sum(positives);
  if (threadIdx.x % kWarp == 0) {
    atomicAdd(&histogram[0], lowest);
    atomicAdd(&all_positives, positives);
  }
  __syncthreads();
  // Write the counts.
  TileCounts& mine = counts[blockIdx.x];
  for (int b = threadIdx.x; b < kBins; b += kThreads) mine.bins[b] = histogram[b];
  if (threadIdx.x == 0) mine.positives = all_positives;
}

// 128-bit accesses: 2 loads, 0 stores
__global__ void __launch_bounds__(kThreads)
    hard_negative_split_kernel(const float* __restrict__ losses, const int32_t* __restrict__ labels,
                               Tiles tiles, double ratio, int64_t min_negatives,
                               const TileCounts* __restrict__ counts, bool* __restrict__ mask,
                               int* __restrict__ anchors, TileList* __restrict__ lists) {
  __shared__ BinSearch<kThreads> search;
  __shared__ unsigned wanted, listed;
  // Add the counts of the image's tiles. Each thread owns two bins, from the highest down.
  const int64_t image = tiles.image();
  const TileCounts* image_counts = counts + image * tiles.tiles;
  static_assert(kBinsPerThread == 2, "a thread must read its bins with one access");
  const int lower_bin = kBins - 2 - 2 * int(threadIdx.x);
  unsigned bins[kBinsPerThread] = {0, 0};
#pragma unroll 4
  for (int t = 0; t < tiles.tiles; ++t) {
    const uint2 pair = *reinterpret_cast<const uint2*>(&image_counts[t].bins[lower_bin]);
    bins[0] += pair.y;
    bins[1] += pair.x;
  }
  const unsigned negatives = block_sum<kThreads>(bins[0] + bins[1]);
  const unsigned positives = block_sum<kThreads>(
      int(threadIdx.x) < tiles.tiles ? image_counts[threadIdx.x].positives : 0u);
  if (threadIdx.x == 0) {
    wanted = unsigned(num_hard_negatives(positives, negatives, ratio, min_negatives));
    listed = 0;
  }
  __syncthreads();
  // Find the bin of the last hard negative. If the whole bin is wanted, nothing is left to decide.
  RankedBin last{kBins, 0, 0};
  if (wanted > 0) last = bin_of_rank(search, bins, wanted);
  const int first_marked = last.through == wanted ? last.bin : last.bin + 1;

  // Write the mask, and list the anchors of the bin that is left to decide.
  int* list = anchors + tiles.list(image, tiles.tile());
  for_packs(tiles, losses, labels, [&](const AnchorPack& pack) {
    unsigned marks = 0, undecided = 0;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      if (pack.label.v[j] != kBackground) continue;
      const int bin = bin_of(pack.loss.v[j]);
      if (bin >= first_marked)
        marks |= 1u << 8 * j;
      else if (bin == last.bin)
        undecided |= 1u << j;
    }
    if (pack.whole) {
      *reinterpret_cast<unsigned*>(mask + pack.first) = marks;
    } else {
#pragma unroll
      for (int j = 0; j < kPack; ++j)
        if (pack.inside[j]) mask[pack.first + j] = marks >> 8 * j & 1;
    }
    if (undecided == 0) return;
    unsigned slot = atomicAdd(&listed, unsigned(__popc(undecided)));
#pragma unroll
    for (int j = 0; j < kPack; ++j)
      if (undecided >> j & 1) list[slot++] = int(pack.first + j - image * tiles.anchors);
  });
  __syncthreads();
  if (threadIdx.x == 0) lists[blockIdx.x] = {listed, last.bin, wanted - last.above};
}

__global__ void __launch_bounds__(kThreads)
    hard_negative_finish_kernel(const float* __restrict__ losses, Tiles tiles,
                                const int* __restrict__ anchors, const TileList* __restrict__ lists,
                                bool* __restrict__ mask) {
  __shared__ BlockRadixSearch<kThreads> search;
  __shared__ unsigned ends[kMaxTiles];
  const int64_t image = blockIdx.x;
  losses += image * tiles.anchors;
  mask += image * tiles.anchors;
  lists += image * tiles.tiles;
  // Number the listed anchors of the image over its tiles.
  if (threadIdx.x == 0) {
    unsigned end = 0;
    for (int t = 0; t < tiles.tiles; ++t) ends[t] = end += lists[t].size;
  }
  __syncthreads();
  const unsigned total = ends[tiles.tiles - 1];
  if (total == 0) return;

  // Visits the listed anchors.
  const auto for_anchors = [&](auto&& visit) {
    int tile = 0;
    for (unsigned i = threadIdx.x; i < total; i += kThreads) {
      while (i >= ends[tile]) ++tile;
      const unsigned before = tile == 0 ? 0 : ends[tile - 1];
      visit(anchors[tiles.list(image, tile) + (i - before)]);
    }
  };
  // Keys of an inner bin agree in their highest bits.
  const int bin = lists[0].bin;
  const int bits = bin == 0 || bin == kBins - 1 ? 64 : 32 + kBinShift;
  const auto key_of = [&](int anchor) {
    const uint64_t key = uint64_t(hard_negative_key(losses[anchor], unsigned(anchor)));
    return (key ^ uint64_t(1) << 63) & ~uint64_t(0) >> (64 - bits);
  };
  // Find the key of the last hard negative, and mark the anchors that rank at least as high.
  const uint64_t last = bound_of_largest<uint64_t>(
      search, bits, lists[0].rank, lists[0].rank,
      [&](auto&& visit) { for_anchors([&](int anchor) { visit(key_of(anchor)); }); });
  for_anchors([&](int anchor) {
    if (key_of(anchor) >= last) mask[anchor] = true;
  });
}

Tiles cut_into_tiles(int64_t images, int64_t anchors) {
  // An image that does not start at a multiple of a pack can straddle one more pack.
  const int64_t packs = ceil_div(anchors, kPack) + 1;
  const int64_t tiles =
      std::clamp<int64_t>(std::min(kBlocks / images, ceil_div(packs, kThreads)), 1, kMaxTiles);
  return {int(anchors), int(tiles), int(ceil_div(packs, tiles))};
}

Tensor hard_negative_mask_cuda(const Tensor& loss, const Tensor& labels, double ratio,
                               int64_t min_negatives) {
  const CudaScope scope("hard_negative_mask", loss, labels);
  const HardNegativeArguments args(loss, labels, ratio, min_negatives);
  Tensor mask = torch::stable::new_empty(loss, {args.images, args.anchors}, ScalarType::Bool);
  if (args.images == 0 || args.anchors == 0) return mask;
  const Tiles tiles = cut_into_tiles(args.images, args.anchors);
  const int64_t blocks = args.images * tiles.tiles;
  Tensor counts =
      torch::stable::new_empty(loss, {blocks * int64_t(sizeof(TileCounts))}, ScalarType::Byte);
  Tensor lists =
      torch::stable::new_empty(loss, {blocks * int64_t(sizeof(TileList))}, ScalarType::Byte);
  // A list has room for all anchors of its tile.
  Tensor anchors = torch::stable::new_empty(args.labels, {blocks * tiles.packs * kPack});
  launch("hard_negative_count_kernel", hard_negative_count_kernel, unsigned(blocks), kThreads, 0,
         scope, data<float>(args.loss), data<int32_t>(args.labels), tiles,
         data<TileCounts>(counts));
  launch("hard_negative_split_kernel", hard_negative_split_kernel, unsigned(blocks), kThreads, 0,
         scope, data<float>(args.loss), data<int32_t>(args.labels), tiles, ratio, min_negatives,
         data<TileCounts>(counts), data<bool>(mask), data<int>(anchors), data<TileList>(lists));
  launch("hard_negative_finish_kernel", hard_negative_finish_kernel, unsigned(args.images),
         kThreads, 0, scope, data<float>(args.loss), tiles, data<int>(anchors),
         data<TileList>(lists), data<bool>(mask));
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("hard_negative_mask", TORCH_BOX(&hard_negative_mask_cuda));
}

}  // namespace retinanet
