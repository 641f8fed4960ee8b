// Checks of an op's arguments, and the switch from a dtype to the C++ type, which checks the dtype.
//
// The Python wrappers check what users pass and raise ValueError or TypeError. The checks here keep
// a direct call of torch.ops.retinanet_ops memory-safe, and raise RuntimeError. CudaScope
// (launch.h) checks devices. Every message of a check starts with the name of the op.
#pragma once

#include <sstream>
#include <stdexcept>
#include <vector>

#include "tensor.h"

namespace retinanet {

// Throws (RuntimeError in Python) unless `ok`. The message is the concatenation of its parts.
template <typename... Args>
inline void check(bool ok, const Args&... message) {
  if (ok) return;
  std::ostringstream s;
  (s << ... << message);
  throw std::runtime_error(s.str());
}

inline void check_shape(const Tensor& t, const std::vector<int64_t>& expected, const char* op,
                        const char* name) {
  bool ok = t.dim() == int64_t(expected.size());
  for (size_t d = 0; ok && d < expected.size(); ++d) ok = t.size(d) == expected[d];
  if (ok) return;
  std::ostringstream s;
  for (size_t d = 0; d < expected.size(); ++d) s << (d ? ", " : "") << expected[d];
  check(false, op, ": ", name, " must have shape [", s.str(), "], got ", shape(t));
}

inline void check_dtype(const Tensor& t, ScalarType expected, const char* op, const char* name) {
  check(t.scalar_type() == expected, op, ": ", name, " must be ",
        torch::headeronly::toString(expected), ", got ",
        torch::headeronly::toString(t.scalar_type()));
}

// Checks the batch size of a CUDA kernel whose blockIdx.y is the image: gridDim.y ends at 65535.
inline void check_batch(const char* op, int64_t images) {
  check(images <= 65535, op, ": expected at most 65535 images, got ", images);
}

// Calls f with a zero of the C++ type of `dtype`, which must be a floating-point dtype.
template <typename F>
inline auto dispatch_floating(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Half:
      return f(c10::Half{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{});
    case ScalarType::Double:
      return f(double{});
    default:
      check(dtype == ScalarType::Float, op,
            ": expected float16, bfloat16, float32 or float64, got ",
            torch::headeronly::toString(dtype));
      return f(float{});
  }
}

// The same without half precision, for ops whose Python wrapper widens it before the call.
template <typename F>
inline auto dispatch_compute(ScalarType dtype, const char* op, F&& f) {
  if (dtype == ScalarType::Double) return f(double{});
  check(dtype == ScalarType::Float, op, ": expected float32 or float64, got ",
        torch::headeronly::toString(dtype));
  return f(float{});
}

}  // namespace retinanet
