// A 64-bit key that ranks by (float32 value descending, index ascending).
//
// A larger key ranks higher, and keys of different indices are never equal:
//
//     bits 63 .. 32    the value's bits, mapped so that they order like signed integers
//     bits 31 .. 0     ~index
#pragma once

#include <cstring>
#include <limits>

#include "types.h"

namespace retinanet {

// The key of an empty slot, which is below the key of every number.
constexpr int64_t kNoKey = std::numeric_limits<int64_t>::min();

HOST_DEVICE int32_t float_bits(float v) {
#ifdef __CUDA_ARCH__
  return __float_as_int(v);
#else
  int32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
#endif
}

HOST_DEVICE float bits_float(int32_t bits) {
#ifdef __CUDA_ARCH__
  return __int_as_float(bits);
#else
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
#endif
}

// Maps the bits of a float to an integer of the same order. The mapping is its own inverse.
HOST_DEVICE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

HOST_DEVICE int64_t ranking_key(float value, uint32_t index) {
  const int32_t rank = ordered(float_bits(value + 0.0f));  // + 0 turns -0 into 0, so they tie
  return int64_t((uint64_t(uint32_t(rank)) << 32) | uint32_t(~index));
}

HOST_DEVICE float key_value(int64_t key) { return bits_float(ordered(int32_t(key >> 32))); }
HOST_DEVICE uint32_t key_index(int64_t key) { return ~uint32_t(key); }

}  // namespace retinanet
