// Tensors of the stable ABI: data pointers, shapes and the memory layout that kernels expect.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// Under nvcc, complex.h includes all of Thrust for conversions that this project does not use,
// which would be a third of a small file's compile time. Include it as plain C++ before any other
// header can include it as CUDA, but after the half types, which must be included as CUDA.
#pragma push_macro("__CUDACC__")
#undef __CUDACC__
#include <torch/headeronly/util/complex.h>
#pragma pop_macro("__CUDACC__")

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "types.h"

namespace retinanet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensor's shape as text, for messages.
inline std::string shape(const Tensor& t) {
  std::ostringstream s;
  s << '[';
  for (int64_t d = 0; d < t.dim(); ++d) s << (d ? ", " : "") << t.size(d);
  s << ']';
  return s.str();
}

// The tensor's data as T, which the caller has checked to be its dtype.
template <typename T>
inline T* data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
inline const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// The data of an optional tensor, or null if there is no tensor.
template <typename T>
inline const T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

// An uninitialised tensor on the device of `like`. Its sizes are the first `dims` of `sizes`. This
// takes a third of the time of `new_empty`, which is a boxed call through the dispatcher.
inline Tensor empty(const Tensor& like, const int64_t* sizes, int dims, ScalarType dtype) {
  int64_t strides[8], elements = 1;
  for (int d = dims - 1; d >= 0; --d) {
    strides[d] = elements;
    elements *= sizes[d] > 1 ? sizes[d] : 1;
  }
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device, like.get_device_index(), &handle));
  return Tensor(handle);
}

// The tensor itself if its data is aligned to 16 bytes, else a copy with the same layout. New
// tensors are aligned, so kernels may use 128-bit accesses on the result.
inline Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

// The tensor, or a copy of it, that is contiguous and aligned.
inline Tensor contiguous_aligned(const Tensor& t) {
  // Ask first, because `contiguous` is a call through the dispatcher.
  return aligned(t.is_contiguous() ? t : torch::stable::contiguous(t));
}

inline std::optional<Tensor> contiguous_aligned(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(contiguous_aligned(*t)) : std::nullopt;
}

}  // namespace retinanet
