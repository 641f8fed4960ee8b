// dense_box_loss on the CPU.
//
// Each thread takes chunks of kChunk anchors of an image. For an anchor without a match, the
// forward pass reads only its entry in `matches`, and the backward pass only its bit in `matched`.
// Each chunk has its own sum, and the sums are added in order, so that the result does not depend
// on the number of threads.
#include <algorithm>
#include <bit>
#include <cstring>

#include "common/flatten.h"
#include "common/huge_pages.h"
#include "dense_box_loss.h"

namespace retinanet {
namespace {

constexpr int64_t kChunk = 1 << 14;  // anchors
static_assert(kChunk % kWordAnchors == 0);
constexpr int64_t kZeroedChunk = 1 << 20;  // bytes of a gradient

// Calls f(chunk, image, anchor, match) for every anchor whose bit is set in words(image, w), which
// returns the w-th word of `matched` for an image. Chunks are numbered over all images, `chunks`
// for each.
template <typename Words, typename F>
void for_matched(const DenseBoxLossArguments& args, int64_t chunks, Words&& words, F&& f) {
  constexpr int64_t kChunkWords = kChunk / kWordAnchors;
  torch::stable::parallel_for(0, args.heads.images * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t image = c / chunks, begin = c % chunks * kChunkWords;
      const int* matches = data<int>(args.matches) + image * args.anchors.count;
      for (int64_t w = begin; w < std::min(args.words(), begin + kChunkWords); ++w) {
        for (unsigned bits = words(image, w); bits != 0; bits &= bits - 1) {
          const int64_t anchor = w * kWordAnchors + std::countr_zero(bits);
          // A direct call of the backward pass may set bits behind the last anchor.
          if (anchor < args.anchors.count) f(c, image, anchor, matches[anchor]);
        }
      }
    }
  });
}

// The bits of up to kWordAnchors anchors with these matches.
unsigned matched_bits(const int* matches, int64_t count) {
  // Most words have no match. The compiler vectorises this test.
  int all = -1;
  for (int64_t j = 0; j < count; ++j) all &= matches[j];
  if (all < 0) return 0;
  unsigned bits = 0;
  for (int64_t j = 0; j < count; ++j) bits |= unsigned(matches[j] >= 0) << j;
  return bits;
}

// The chunks of one image.
int64_t chunks_of(const DenseBoxLossArguments& args) {
  return (args.anchors.count + kChunk - 1) / kChunk;
}

// Zeroes a new tensor in parallel.
void fill_zero(Tensor& t) {
  advise_huge_pages(t);
  const int64_t bytes = t.numel() * int64_t(t.element_size());
  char* begin = static_cast<char*>(t.mutable_data_ptr());
  torch::stable::parallel_for(0, bytes, kZeroedChunk, [&](int64_t first, int64_t last) {
    std::memset(begin + first, 0, size_t(last - first));
  });
}

