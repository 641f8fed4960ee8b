// Elementary functions for the losses, in float free of branches and calls, so that loops over them
// become vectors on the CPU; in double those of the standard library.
//
// The polynomials are minimax fits (Remez, weighted for the relative error of the result).  Largest
// relative errors over all arguments, which tests/test_elementary.py measures: exp_minus 8.1e-8,
// log1p_unit 1.1e-7; without fused multiply-add a little more.
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
  // -a = n ln(2) + r, |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer, held in the low
  // bits.
  constexpr float kRound = 12582912.f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float shifted = M::multiply_add(a, -1.44269504f, kRound), n = shifted - kRound;
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound);
  float r = M::multiply_add(n, -kLn2High, -a);
  r = M::multiply_add(n, -kLn2Low, r);
  float q = 1.38146353904e-3f;
  q = M::multiply_add(q, r, 8.3687097943e-3f);
  q = M::multiply_add(q, r, 4.16683866747e-2f);
  q = M::multiply_add(q, r, 1.66665207079e-1f);
  q = M::multiply_add(q, r, 4.99999934579e-1f);
  const float p = M::multiply_add(q * r, r, r) + 1.f;
  // Two factors, since 2^n itself may be subnormal.
  const uint32_t half = uint32_t(int32_t(exponent) >> 1);
  return p * std::bit_cast<float>((half + 127u) << 23) *
         std::bit_cast<float>((exponent - half + 127u) << 23);
}

template <typename M>
VECTORISED double exp_minus(double a) {
  return std::exp(-a);
}

// log(1 + e) for e in 0..1.
template <typename M>
VECTORISED float log1p_unit(float e) {
  float q = -3.3184789723e-3f;
  q = M::multiply_add(q, e, 2.02046113988e-2f);
  q = M::multiply_add(q, e, -5.7664488718e-2f);
  q = M::multiply_add(q, e, 1.06805594262e-1f);
  q = M::multiply_add(q, e, -1.53553982158e-1f);
  q = M::multiply_add(q, e, 1.96954010454e-1f);
  q = M::multiply_add(q, e, -2.49585874842e-1f);
  q = M::multiply_add(q, e, 3.33305113219e-1f);
  q = M::multiply_add(q, e, -4.99999327634e-1f);
  return M::multiply_add(q * e, e, e);
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

}  // namespace retinanet
