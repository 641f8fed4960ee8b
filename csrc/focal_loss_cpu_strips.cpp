// The vectorised loops over one strip of logits (see focal_loss_cpu_strips.h).
#include "focal_loss_cpu_strips.h"

#include "common/half.h"

namespace retinanet {
namespace {

// Calls f with the focal loss's Power as a compile-time constant.
template <typename C, typename F>
void dispatch_power(const Focal<C>& focal, F&& f) {
  switch (focal.power()) {
    case Power::kTwo:
      return f(std::integral_constant<Power, Power::kTwo>{});
    case Power::kHalves:
      return f(std::integral_constant<Power, Power::kHalves>{});
    default:
      return f(std::integral_constant<Power, Power::kAny>{});
  }
}

constexpr int kLanes = 16;  // as few values as this are added one by one, in double

// out[i] = exp(-|x[i]|). This is a separate loop because the CPU overlaps more iterations of two
// short loops than of one long loop.
template <typename M, typename C>
VECTORISED void exponentials(const C* __restrict__ x, int size, C* __restrict__ out) {
  for (int i = 0; i < size; ++i) out[i] = exp_minus<M>(std::abs(x[i]));
}

// Losses times weight or, with kBackward, gradients times weight and scale.
template <bool kBackward, typename C>
void focal_values(const Focal<C>& focal, const FocalStrip<C>& strip, const C* __restrict__ x,
                  C scale, int size, C* __restrict__ out) {
  const C* __restrict__ weight = strip.weight;
  const int32_t* __restrict__ code = strip.code;
  const int32_t hit = strip.hit;
  dispatch_power(focal, [&](auto power) {
    vectorised([&](auto arithmetic) ALWAYS_INLINE {
      using M = decltype(arithmetic);
      constexpr Power kPower = decltype(power)::value;
      const Focal<C> f = focal;  // a copy, so that stores to `out` cannot change it
      exponentials<M>(x, size, out);
      if (strip.soft) {
        const C* __restrict__ target = strip.target;
        for (int i = 0; i < size; ++i) {
          const C value =
              kBackward
                  ? f.template soft_grad<kPower, M>(x[i], out[i], target[i], scale * weight[i])
                  : weight[i] * f.template soft_loss<kPower, M>(x[i], out[i], target[i]);
          out[i] = kept(value, code[i] != kMasked);
        }
        return;
      }
      for (int i = 0; i < size; ++i) {
        const bool positive = code[i] == hit;
        const C value = kBackward
                            ? f.template grad<kPower, M>(x[i], out[i], positive, scale * weight[i])
                            : weight[i] * f.template loss<kPower, M>(x[i], out[i], positive);
        out[i] = kept(value, code[i] != kMasked);
      }
    });
  });
}

}  // namespace

template <typename C>
void focal_losses(const Focal<C>& focal, const FocalStrip<C>& strip, const C* x, int size, C* out) {
  focal_values<false>(focal, strip, x, C(1), size, out);
}

template <typename C>
void focal_gradients(const Focal<C>& focal, const FocalStrip<C>& strip, const C* x, C scale,
                     int size, C* out) {
  focal_values<true>(focal, strip, x, scale, size, out);
}

template <typename C>
double pairwise_sum_in_place(C* values, int size) {
  double total = 0;
  vectorised([&](auto) ALWAYS_INLINE {
    // Add the upper half to the lower half until few values remain.
    while (size > kLanes) {
      const int half = (size + 1) / 2;
      C* __restrict__ to = values;
      const C* __restrict__ from = values + half;
      for (int i = 0; i < size - half; ++i) to[i] += from[i];
      size = half;
    }
    for (int i = 0; i < size; ++i) total += values[i];
  });
  return total;
}

template <typename T>
const Compute<T>* widened(const T* __restrict__ x, int size, Compute<T>* __restrict__ buffer) {
  if constexpr (std::is_same_v<T, Compute<T>>) return x;
  vectorised([&](auto) ALWAYS_INLINE {
    for (int i = 0; i < size; ++i) buffer[i] = widen(x[i]);
  });
  return buffer;
}

template <typename T>
void narrow(const Compute<T>* __restrict__ values, int size, T* __restrict__ out) {
  vectorised([&](auto) ALWAYS_INLINE {
    for (int i = 0; i < size; ++i) out[i] = narrowed<T>(values[i]);
  });
}

template void focal_losses(const Focal<float>&, const FocalStrip<float>&, const float*, int,
                           float*);
template void focal_losses(const Focal<double>&, const FocalStrip<double>&, const double*, int,
                           double*);
template void focal_gradients(const Focal<float>&, const FocalStrip<float>&, const float*, float,
                              int, float*);
template void focal_gradients(const Focal<double>&, const FocalStrip<double>&, const double*,
                              double, int, double*);
template double pairwise_sum_in_place(float*, int);
template double pairwise_sum_in_place(double*, int);
template const float* widened(const c10::Half*, int, float*);
template const float* widened(const c10::BFloat16*, int, float*);
template const float* widened(const float*, int, float*);
template const double* widened(const double*, int, double*);
template void narrow(const float*, int, c10::Half*);
template void narrow(const float*, int, c10::BFloat16*);

}  // namespace retinanet