std::tuple<Tensor, Tensor> dense_box_loss_cpu(
    std::vector<Tensor> box_deltas, const Tensor& anchors, std::vector<int64_t> grid_sizes,
    std::vector<double> grid_steps, const Tensor& gt_boxes, const Tensor& matches, std::string kind,
    double beta, std::vector<double> weights, std::optional<double> max_log_ratio, double offset) {
  const DenseBoxLossArguments args(box_deltas, anchors, grid_sizes, grid_steps, gt_boxes, matches,
                                   "dense_box_loss");
  Tensor out = torch::stable::new_empty(gt_boxes, {args.heads.images});
  Tensor matched = args.new_matched();
  const int64_t chunks = chunks_of(args);
  dispatch_floating(args.heads.dtype(), "dense_box_loss", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const auto rule = BoxLoss<C>::make(weights, beta, max_log_ratio, offset, "dense_box_loss");
    const BoxLossInputs<T> inputs = args.inputs<T>("dense_box_loss");
    std::vector<double> partial(args.heads.images * chunks);
    dispatch_box_loss(kind, "dense_box_loss", [&](auto kind_constant) {
      constexpr BoxLossKind kKind = decltype(kind_constant)::value;
      const auto words = [&](int64_t image, int64_t w) {
        const int64_t anchor = w * kWordAnchors, left = args.anchors.count - anchor;
        const int* of_word = inputs.matches + image * args.anchors.count + anchor;
        // A constant count lets the compiler unroll its loops.
        const unsigned bits =
            left < kWordAnchors ? matched_bits(of_word, left) : matched_bits(of_word, kWordAnchors);
        data<int>(matched)[image * args.words() + w] = int(bits);
        return bits;
      };
      const auto visit = [&](int64_t chunk, int64_t image, int64_t anchor, int match) {
        inputs.visit_match(image, inputs.place(image, anchor), match,
                           [&](const Box<C>& delta, const Box<C>& anchor_box, const Box<C>& gt) {
                             partial[chunk] += rule.template loss<kKind>(delta, anchor_box, gt);
                           });
      };
      for_matched(args, chunks, words, visit);
    });
    // Add the sums of each image's chunks, in order.
    for (int64_t n = 0; n < args.heads.images; ++n) {
      double sum = 0;
      for (int64_t c = n * chunks; c < (n + 1) * chunks; ++c) sum += partial[c];
      data<C>(out)[n] = C(sum);
    }
  });
  return {out, matched};
}

std::vector<Tensor> dense_box_loss_backward_cpu(
    const Tensor& grad, std::vector<Tensor> box_deltas, const Tensor& anchors,
    std::vector<int64_t> grid_sizes, std::vector<double> grid_steps, const Tensor& gt_boxes,
    const Tensor& matches, const Tensor& matched, std::string kind, double beta,
    std::vector<double> weights, std::optional<double> max_log_ratio, double offset) {
  const DenseBoxLossArguments args(box_deltas, anchors, grid_sizes, grid_steps, gt_boxes, matches,
                                   "dense_box_loss_backward");
  args.heads.check_grad(grad, "dense_box_loss_backward");
  args.check_matched(matched, "dense_box_loss_backward");
  const Tensor all_words = contiguous_aligned(matched);
  const Tensor scales = contiguous_aligned(grad);
  std::vector<Tensor> out = args.heads.empty_like();
  for (Tensor& t : out) fill_zero(t);  // the gradient of anchors without a match
  dispatch_floating(args.heads.dtype(), "dense_box_loss_backward", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const auto rule =
        BoxLoss<C>::make(weights, beta, max_log_ratio, offset, "dense_box_loss_backward");
    const BoxLossInputs<T> inputs = args.inputs<T>("dense_box_loss_backward");
    LevelOutputs<T> grads;
    for (size_t l = 0; l < out.size(); ++l) grads.data[l] = data<T>(out[l]);
    dispatch_box_loss(kind, "dense_box_loss_backward", [&](auto kind_constant) {
      constexpr BoxLossKind kKind = decltype(kind_constant)::value;
      const auto words = [&](int64_t image, int64_t w) {
        return unsigned(data<int>(all_words)[image * args.words() + w]);
      };
      const auto visit = [&](int64_t, int64_t image, int64_t anchor, int match) {
        const C scale = data<C>(scales)[image];
        const auto place = inputs.place(image, anchor);
        inputs.visit_match(
            image, place, match,
            [&](const Box<C>& delta, const Box<C>& anchor_box, const Box<C>& gt) FLATTEN {
              const Box<C> g = rule.template grad<kKind>(delta, anchor_box, gt, scale);
              T* to = grads.data[place.level] + place.offset;
              to[0] = T(g.x1);
              to[place.step] = T(g.y1);
              to[2 * place.step] = T(g.x2);
              to[3 * place.step] = T(g.y2);
            });
      };
      for_matched(args, chunks_of(args), words, visit);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("dense_box_loss", TORCH_BOX(&dense_box_loss_cpu));
  m.impl("dense_box_loss_backward", TORCH_BOX(&dense_box_loss_backward_cpu));
}

}  // namespace retinanet
