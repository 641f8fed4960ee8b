// One loop, compiled for several instruction sets.
//
// `vectorised(f)` calls f inside a function that is compiled for the best instruction set that the
// machine has and ATEN_CPU_CAPABILITY (PyTorch's own switch) allows. Everything inlined into that
// function is compiled for the same set: VECTORISED functions and lambdas marked ALWAYS_INLINE.
// Such code works on scalars. A loop without branches is vectorised by the compiler.
#pragma once

#include <cmath>
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
  const std::string setting = value ? value : "";
  // PyTorch ignores unknown settings as well.
  const bool any = setting != "default" && setting != "avx2" && setting != "avx512";
  const auto allowed = [&](const char* name) { return any || setting == name; };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && allowed("avx512")) return Isa::kAvx512;
  if (avx2 && (allowed("avx2") || allowed("avx512"))) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

// The instruction set of this process, detected at the first call.
inline Isa isa() {
  static const Isa best = detect_isa();
  return best;
}

// Arithmetic that depends on whether the instruction set has a fused multiply-add (FMA).
template <bool kFusedMultiplyAdd>
struct Arithmetic {
  static constexpr bool kFma = kFusedMultiplyAdd;

  // a*b + c, rounded once with FMA and twice without.
  template <typename T>
  static VECTORISED T multiply_add(T a, T b, T c) {
    if constexpr (kFma) return std::fma(a, b, c);
    return a * b + c;
  }

  // 1 - a*b without rounding the product a*b first: by FMA, or in double for float. The result
  // serves as a correction, so double without FMA returns 0: no correction.
  static VECTORISED float one_minus_product(float a, float b) {
    if constexpr (kFma) return std::fma(-a, b, 1.f);
    return float(1 - double(a) * double(b));
  }
  static VECTORISED double one_minus_product(double a, double b) {
    return kFma ? std::fma(-a, b, 1.) : 0.;
  }
};

// The arithmetic of code that is compiled without a TARGET attribute, device code included.
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

// Calls f(arithmetic) for the instruction set of this process. f is a lambda marked ALWAYS_INLINE.
// It should capture by value every variable of the type that its loop writes. The compiler must
// assume that a store changes such a variable if it is captured by reference, and then leaves the
// loop scalar.
template <typename F>
inline void vectorised(F f) {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return run_avx512(f);
  if (isa() == Isa::kAvx2) return run_avx2(f);
#endif
  f(BaselineArithmetic{});
}

}  // namespace retinanet
