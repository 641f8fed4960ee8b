// Elementary functions for the losses, in float free of branches and calls, so that loops over them
// become vectors on the CPU; in double those of the standard library.
//
// The polynomials are minimax fits (Remez, weighted for the relative error of the result),
// evaluated in pairs rather than one term after the other: their latency is what costs.  Largest
// relative errors, which tests/test_elementary.py checks: exp_minus 8.5e-8, log1p_unit 1.4e-7,
// without fused multiply-add 1.8e-7.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "simd.h"

namespace retinanet {

// exp(-a) for a >= 0, down to the least subnormal number; NaN for NaN.
template <typename M>
VECTORISED float exp_minus(float a) {
  a = 120.f < a ? 120.f : a;  // exp(-120) rounds to 0; NaN stays
  // -a = n ln(2) + r, |r| <= ln(2) / 2.  Adding 1.5 * 2^23 rounds to an integer, held in the low
  // bits; 127 + 64 more makes these the exponent of 2^(n + 64), a normal number.
  constexpr float kRound = 12582912.f + 191.f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float shifted = M::multiply_add(a, -1.44269504f, kRound), n = shifted - kRound;
  float r = M::multiply_add(n, -kLn2High, -a);
  r = M::multiply_add(n, -kLn2Low, r);
  const float r2 = r * r;
  const float high = M::multiply_add(M::multiply_add(r, 1.38146353904e-3f, 8.3687097943e-3f), r2,
                                     M::multiply_add(r, 4.16683866747e-2f, 1.66665207079e-1f));
  const float q = M::multiply_add(high, r, 4.99999934579e-1f);
  const float p = M::multiply_add(q, r2, r) + 1.f;
  // Two factors, since 2^n itself may be subnormal.
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

// -x if `flip`, else x, also for NaN.
VECTORISED float flipped(float x, bool flip) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) ^ (flip ? 0x80000000u : 0u));
}
VECTORISED double flipped(double x, bool flip) { return flip ? -x : x; }

// x if `keep`, else 0, also for NaN and infinity.
VECTORISED float kept(float x, bool keep) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & (keep ? 0xffffffffu : 0u));
}
VECTORISED double kept(double x, bool keep) { return keep ? x : 0.0; }

// Computed in double, so that only the rounding to float32 is inexact. A greater logit therefore
// never has a lower score, and a logit that passes a score threshold has a score above it (see
// logit_limit in detect.h).
HOST_DEVICE float sigmoid(float x) { return float(1 / (1 + std::exp(-double(x)))); }

}  // namespace retinanet
