// The focal loss of one logit on CUDA, for both focal losses.
//
// Nearly all logits of a detector are negatives of ordinary size, and nearly all calls have hard
// targets and gamma 2. For these, in float32 arithmetic, the formula as focal_loss.h writes it
// takes more than twice the instructions that a GPU can issue while it reads the logits. This file
// writes the same formula in 37 instructions for the loss and 42 for its derivative. With what
// surrounds them in a loop over packs, a logit takes 42 to 45 and 47 to 50
// (docs/generated/kernels.md).
//
// - exp and log1p take the same polynomials as on the CPU, term by term (common/elementary.h).
// - 1 / (1 + e) is a polynomial and one step of an iteration. Its error, and the rounding of
//   s = sigmoid(z), are computed exactly and corrected where s is squared.
// - With e = exp(-|z|) and Q = log(1 + e) / e, the derivative needs no quotient:
//       dFL/dz = alpha_t s^3 (1 + 2 y),  y = a (a Q + max(z, 0)),  a = exp(-max(z, 0))
//   because (1 - s) / s = exp(-z), and softplus(z) = max(z, 0) + e Q.
//
// Losses and gradients are at most 5.7 units in the last place off, while the formula of
// focal_loss.h may be off by 7.4. In no range of logits are they less accurate than
// docs/generated/accuracy.md says (tests/ops/test_focal_accuracy.py). Every step is a fused
// multiply-add, a single operation or exact, so a GPU and the emulator get the same bits. Logits
// beyond +-87, NaN, soft targets, other gammas and float64 take the formula of focal_loss.h.
#pragma once

#include "common/cuda.h"
#include "focal_loss.h"

namespace retinanet {

// The constants that the elementary functions take as arguments, for the loss or, with kGrad, for
// the gradient.
template <bool kGrad>
struct GammaTwoConstants {
  float minus_log2_e = -kLog2E, exp_k6 = ExpSeries::k6;
  float log1p_k9 = (kGrad ? 2 : 1) * Log1pSeries::k9;
  float reciprocal_k2 = ReciprocalSeries::k2, half = 0.5f;
};

// Parts of the loss of z that loss and gradient share. |z| <= kMaxByTerms.
struct GammaTwo {
  float e;           // exp(-|z|)
  float s;           // 2 sigmoid(z), rounded
  float correction;  // s^2 + correction is (2 sigmoid(z))^2, and s^3 + 1.5 s correction its cube

  template <bool kGrad>
  HOST_DEVICE GammaTwo(float z, const GammaTwoConstants<kGrad>& k)
      : e(exp_minus_by_terms(std::abs(z), k.minus_log2_e, k.exp_k6)) {
    const float r = twice_reciprocal_by_terms(e, k.reciprocal_k2, k.half), b = z < 0.f ? e : 1.f;
    s = b * r;
    // Exactly, sigmoid(z) = b / (1 + e). `missing` = 2b - s (1 + e) is a difference of near
    // numbers, computed without a rounding that counts. To first order, missing * r / 2 completes
    // s.
    const float missing = std::fma(-s, e, std::fma(2.f, b, -s));
    correction = s * r * missing;
  }
};

// 4 s^2 softplus(z), which is the loss times 4 / alpha_t. |z| <= kMaxByTerms.
HOST_DEVICE float gamma_two_loss(float z, const GammaTwoConstants<false>& k = {}) {
  const GammaTwo p(z, k);
  const float softplus = std::fma(log1p_ratio_by_terms<1>(p.e, k.log1p_k9), p.e, z < 0.f ? 0.f : z);
  return std::fma(p.s, p.s, p.correction) * softplus;
}

// weight * 8 s^3 (1 + 2 y), which is weight * 8 / alpha_t times the derivative. The weight is
// multiplied first, so that no intermediate product underflows if the result does not.
// |z| <= kMaxByTerms.
HOST_DEVICE float gamma_two_grad(float z, float weight, const GammaTwoConstants<true>& k = {}) {
  const GammaTwo p(z, k);
  const float a = z < 0.f ? 1.f : p.e;
  const float twice_y = a * std::fma(a, log1p_ratio_by_terms<2>(p.e, k.log1p_k9), z + std::abs(z));
  const float weighted = weight * p.s;
  return std::fma(p.s, p.s, 1.5f * p.correction) * std::fma(weighted, twice_y, weighted);
}

// Whether x is an ordinary logit, which the functions above take. NaN is not.
template <typename C>
HOST_DEVICE bool is_ordinary(C x) {
  return std::abs(x) <= C(kMaxByTerms);
}

// Losses and gradients of single logits. A hard target is `hit` = 1 or 0. With kSoft, it is
// replaced by a target that depends on `hit`.
template <typename C, Power kPower_, bool kSoft>
struct FocalFormula {
  static constexpr Power kPower = kPower_;
  // Whether ordinary logits take gamma_two_loss and gamma_two_grad.
  static constexpr bool kFast = std::is_same_v<C, float> && kPower == Power::kTwo && !kSoft;
  // Powers of two by which these functions exceed the loss and the gradient of alpha_t = 1.
  static constexpr C kLossUnit = C(0.25), kGradUnit = C(0.125);

  Focal<C> focal;
  C soft_positive = C(1), soft_negative = C(0);  // targets with kSoft

  __device__ __forceinline__ C loss(C x, bool hit) const {
    if constexpr (kFast) {
      if (is_ordinary(x))
        return (hit ? focal.positive : focal.negative) * kLossUnit *
               gamma_two_loss(flipped(x, hit));
    }
    const C e = exp_minus<DeviceArithmetic>(std::abs(x));
    if constexpr (kSoft)
      return focal.template soft_loss<kPower, DeviceArithmetic>(
          x, e, hit ? soft_positive : soft_negative);
    return focal.template loss<kPower, DeviceArithmetic>(x, e, hit);
  }

  // The derivative of `loss` times `scale`.
  __device__ __forceinline__ C grad(C x, bool hit, C scale) const {
    if constexpr (kFast) {
      if (is_ordinary(x))
        return gamma_two_grad(flipped(x, hit),
                              scale * ((hit ? -focal.positive : focal.negative) * kGradUnit));
    }
    const C e = exp_minus<DeviceArithmetic>(std::abs(x));
    if constexpr (kSoft)
      return focal.template soft_grad<kPower, DeviceArithmetic>(
          x, e, hit ? soft_positive : soft_negative, scale);
    return focal.template grad<kPower, DeviceArithmetic>(x, e, hit, scale);
  }
};

}  // namespace retinanet
