// Elementary functions of the losses and scores.
//
// The float versions of the loss functions have no branches and no calls, so that loops over them
// vectorise on the CPU. The double versions call the standard library.
//
// The polynomials are minimax fits (Remez, weighted for the relative error of the result). On the
// CPU they are evaluated in pairs of terms, because their latency dominates the cost. The largest
// relative errors are 8.5e-8 for exp_minus, and for log1p_unit 1.4e-7 with fused multiply-add and
// 1.8e-7 without. A GPU hides latency behind other warps, so CUDA kernels that are bound by the
// number of instructions take the functions named `_by_terms`. They evaluate the same polynomials
// term by term (Horner's scheme). tests/ops/test_elementary.py checks all bounds.
//
// Each multiply-add of a GPU has room for one constant in the instruction. Where a function has a
// multiply-add with two, one of them is an argument with a default value. A caller that holds it in
// a register saves an instruction.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "simd.h"

namespace retinanet {

// exp(r) = 1 + r + k2 r^2 + ... + k6 r^6 for |r| <= ln(2) / 2.
struct ExpSeries {
  static constexpr float k2 = 4.99999934579e-1f, k3 = 1.66665207079e-1f, k4 = 4.16683866747e-2f,
                         k5 = 8.3687097943e-3f, k6 = 1.38146353904e-3f;
};
// log(1 + e) = e + k1 e^2 + ... + k9 e^10 for e in 0..1.
struct Log1pSeries {
  static constexpr float k1 = -4.99999327634e-1f, k2 = 3.33305113219e-1f, k3 = -2.49585874842e-1f,
                         k4 = 1.96954010454e-1f, k5 = -1.53553982158e-1f, k6 = 1.06805594262e-1f,
                         k7 = -5.7664488718e-2f, k8 = 2.02046113988e-2f, k9 = -3.3184789723e-3f;
};
// 2 / (1 + e) = 2 + k1 e + k2 e^2 for e in 0..1, roughly.
struct ReciprocalSeries {
  static constexpr float k1 = -1.69481574f, k2 = 0.70844472f;
};
// ln(2) in two parts. Products of the first with integers up to 2^14 are exact.
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kLog2E = 1.44269504f;

// exp(-a) for a >= 0, down to the smallest subnormal number. NaN gives NaN.
template <typename M>
VECTORISED float exp_minus(float a) {
  a = 120.f < a ? 120.f : a;  // exp(-120) rounds to 0; this order of operands keeps NaN
  // Split -a = n ln(2) + r with |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer n, held in
  // the low bits. Adding 127 + 64 more turns those bits into the exponent of 2^(n + 64), which is a
  // normal number.
  constexpr float kRound = 12582912.f + 191.f;
  const float shifted = M::multiply_add(a, -kLog2E, kRound), n = shifted - kRound;
  float r = M::multiply_add(n, -kLn2High, -a);
  r = M::multiply_add(n, -kLn2Low, r);
  // exp(r) by the polynomial.
  const float r2 = r * r;
  using K = ExpSeries;
  const float high =
      M::multiply_add(M::multiply_add(r, K::k6, K::k5), r2, M::multiply_add(r, K::k4, K::k3));
  const float q = M::multiply_add(high, r, K::k2);
  const float p = M::multiply_add(q, r2, r) + 1.f;
  // Scale by 2^n in two factors, because 2^n itself may be subnormal.
  return p * std::bit_cast<float>(std::bit_cast<uint32_t>(shifted) << 23) * 0x1p-64f;
}

template <typename M>
VECTORISED double exp_minus(double a) {
  return std::exp(-a);
}

// log(1 + e) for e in 0..1.
template <typename M>
VECTORISED float log1p_unit(float e) {
  const float e2 = e * e, e4 = e2 * e2;
  using K = Log1pSeries;
  const float c78 = M::multiply_add(e, K::k8, K::k7), c56 = M::multiply_add(e, K::k6, K::k5);
  const float c34 = M::multiply_add(e, K::k4, K::k3), c12 = M::multiply_add(e, K::k2, K::k1);
  const float high = M::multiply_add(M::multiply_add(e2, K::k9, c78), e2, c56);
  const float q = M::multiply_add(high, e4, M::multiply_add(c34, e2, c12));
  return M::multiply_add(q, e2, e);
}

template <typename M>
VECTORISED double log1p_unit(double e) {
  return std::log1p(e);
}

// The largest argument of exp_minus_by_terms. Its result is still a normal number.
constexpr float kMaxByTerms = 87.f;

// exp(-a) for a in 0..kMaxByTerms, with a relative error of 7.6e-8 at most.
HOST_DEVICE float exp_minus_by_terms(float a, float minus_log2_e = -kLog2E,
                                     float k6 = ExpSeries::k6) {
  // As in exp_minus, the low bits of `shifted` hold n. They are added to the exponent of exp(r),
  // which the argument's range keeps normal.
  constexpr float kRound = 12582912.f;
  const float shifted = std::fma(a, minus_log2_e, kRound), n = shifted - kRound;
  float r = std::fma(n, -kLn2High, -a);
  r = std::fma(n, -kLn2Low, r);
  using K = ExpSeries;
  float p = std::fma(k6, r, K::k5);
  p = std::fma(p, r, K::k4);
  p = std::fma(p, r, K::k3);
  p = std::fma(p, r, K::k2);
  p = std::fma(p, r, 1.f);
  p = std::fma(p, r, 1.f);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) +
                              (std::bit_cast<uint32_t>(shifted) << 23));
}

