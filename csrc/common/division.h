// Division by a number that is known before a kernel starts, as a multiplication and a shift.
//
// Granlund and Montgomery, "Division by Invariant Integers using Multiplication", PLDI 1994,
// theorem 4.2. A GPU has no instruction for the division of integers.
#pragma once

#include "types.h"

namespace retinanet {

// A divisor d of 1 to 2^31 - 1.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t d) {
    // With 2^(s-1) < d <= 2^s, the multiplier is 2^(31+s) / d, rounded up.
    while ((int64_t(1) << shift_) < d) ++shift_;
    multiplier_ = uint32_t(((uint64_t(1) << (31 + shift_)) + d - 1) / d);
  }

  // n / d, rounded down, of an n below 2^31.
  HOST_DEVICE uint32_t quotient(uint32_t n) const {
    // 2n * multiplier / 2^32 = n * multiplier / 2^31
    return uint32_t(uint64_t(2 * n) * multiplier_ >> 32) >> shift_;
  }

 private:
  uint32_t multiplier_ = uint32_t(1) << 31, shift_ = 0;
};

}  // namespace retinanet
