// Sorting by PyTorch's own `sort`, on any device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "tensor.h"

namespace retinanet {

// The rows [N, C] of a tensor, each in descending order, and the columns in which the values were.
// Equal values keep their order if `stable`.
inline std::tuple<Tensor, Tensor> sort_descending(const Tensor& rows, bool stable) {
  // aten::sort is not among the functions of the stable ABI, so call it through the dispatcher. The
  // stack holds its arguments (self, stable, dim, descending) and receives (values, indices).
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(rows), torch::stable::detail::from(std::optional<bool>(stable)),
      torch::stable::detail::from(int64_t(1)), torch::stable::detail::from(true)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  // Take ownership of both results, so that they are released.
  Tensor values = torch::stable::detail::to<Tensor>(stack[0]);
  return {values, torch::stable::detail::to<Tensor>(stack[1])};
}

// The rows [N, C] of a tensor of integers, each in descending order.
inline Tensor sorted_descending(const Tensor& rows) {
  return std::get<0>(sort_descending(rows, false));
}

}  // namespace retinanet