// kFactor * log(1 + e) / e for e in 0..1, with a relative error of 1.2e-7 at most. kFactor is a
// power of two.
template <int kFactor>
HOST_DEVICE float log1p_ratio_by_terms(float e, float factor_k9 = kFactor * Log1pSeries::k9) {
  using K = Log1pSeries;
  float q = std::fma(factor_k9, e, kFactor * K::k8);
  q = std::fma(q, e, kFactor * K::k7);
  q = std::fma(q, e, kFactor * K::k6);
  q = std::fma(q, e, kFactor * K::k5);
  q = std::fma(q, e, kFactor * K::k4);
  q = std::fma(q, e, kFactor * K::k3);
  q = std::fma(q, e, kFactor * K::k2);
  q = std::fma(q, e, kFactor * K::k1);
  return std::fma(q, e, float(kFactor));
}

// 2 / (1 + e) for e in 0..1, with a relative error of 2.6e-6 at most, and exactly 2 where 1 + e
// rounds to 1. It has no division, which a GPU computes in more instructions and less exactly.
HOST_DEVICE float twice_reciprocal_by_terms(float e, float k2 = ReciprocalSeries::k2,
                                            float half = 0.5f) {
  // A minimax parabola through 2 at e = 0, with a relative error h of 1.4e-2 at most. As
  // 1 / (1 - h) = 1 + h + h^2 + ..., two terms leave an error of h^3.
  const float r = std::fma(std::fma(k2, e, ReciprocalSeries::k1), e, 2.f);
  const float h = std::fma(std::fma(half, e, 0.5f), -r, 1.f);
  return std::fma(r, std::fma(h, h, h), r);
}

// -x if `flip`, else x. This also holds for NaN, whose sign bit flips.
VECTORISED float flipped(float x, bool flip) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) ^ (flip ? 0x80000000u : 0u));
}
VECTORISED double flipped(double x, bool flip) { return flip ? -x : x; }

// x if `keep`, else 0, even if x is NaN or infinite.
VECTORISED float kept(float x, bool keep) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & (keep ? 0xffffffffu : 0u));
}
VECTORISED double kept(double x, bool keep) { return keep ? x : 0.0; }

// The sigmoid, computed in double, so that only the final rounding to float32 loses accuracy. A
// greater logit therefore never has a lower score, and a logit that reaches `logit_limit`
// (detect.h) has a score above the threshold.
HOST_DEVICE float sigmoid(float x) { return float(1 / (1 + std::exp(-double(x)))); }

}  // namespace retinanet
