// The vectorised loops of the focal loss on the CPU.
#include "focal_loss_blocks.h"

#include "half.h"

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

constexpr int kLanes = 16;
constexpr int kRows = 8;  // rows of lanes that are summed in the values' own dtype

}  // namespace

template <typename C>
void focal_losses(const Focal<C>& focal, const FocalBlock<C>& block, const C* __restrict__ x,
                  int size, C* __restrict__ out) {
  const C* __restrict__ weight = block.weight;
  const int32_t* __restrict__ code = block.code;
  const int32_t hit = block.hit;
  dispatch_power(focal, [&](auto power) {
    vectorised([&](auto arithmetic) ALWAYS_INLINE {
      using M = decltype(arithmetic);
      constexpr Power kPower = decltype(power)::value;
      const Focal<C> f = focal;
      if (block.soft) {
        const C* __restrict__ target = block.target;
        for (int i = 0; i < size; ++i) {
          const C loss = weight[i] * f.template soft_loss<kPower, M>(x[i], target[i]);
          out[i] = kept(loss, code[i] != kDead);
        }
        return;
      }
      for (int i = 0; i < size; ++i) {
        const C loss = weight[i] * f.template loss<kPower, M>(x[i], code[i] == hit);
        out[i] = kept(loss, code[i] != kDead);
      }
    });
  });
}

template <typename C>
void focal_gradients(const Focal<C>& focal, const FocalBlock<C>& block, const C* __restrict__ x,
                     C scale, int size, C* __restrict__ out) {
  const C* __restrict__ weight = block.weight;
  const int32_t* __restrict__ code = block.code;
  const int32_t hit = block.hit;
  dispatch_power(focal, [&](auto power) {
    vectorised([&](auto arithmetic) ALWAYS_INLINE {
      using M = decltype(arithmetic);
      constexpr Power kPower = decltype(power)::value;
      const Focal<C> f = focal;
      if (block.soft) {
        const C* __restrict__ target = block.target;
        for (int i = 0; i < size; ++i) {
          const C grad = f.template soft_grad<kPower, M>(x[i], target[i], scale * weight[i]);
          out[i] = kept(grad, code[i] != kDead);
        }
        return;
      }
      for (int i = 0; i < size; ++i) {
        const C grad = f.template grad<kPower, M>(x[i], code[i] == hit, scale * weight[i]);
        out[i] = kept(grad, code[i] != kDead);
      }
    });
  });
}

template <typename C>
double block_sum(const C* __restrict__ values, int size) {
  double total = 0;
  vectorised([&](auto) ALWAYS_INLINE {
    alignas(64) double lanes[kLanes] = {0};
    int i = 0;
    for (; i + kLanes <= size;) {
      alignas(64) C part[kLanes] = {0};
      const int rows = std::min(kRows, (size - i) / kLanes);
      for (int r = 0; r < rows; ++r, i += kLanes)
        for (int j = 0; j < kLanes; ++j) part[j] += values[i + j];
      for (int j = 0; j < kLanes; ++j) lanes[j] += part[j];
    }
    for (int j = 0; j < kLanes; ++j) total += lanes[j];
    for (; i < size; ++i) total += values[i];
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
template double block_sum(const float*, int);
template double block_sum(const double*, int);
template const float* widened(const c10::Half*, int, float*);
template const float* widened(const c10::BFloat16*, int, float*);
template const float* widened(const float*, int, float*);
template const double* widened(const double*, int, double*);
template void narrow(const float*, int, c10::Half*);
template void narrow(const float*, int, c10::BFloat16*);

}  // namespace retinanet
