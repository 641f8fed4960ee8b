// The types and constants that host and device code of every op share.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace retinanet {

// Codes in an anchor's label and in its match. Other values are a class or a ground-truth index.
constexpr int kBackground = -1;
constexpr int kIgnored = -2;

// The most feature-pyramid levels that a kernel's arguments have room for.
constexpr int kMaxLevels = 16;

// The type in which boxes and losses of element type T are computed: double for double, else float.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace retinanet
