// Hard negative mining on the CPU: images in parallel. std::nth_element finds the negatives with
// the highest keys.
#include <algorithm>
#include <functional>

#include "hard_negative_mask.h"

namespace retinanet {
namespace {

void hard_negatives_of_image(const float* loss, const int32_t* labels, int64_t anchors,
                             double ratio, int64_t min_negatives, bool* mask) {
  std::vector<int64_t> keys;
  int64_t positives = 0;
  for (int64_t a = 0; a < anchors; ++a) {
    positives += labels[a] >= 0;
    if (labels[a] == kBackground) keys.push_back(hard_negative_key(loss[a], uint32_t(a)));
  }
  const int64_t count = num_hard_negatives(positives, int64_t(keys.size()), ratio, min_negatives);
  std::fill(mask, mask + anchors, false);
  if (count == 0) return;
  std::nth_element(keys.begin(), keys.begin() + (count - 1), keys.end(), std::greater<>());
  for (int64_t i = 0; i < count; ++i) mask[key_index(keys[i])] = true;
}

Tensor hard_negative_mask_cpu(const Tensor& loss, const Tensor& labels, double ratio,
                              int64_t min_negatives) {
  const HardNegativeArguments args(loss, labels, ratio, min_negatives);
  Tensor mask = empty_tensor(loss, {args.images, args.anchors}, ScalarType::Bool);
  torch::stable::parallel_for(0, args.images, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n)
      hard_negatives_of_image(data<float>(args.loss) + n * args.anchors,
                              data<int32_t>(args.labels) + n * args.anchors, args.anchors, ratio,
                              min_negatives, data<bool>(mask) + n * args.anchors);
  });
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) {
  m.impl("hard_negative_mask", TORCH_BOX(&hard_negative_mask_cpu));
}

}  // namespace retinanet
