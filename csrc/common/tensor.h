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

// The tensor's shape, for messages. It becomes text only when a message is printed, because the
// parts of a message are evaluated in every call of an op.
struct Shape {
  const Tensor& tensor;
};
inline Shape shape(const Tensor& t) { return {t}; }
inline std::ostream& operator<<(std::ostream& s, const Shape& shape) {
  s << '[';
  for (int64_t d = 0; d < shape.tensor.dim(); ++d) s << (d ? ", " : "") << shape.tensor.size(d);
  return s << ']';
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

// The functions of torch::stable that create tensors call the dispatcher, which takes about 1 us,
// as long as a kernel on a small input. The next functions call the C shim instead.

// An uninitialised tensor on the device of `like`; its dtype is that of `like` unless one is given.
inline Tensor empty_strided(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            const int64_t* strides,
                            std::optional<ScalarType> dtype = std::nullopt) {
  int32_t device_type, device_index, shim_dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  if (dtype) {
    shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &shim_dtype));
  }
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(),
                                                         strides, shim_dtype, device_type,
                                                         device_index, &result));
  return Tensor(result);
}

// An uninitialised contiguous tensor of at most 8 dimensions, otherwise like `like`.
inline Tensor empty_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                           std::optional<ScalarType> dtype = std::nullopt) {
  int64_t strides[8], stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return empty_strided(like, sizes, strides, dtype);
}

// The same; the sizes are the first `dims` of `sizes`.
inline Tensor empty(const Tensor& like, const int64_t* sizes, int dims, ScalarType dtype) {
  return empty_tensor(like, {sizes, size_t(dims)}, dtype);
}

// An uninitialised tensor with the shape, strides and dtype of `t`, which has no gaps.
inline Tensor empty_tensor_like(const Tensor& t) {
  return empty_strided(t, t.sizes(), t.strides().data());
}

}  // namespace retinanet
