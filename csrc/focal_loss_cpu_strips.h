// The focal loss of one strip of logits, for both focal ops on the CPU.
//
// A strip is up to 1,024 logits that are consecutive in memory. Its targets are expanded beside it,
// in the L1 cache, so that one vectorised loop serves every layout and every kind of target.
#pragma once

#include <algorithm>

#include "focal_loss.h"

namespace retinanet {

constexpr int kStrip = 1024;         // logits of a strip at most
constexpr int64_t kChunk = 1 << 14;  // logits of a chunk, which one thread takes at a time

// The targets of a strip's logits.
template <typename C>
struct FocalStrip {
  // A hard target is 1 where code == hit, else 0. With the code kMasked, the result is 0.
  alignas(64) int32_t code[kStrip];
  alignas(64) C target[kStrip];  // soft targets
  alignas(64) C weight[kStrip];  // factors of the results
  int32_t hit = 0;
  bool soft = false;  // whether `target` holds the targets instead of `code`
};

// out[i] = loss of x[i], times its weight.
template <typename C>
void focal_losses(const Focal<C>& focal, const FocalStrip<C>& strip, const C* x, int size, C* out);
// out[i] = gradient of x[i], times its weight and `scale`.
template <typename C>
void focal_gradients(const Focal<C>& focal, const FocalStrip<C>& strip, const C* x, C scale,
                     int size, C* out);

// The sum by repeated halving, in an order that depends only on `size`. Overwrites the values.
template <typename C>
double pairwise_sum_in_place(C* values, int size);

// The values of x in the compute type: x itself if it has that type, else `buffer`.
template <typename T>
const Compute<T>* widened(const T* x, int size, Compute<T>* buffer);
// Rounds the values to T, to nearest even.
template <typename T>
void narrow(const Compute<T>* values, int size, T* out);

// Calls f(values) to write `size` results in the compute type, and rounds them to T into `out`.
template <typename T, typename F>
void write(T* out, int size, F&& f) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    f(out);
  } else {
    alignas(64) Compute<T> buffer[kStrip];
    f(buffer);
    narrow(buffer, size, out);
  }
}

// Prefetches memory that is about to be read or written.
template <typename V>
void prefetch(const V* values, int size) {
  constexpr int kLine = 64;  // bytes
  for (int i = 0; i < size; i += kLine / int(sizeof(V))) __builtin_prefetch(values + i);
}

template <typename V>
void fill(V* values, int size, V value) {
  vectorised([=](auto) ALWAYS_INLINE {
    for (int i = 0; i < size; ++i) values[i] = value;
  });
}

// Multiplies the weight of a logit by a factor. A factor of 0 makes its result 0 whatever the
// logit.
template <typename C>
ALWAYS_INLINE inline void weigh_positive(FocalStrip<C>& strip, int64_t i, C factor) {
  strip.weight[i] *= factor;
  strip.code[i] = factor == C(0) ? kMasked : strip.code[i];
}

// Sets the targets of `size` logits from `element` on, where rows of K logits follow each other.
// Most rows are plain background, so all are set to background first and the others one by one.
template <typename C, typename Label>
void set_rows(FocalStrip<C>& strip, const ClassTargets<C, Label>& targets, int64_t element,
              int size) {
  constexpr int32_t kHit = 0, kNoHit = 1;
  strip.hit = kHit;
  strip.soft = false;
  fill(strip.code, size, kNoHit);
  fill(strip.weight, size, C(1));
  const int64_t num_classes = targets.num_classes;
  int64_t row = element / num_classes;
  // `begin` is where the row starts in the strip. It is negative if the strip starts inside the
  // row.
  for (int64_t begin = row * num_classes - element; begin < size; begin += num_classes, ++row) {
    const RowTarget<C> target = targets.row(row);
    if (target.positive == kBackground && target.weight == C(1)) continue;
    // The part of the row inside the strip: `count` logits from `first` on.
    const int first = int(std::max<int64_t>(begin, 0));
    const int count = int(std::min<int64_t>(begin + num_classes, size)) - first;
    const int64_t hit = begin + target.positive;
    fill(strip.weight + first, count, target.weight);
    if (target.masked()) {
      fill(strip.code + first, count, kMasked);
    } else if (target.positive >= 0 && hit >= first && hit < first + count) {
      strip.code[hit] = kHit;
      if (targets.pos_weight) weigh_positive(strip, hit, targets.pos_weight[target.positive]);
    }
  }
}

// Turns the strip's hard targets of 1 and 0 into soft targets `positive` and `negative`.
template <typename C>
void soften(FocalStrip<C>& strip, C positive, C negative, int size) {
  vectorised([&](auto) ALWAYS_INLINE {
    for (int i = 0; i < size; ++i)
      strip.target[i] = strip.code[i] == strip.hit ? positive : negative;
  });
  strip.soft = true;
}

}  // namespace retinanet
