// One loop, compiled for several instruction sets.
//
// `vectorised(f)` calls f in a function compiled for the best instruction set that this machine has
// and ATEN_CPU_CAPABILITY (PyTorch's own switch) allows; whatever is inlined into it, VECTORISED
// functions and lambdas with ALWAYS_INLINE, is compiled for that set, too.  Such code is written on
// scalars, free of branches, so that the compiler turns its loops into vectors.
#pragma once

#include <cstdlib>
#include <string>

#include "types.h"

#define ALWAYS_INLINE __attribute__((always_inline))
#define VECTORISED HOST_DEVICE ALWAYS_INLINE

namespace retinanet {

#if defined(__x86_64__)
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#ifdef __clang__
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#else
#define TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
#endif

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa detect_isa() {
#if defined(__x86_64__)
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string wish = value ? value : "";
  // PyTorch, too, passes over values that it does not know.
  const bool any = wish != "default" && wish != "avx2" && wish != "avx512";
  const auto allowed = [&](const char* name) { return any || wish == name; };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && allowed("avx512")) return Isa::kAvx512;
  if (avx2 && (allowed("avx2") || allowed("avx512"))) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

inline Isa isa() {
  static const Isa found = detect_isa();
  return found;
}

// What vectorised code needs to know of its instruction set.
template <bool kFusedMultiplyAdd>
struct Arithmetic {
  static constexpr bool kFma = kFusedMultiplyAdd;

  // a b + c, in one rounding where the machine has an instruction for it.
  template <typename T>
  static VECTORISED T multiply_add(T a, T b, T c) {
    if constexpr (kFma) return std::fma(a, b, c);
    return a * b + c;
  }

  // 1 - a b, for a product near 1 that its own type cannot hold; 0 for want of an exact product.
  static VECTORISED float one_minus_product(float a, float b) {
    if constexpr (kFma) return std::fma(-a, b, 1.f);
    return float(1 - double(a) * double(b));
  }
  static VECTORISED double one_minus_product(double a, double b) {
    return kFma ? std::fma(-a, b, 1.) : 0.;
  }
};

#if defined(__FP_FAST_FMAF) || defined(__CUDACC__)
using BaselineArithmetic = Arithmetic<true>;
#else
using BaselineArithmetic = Arithmetic<false>;
#endif

#if defined(__x86_64__)
template <typename F>
TARGET_AVX2 void run_avx2(F f) {
  f(Arithmetic<true>{});
}

template <typename F>
TARGET_AVX512 void run_avx512(F f) {
  f(Arithmetic<true>{});
}
#endif

// Calls f(arithmetic), a lambda with ALWAYS_INLINE.  It should capture by value what has the type
// that its loop writes: a store might change a captured reference's value, and the loop stays
// scalar.
template <typename F>
inline void vectorised(F f) {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return run_avx512(f);
  if (isa() == Isa::kAvx2) return run_avx2(f);
#endif
  f(BaselineArithmetic{});
}

}  // namespace retinanet
