// Conversions between float32 and float16 or bfloat16, without branches and calls, so that loops
// over them vectorise on every instruction set. The values equal those of c10's conversions, except
// that a NaN may lose its payload.
#pragma once

#include <bit>

#include "simd.h"

namespace retinanet {

VECTORISED float widen(float x) { return x; }
VECTORISED double widen(double x) { return x; }

VECTORISED float widen(c10::BFloat16 x) { return std::bit_cast<float>(uint32_t(x.x) << 16); }

VECTORISED float widen(c10::Half x) {
  const uint32_t magnitude = uint32_t(x.x & 0x7fffu) << 13, sign = uint32_t(x.x & 0x8000u) << 16;
  // A finite half is scaled by 2^112, where 112 is the difference of the exponent biases. The
  // product is exact, and it is a normal float even if the half is subnormal.
  const float finite = std::bit_cast<float>(magnitude) * 0x1p112f;
  // Infinity and NaN keep their exponent of all ones.
  const uint32_t bits =
      magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : std::bit_cast<uint32_t>(finite);
  return std::bit_cast<float>(bits | sign);
}

// x rounded to T, to nearest even.
template <typename T>
VECTORISED T narrowed(float x);

template <>
VECTORISED float narrowed<float>(float x) {
  return x;
}

template <typename T>
VECTORISED T narrowed(double x) {
  return x;
}

template <>
VECTORISED c10::BFloat16 narrowed<c10::BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return c10::BFloat16(uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded),
                       c10::BFloat16::from_bits());
}

template <>
VECTORISED c10::Half narrowed<c10::Half>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  // A normal half: subtract 112 from the exponent and round off 13 fraction bits.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // A subnormal half: just above 0.5, floats are 2^-24 apart, as subnormal halves are. Adding 0.5f
  // therefore rounds to exactly the half's 10 fraction bits.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and above round to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;   // NaN
  return c10::Half(uint16_t(result | ((bits >> 16) & 0x8000u)), c10::Half::from_bits());
}

}  // namespace retinanet
