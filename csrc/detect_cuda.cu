// Dense detection on CUDA.
//
// Selecting takes three kernels:
//
//     logits of a level    sample_kernel (detect_cuda_sample.h), one block per level and image,
//          |               bounds the topk-th best key from below by a sample, if many logits pass.
//          v
//     logits of a level    | tile 0              | tile 1              | ...      in memory order
//          |               select_tile_kernel (detect_cuda_tile.h), one block per tile and image,
//          |               keeps about the topk best keys of each tile.
//          v
//     segments             | best keys of tile 0 | best keys of tile 1 | ...     in global memory
//          |               select_level_kernel (detect_cuda_level.h), one block per level and
//          |               image, selects the topk best of the level's segments.
//          v
//     keys of an image     | level 0, topk slots | level 1, topk slots | ...     in any order
//
// `detect` ends with finish_kernel (detect_cuda_finish.h), which orders, decodes and filters the
// candidates of an image by NMS and writes its slots. The ops select_candidates and
// decode_candidates are steps of their own: the former sorts the keys, and the latter decodes one
// candidate per thread.
//
// A topk for which a block's memory does not suffice takes more passes over the logits
// (detect_cuda_many.h).
//
// Bytes moved: the logits are read once, 128 bits at a time. A segment's keys are written once, and
// its best are read at most seven times, mostly from the cache. Deterministic: the order in which
// integer atomics hand out slots varies, but keys are unique. The same keys survive in any order,
// and sorting removes the order itself.
#include "common/sort_rows.h"
#include "detect_cuda_finish.h"
#include "detect_cuda_level.h"
#include "detect_cuda_many.h"
#include "detect_cuda_sample.h"

