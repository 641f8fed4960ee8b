// The focal loss of blocks of logits on the CPU: what both focal ops have in common there.
//
// A block is a short run of logits in memory order. Its targets lie expanded beside it in the L1
// cache, so that one vectorised loop serves every layout and every kind of target.
#pragma once

#include <algorithm>

#include "focal_loss.h"

namespace retinanet {

constexpr int kBlock = 1024;         // elements of a block at most
constexpr int64_t kChunk = 1 << 14;  // elements that one thread takes at a time, at least

// The targets of a block's elements.
template <typename C>
struct FocalBlock {
  alignas(64) int32_t code[kBlock];  // hard targets are positive where it equals `hit`
  alignas(64) C target[kBlock];      // soft targets
  alignas(64) C weight[kBlock];      // factors of the result
  int32_t hit = 0;
  bool soft = false;
};

// Losses of x[0 .. size) times weight, into out.
template <typename C>
void focal_losses(const Focal<C>& focal, const FocalBlock<C>& block, const C* x, int size, C* out);
// Gradients of x[0 .. size) times weight and scale, into out.
template <typename C>
void focal_gradients(const Focal<C>& focal, const FocalBlock<C>& block, const C* x, C scale,
                     int size, C* out);

// Sum, by halving, in an order that depends on `size` alone; overwrites the values.
template <typename C>
double block_sum(C* values, int size);

// The values of x in the compute dtype: x itself if it has that dtype, else `buffer`.
template <typename T>
const Compute<T>* widened(const T* x, int size, Compute<T>* buffer);
// Rounds to T, ties to even.
template <typename T>
void narrow(const Compute<T>* values, int size, T* out);

// Lets f(out) write values of the compute dtype, and rounds them to T.
template <typename T, typename F>
void write(T* out, int size, F&& f) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    f(out);
  } else {
    alignas(64) Compute<T> buffer[kBlock];
    f(buffer);
    narrow(buffer, size, out);
  }
}

// Asks for memory that is about to be read or written.
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

// The targets of `size` elements from `element` on, in consecutive rows of logits.  Most rows are
// plain background: only what differs from it is written one by one.
template <typename C, typename Label>
void set_rows(FocalBlock<C>& block, const ClassTargets<C, Label>& targets, int64_t element,
              int size) {
  constexpr int32_t kHit = 0, kNoHit = 1;
  block.hit = kHit;
  block.soft = false;
  fill(block.code, size, kNoHit);
  fill(block.weight, size, C(1));
  const int64_t num_classes = targets.num_classes;
  int64_t row = element / num_classes;
  for (int64_t begin = row * num_classes - element; begin < size; begin += num_classes, ++row) {
    const RowTarget<C> target = targets.row(row);
    if (target.positive < 0 && !target.dead && target.weight == C(1)) continue;
    const int first = int(std::max<int64_t>(begin, 0));
    const int count = int(std::min<int64_t>(begin + num_classes, size)) - first;
    const int64_t hit = begin + target.positive;
    fill(block.weight + first, count, target.weight);
    if (target.dead) {
      fill(block.code + first, count, kDead);
    } else if (target.positive >= 0 && hit >= first && hit < first + count) {
      block.code[hit] = kHit;
    }
  }
}

// The block's hard targets become soft ones of these values.
template <typename C>
void soften(FocalBlock<C>& block, C positive, C negative, int size) {
  vectorised([&](auto) ALWAYS_INLINE {
    for (int i = 0; i < size; ++i)
      block.target[i] = block.code[i] == block.hit ? positive : negative;
  });
  block.soft = true;
}

}  // namespace retinanet
