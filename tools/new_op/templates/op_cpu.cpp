// null_op on the CPU: threads take chunks of consecutive elements, and a vectorised loop takes each
// chunk. Elements are independent, so the result does not depend on the number of threads.
#include <algorithm>

#include "common/half.h"
#include "null_op.h"

namespace retinanet {
namespace {

// Smallest number of elements for which another thread saves time.
constexpr int64_t kChunk = 1 << 15;

Tensor null_op_cpu(const Tensor& x, double scale) {
  check_null_op(x);
  const Tensor in = contiguous_aligned(x);
  Tensor out = torch::stable::empty_like(in);
  dispatch_floating(in.scalar_type(), "null_op", [&](auto zero) {
    using T = decltype(zero);
    using C = Compute<T>;
    const T* from = data<T>(in);
    T* to = data<T>(out);
    torch::stable::parallel_for(0, in.numel(), kChunk, [&](int64_t begin, int64_t end) {
      vectorised([from, to, begin, end, factor = C(scale)](auto) ALWAYS_INLINE {
        for (int64_t i = begin; i < end; ++i) to[i] = narrowed<T>(null_op(widen(from[i]), factor));
      });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CPU, m) { m.impl("null_op", TORCH_BOX(&null_op_cpu)); }

}  // namespace retinanet
