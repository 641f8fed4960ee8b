// The vectorised loops of the focal loss on the CPU.
#include "focal_loss_cpu_strips.h"

#include "common/half.h"

namespace retinanet {
namespace {

// Calls f with the constant that stands for the way gamma is computed.
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

constexpr int kLanes = 16;  // so few values are summed in double

// exp(-|x|), in a loop of its own: two short ones overlap more of their iterations than a long one.
template <typename M, typename C>
VECTORISED void exponentials(const C* __restrict__ x, int size, C* __restrict__ out) {
  for (int i = 0; i < size; ++i) out[i] = exp_minus<M>(std::abs(x[i]));
}

// Losses times weight, or gradients times weight and scale.
template <bool kBackward, typename C>
void focal_values(const Focal<C>& focal, const FocalBlock<C>& block, const C* __restrict__ x,
                  C scale, int size, C* __restrict__ out) {
  const C* __restrict__ weight = block.weight;
  const int32_t* __restrict__ code = block.code;
  const int32_t hit = block.hit;
  dispatch_power(focal, [&](auto power) {
    vectorised([&](auto arithmetic) ALWAYS_INLINE {
      using M = decltype(arithmetic);
      constexpr Power kPower = decltype(power)::value;
      const Focal<C> f = focal;
      exponentials<M>(x, size, out);
      if (block.soft) {
        const C* __restrict__ target = block.target;
        for (int i = 0; i < size; ++i) {
          const C value =
              kBackward
                  ? f.template soft_grad<kPower, M>(x[i], out[i], target[i], scale * weight[i])
                  : weight[i] * f.template soft_loss<kPower, M>(x[i], out[i], target[i]);
          out[i] = kept(value, code[i] != kDead);
        }
        return;
      }
      for (int i = 0; i < size; ++i) {
        const bool positive = code[i] == hit;
        const C value = kBackward
                            ? f.template grad<kPower, M>(x[i], out[i], positive, scale * weight[i])
                            : weight[i] * f.template loss<kPower, M>(x[i], out[i], positive);
        out[i] = kept(value, code[i] != kDead);
      }
    });
  });
}

}  // namespace

template <typename C>
void focal_losses(const Focal<C>& focal, const FocalBlock<C>& block, const C* x, int size, C* out) {
  focal_values<false>(focal, block, x, C(1), size, out);
}

template <typename C>
void focal_gradients(const Focal<C>& focal, const FocalBlock<C>& block, const C* x, C scale,
                     int size, C* out) {
  focal_values<true>(focal, block, x, scale, size, out);
}

template <typename C>
double block_sum(C* values, int size) {
  double total = 0;
  vectorised([&](auto) ALWAYS_INLINE {
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

template void focal_losses(const Focal<float>&, const FocalBlock<float>&, const float*, int,
                           float*);
template void focal_losses(const Focal<double>&, const FocalBlock<double>&, const double*, int,
                           double*);
template void focal_gradients(const Focal<float>&, const FocalBlock<float>&, const float*, float,
                              int, float*);
template void focal_gradients(const Focal<double>&, const FocalBlock<double>&, const double*,
                              double, int, double*);
template double block_sum(float*, int);
template double block_sum(double*, int);
template const float* widened(const c10::Half*, int, float*);
template const float* widened(const c10::BFloat16*, int, float*);
template const float* widened(const float*, int, float*);
template const double* widened(const double*, int, double*);
template void narrow(const float*, int, c10::Half*);
template void narrow(const float*, int, c10::BFloat16*);

}  // namespace retinanet