namespace retinanet {
namespace {

constexpr int kThreads = 256;
// The most keys of an image that finish_kernel searches through repeatedly. More are sorted first.
constexpr int64_t kMostUnsorted = 1 << 14;

// Cuts the levels into tiles of 8 to 64 steps, such that a launch has about 1,024 tiles, which are
// two waves of blocks on a large GPU.
template <typename T>
Tiles tiles_of(const HeadLevels<T>& levels, int64_t images, int64_t topk) {
  using Select = SelectTile<T>;
  Tiles tiles;
  int64_t steps = 0;
  for (int l = 0; l < levels.count; ++l) steps += ceil_div(levels.level[l].size(), Select::kStep);
  tiles.steps = int(std::clamp<int64_t>(ceil_div(steps * images, 1024), 8, 64));
  tiles.topk = int(topk);
  for (int l = 0; l < levels.count; ++l) {
    const int64_t size = levels.level[l].size();
    // The image may start anywhere within the first pack.
    const int64_t places = size == 0 ? 0 : size + Select::kSize - 1;
    tiles.first[l + 1] =
        tiles.first[l] + int(ceil_div(places, int64_t(tiles.steps) * Select::kStep));
    tiles.slot[l + 1] = tiles.slot[l] + std::min(topk, size);
  }
  return tiles;
}

// Writes the topk best keys of each level and image, in any order.
template <typename T>
void select_few(const CudaScope& scope, const HeadTensors& heads, const Tiles& tiles, float limit,
                Tensor& keys, Tensor& truncated) {
  const HeadLevels<T> levels = heads.view<T>();
  const unsigned images = unsigned(heads.images), num_levels = unsigned(levels.count);
  const int64_t num_tiles = tiles.first[num_levels];
  const int64_t segments_shape[] = {heads.images * num_tiles * kSegment},
                results_shape[] = {heads.images * num_tiles * int64_t(sizeof(TileResult))};
  Tensor segments = empty(keys, segments_shape, 1, ScalarType::Long);
  Tensor results = empty(keys, results_shape, 1, ScalarType::Byte);
  const int64_t floors_shape[] = {heads.images, num_levels};
  Tensor floors = empty(keys, floors_shape, 2, ScalarType::Long);
  if (num_tiles > 0) {
    launch("sample_kernel", sample_kernel<T>, dim3(num_levels, images), kSampleThreads, 0, scope,
           levels, tiles.topk, limit, data<int64_t>(floors));
    launch("select_tile_kernel", select_tile_kernel<T>, dim3(unsigned(num_tiles), images),
           SelectTile<T>::kThreads, 0, scope, levels, tiles, limit, data<int64_t>(floors),
           data<int64_t>(segments), data<TileResult>(results));
  }
  launch("select_level_kernel", select_level_kernel, dim3(num_levels, images), kLevelThreads, 0,
         scope, tiles, data<int64_t>(segments), data<TileResult>(results), data<int64_t>(keys),
         data<bool>(truncated));
}

// The same for a topk above kSegment.
template <typename T>
void select_many(const CudaScope& scope, const HeadTensors& heads, const Tiles& tiles, float limit,
                 Tensor& keys, Tensor& truncated) {
  const HeadLevels<T> levels = heads.view<T>();
  const unsigned images = unsigned(heads.images), num_levels = unsigned(levels.count);
  const unsigned num_tiles = unsigned(tiles.first[num_levels]);
  const int64_t searches_shape[] = {heads.images * num_levels * int64_t(sizeof(LevelSearch))},
                counts_shape[] = {heads.images, num_levels, BestKeysSearch<1024>::kBins};
  Tensor searches = torch::stable::new_zeros(keys, searches_shape, ScalarType::Byte);
  Tensor counts = torch::stable::new_zeros(keys, counts_shape, ScalarType::Int);
  const dim3 tile_grid(num_tiles, images), level_grid(num_levels, images);
  for (int pass = 0; pass < kBinPasses; ++pass) {
    if (num_tiles > 0)
      launch("count_bins_kernel", count_bins_kernel<T>, tile_grid, SelectTile<T>::kThreads, 0,
             scope, levels, tiles, limit, pass, data<LevelSearch>(searches),
             data<unsigned>(counts));
    launch("choose_bin_kernel", choose_bin_kernel, level_grid, 1024, 0, scope, tiles, pass,
           data<LevelSearch>(searches), data<unsigned>(counts), data<bool>(truncated));
  }
  if (num_tiles > 0)
    launch("write_keys_kernel", write_keys_kernel<T>, tile_grid, SelectTile<T>::kThreads, 0, scope,
           levels, tiles, limit, data<LevelSearch>(searches), data<int64_t>(keys));
}

// Keys [N, S] of the topk best candidates of each level, in any order, and flags [N, L].
std::tuple<Tensor, Tensor> selected_keys(const CudaScope& scope, const HeadTensors& heads,
                                         double score_threshold, int64_t topk, const char* op) {
  check(topk < (int64_t(1) << 31), op, ": expected topk < 2^31, got ", topk);
  check_batch(op, heads.images);
  int64_t width = 0;
  for (const int64_t slots : candidate_slots(heads, topk)) width += slots;
  const int64_t keys_shape[] = {heads.images, width},
                truncated_shape[] = {heads.images, int64_t(heads.tensors.size())};
  Tensor keys = empty(heads.tensors[0], keys_shape, 2, ScalarType::Long);
  Tensor truncated = empty(heads.tensors[0], truncated_shape, 2, ScalarType::Bool);
  if (heads.images == 0) return {keys, truncated};
  const float limit = logit_limit(score_threshold);
  dispatch_floating(heads.dtype(), op, [&](auto zero) {
    using T = decltype(zero);
    const Tiles tiles = tiles_of(heads.view<T>(), heads.images, topk);
    if (topk <= kSegment) {
      select_few<T>(scope, heads, tiles, limit, keys, truncated);
    } else {
      select_many<T>(scope, heads, tiles, limit, keys, truncated);
    }
  });
  return {keys, truncated};
}

std::tuple<Tensor, Tensor> select_candidates_cuda(std::vector<Tensor> cls_logits,
                                                  int64_t num_classes, double score_threshold,
                                                  int64_t topk) {
  const HeadTensors heads(cls_logits, "select_candidates", "cls_logits");
  check_select_candidates(heads, num_classes, topk, "select_candidates");
  const CudaScope scope("select_candidates", cls_logits[0], cls_logits);
  const auto [keys, truncated] =
      selected_keys(scope, heads, score_threshold, topk, "select_candidates");
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

DetectResults detect_cuda(std::vector<Tensor> cls_logits, std::vector<Tensor> box_deltas,
                          const Tensor& anchors, std::vector<int64_t> grid_sizes,
                          std::vector<double> grid_steps, const Tensor& image_sizes,
                          double score_threshold, int64_t topk, double iou_threshold,
                          int64_t max_detections, int64_t max_per_class, bool class_agnostic,
                          std::vector<double> coder_weights, std::optional<double> min_log_ratio,
                          std::optional<double> max_log_ratio, double offset, bool clip_after_nms) {
  check(!cls_logits.empty(), "detect: expected 1 to ", kMaxLevels, " levels of cls_logits, got 0");
  const CudaScope scope("detect", cls_logits[0], cls_logits, box_deltas, anchors, image_sizes);
  const DetectArguments args(cls_logits, box_deltas, anchors, grid_sizes, grid_steps, image_sizes,
                             topk, max_detections, clip_after_nms);
  DetectResults results = args.empty_results();
  if (args.logits.images == 0) return results;
  auto [keys, truncated] = selected_keys(scope, args.logits, score_threshold, topk, "detect");
  const bool sort_first = keys.size(1) > kMostUnsorted;
  if (sort_first) keys = sorted_descending(keys);
  dispatch_floating(args.decode.deltas.dtype(), args.decode.op, [&](auto zero) {
    using Delta = decltype(zero);
    dispatch_compute(args.decode.box_dtype, args.decode.op, [&](auto compute_zero) {
      using T = decltype(compute_zero);
      const CandidateDecoder<T, Delta> decode = args.decode.decoder<T, Delta>(
          box_coder<T>(coder_weights, min_log_ratio, max_log_ratio, offset, args.decode.op));
      const NmsRules<T> rules{T(iou_threshold), max_detections, max_per_class, class_agnostic};
      const SelectedKeys selected{data<int64_t>(keys), data<bool>(truncated), keys.size(1),
                                  int(cls_logits.size()), sort_first};
      const int64_t kept_shape[] = {args.logits.images, max_detections, NmsBox<T>::kBytes};
      Tensor kept = empty(keys, kept_shape, 3, ScalarType::Byte);
      launch("finish_kernel", finish_kernel<T, Delta>, unsigned(args.logits.images),
             NmsRounds<T>::kThreads, 0, scope, decode, rules, selected, data<NmsBox<T>>(kept),
             args.slots<T>(results));
    });
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("detect", TORCH_BOX(&detect_cuda));
  m.impl("select_candidates", TORCH_BOX(&select_candidates_cuda));
  m.impl("decode_candidates", TORCH_BOX(&decode_candidates_cuda));
}

}  // namespace retinanet
