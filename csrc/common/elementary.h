// Elementary functions of the losses and scores.
//
// The float versions of the loss functions have no branches and no calls, so that loops over them
// vectorise on the CPU. The double versions call the standard library.
//
// The polynomials are minimax fits (Remez, weighted for the relative error of the result). They are
// evaluated in pairs instead of term by term, because their latency dominates the cost. The largest
// relative errors are 8.5e-8 for exp_minus, and for log1p_unit 1.4e-7 with fused multiply-add and
// 1.8e-7 without. tests/ops/test_elementary.py checks these bounds.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "simd.h"

namespace retinanet {

// exp(-a) for a >= 0, down to the smallest subnormal number. NaN gives NaN.
template <typename M>
VECTORISED float exp_minus(float a) {
  a = 120.f < a ? 120.f : a;  // exp(-120) rounds to 0; this order of operands keeps NaN
  // Split -a = n ln(2) + r with |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer n, held in
  // the low bits. Adding 127 + 64 more turns those bits into the exponent of 2^(n + 64), which is a
  // normal number.
  constexpr float kRound = 12582912.f + 191.f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float shifted = M::multiply_add(a, -1.44269504f, kRound), n = shifted - kRound;
  float r = M::multiply_add(n, -kLn2High, -a);
  r = M::multiply_add(n, -kLn2Low, r);
  // exp(r) by the polynomial.
  const float r2 = r * r;
  const float high = M::multiply_add(M::multiply_add(r, 1.38146353904e-3f, 8.3687097943e-3f), r2,
                                     M::multiply_add(r, 4.16683866747e-2f, 1.66665207079e-1f));
  const float q = M::multiply_add(high, r, 4.99999934579e-1f);
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
  const float c78 = M::multiply_add(e, 2.02046113988e-2f, -5.7664488718e-2f);
  const float c56 = M::multiply_add(e, 1.06805594262e-1f, -1.53553982158e-1f);
  const float c34 = M::multiply_add(e, 1.96954010454e-1f, -2.49585874842e-1f);
  const float c12 = M::multiply_add(e, 3.33305113219e-1f, -4.99999327634e-1f);
  const float high = M::multiply_add(M::multiply_add(e2, -3.3184789723e-3f, c78), e2, c56);
  const float q = M::multiply_add(high, e4, M::multiply_add(c34, e2, c12));
  return M::multiply_add(q, e2, e);
}

template <typename M>
VECTORISED double log1p_unit(double e) {
  return std::log1p(e);
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
