// Shared by every op and by both backends: the stable-ABI includes, `check`, and the dtype switch.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// Under nvcc this header brings all of Thrust, for conversions that nothing here uses, and with it
// a third of the time that a small file takes to compile.
#pragma push_macro("__CUDACC__")
#undef __CUDACC__
#include <torch/headeronly/util/complex.h>
#pragma pop_macro("__CUDACC__")

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace retinanet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Codes of an anchor's label and of its match.
constexpr int kBackground = -1;
constexpr int kIgnored = -2;

// Levels of a feature pyramid that kernels have room for.
constexpr int kMaxLevels = 16;

// The dtype in which boxes and losses of dtype T are computed.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline std::string shape(const Tensor& t) {
  std::ostringstream s;
  s << '[';
  for (int64_t d = 0; d < t.dim(); ++d) s << (d ? ", " : "") << t.size(d);
  s << ']';
  return s.str();
}

// Throws (RuntimeError in Python) with exactly the message given.  The Python wrappers check what
// users pass and raise ValueError or TypeError; these checks keep a direct call of an op
// memory-safe.
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

// Calls f with a value of the C++ type of `dtype`.
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

// As dispatch_floating, for ops whose wrapper has already widened half precision.
template <typename F>
inline auto dispatch_compute(ScalarType dtype, const char* op, F&& f) {
  if (dtype == ScalarType::Double) return f(double{});
  check(dtype == ScalarType::Float, op, ": expected float32 or float64, got ",
        torch::headeronly::toString(dtype));
  return f(float{});
}

template <typename T>
inline T* data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
inline const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
inline const T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

// Contiguous, and starting at a multiple of 16 bytes, so that kernels may use 128-bit accesses.
inline Tensor packed(const Tensor& t) {
  const Tensor c = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 == 0 ? c : torch::stable::clone(c);
}

inline std::optional<Tensor> packed(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(packed(*t)) : std::nullopt;
}

}  // namespace retinanet
