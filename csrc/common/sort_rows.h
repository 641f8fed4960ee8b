// Sorting by PyTorch's own `sort`, on any device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "tensor.h"

namespace retinanet {

// The rows [N, C] of a tensor of integers, each in descending order.
inline Tensor sorted_descending(const Tensor& rows) {
  // aten::sort is not among the functions of the stable ABI, so call it through the dispatcher. The
  // stack holds its arguments (self, dim, descending) and receives its results (values, indices).
  std::array<StableIValue, 3> stack{torch::stable::detail::from(rows),
                                    torch::stable::detail::from(int64_t(1)),
                                    torch::stable::detail::from(true)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "", stack.data(), TORCH_ABI_VERSION));
  // Take ownership of the indices, so that they are released.
  torch::stable::detail::to<Tensor>(stack[1]);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace retinanet
