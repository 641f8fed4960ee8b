// A step of a tile: four packs of each thread, and which of their logits are not below a bound.
//
// A thread's logits of a step are numbered as they are in its packs, and a mask has one bit for
// each. Half-precision logits are compared two at a time, as integers in the two halves of a word.
// Their masks have the lower halves of the 16 words in bits 0 to 15, the upper ones in bits 16 to
// 31.
#pragma once

#include <cstring>

#include "common/cuda.h"

namespace retinanet {

constexpr int kTilePacks = 4;  // packs of one thread in a step

template <typename T>
struct SelectTile {
  static constexpr int kThreads = 256;
  static constexpr int kSize = Packed<T>::kSize;
  static constexpr int kStep = kThreads * kTilePacks * kSize;  // logits of a step
  static constexpr bool kPairs = sizeof(T) == 2;               // logits are compared in pairs
};

template <typename T>
using StepPacks = Packed<T>[kTilePacks];

// The place in the tile of logit `i` of this thread, in a step that starts at place `step`.
template <typename T>
__device__ __forceinline__ int place_of(int step, int i) {
  constexpr int kSize = Packed<T>::kSize;
  return step + (i / kSize * SelectTile<T>::kThreads + int(threadIdx.x)) * kSize + i % kSize;
}

// The place of the lowest logit of a mask.
template <typename T>
__device__ __forceinline__ int first_place(int step, unsigned mask) {
  const int bit = __ffs(int(mask)) - 1;
  return place_of<T>(step, SelectTile<T>::kPairs ? bit % 16 * 2 + bit / 16 : bit);
}

// The bits of a mask that stand for pack `p`.
template <typename T>
__device__ __forceinline__ unsigned bits_of_pack(int p) {
  constexpr int kSize = Packed<T>::kSize;
  if constexpr (SelectTile<T>::kPairs) return 0x000f000fu << (4 * p);
  return ((1u << kSize) - 1) << (p * kSize);
}

// Tests which logits are not below a bound.
template <typename T>
struct StepTest {
  float least;

  __device__ explicit StepTest(float least) : least(least) {}

  // The mask of those that are not.
  __device__ __forceinline__ unsigned operator()(const StepPacks<T>& packs) const {
    constexpr int kSize = Packed<T>::kSize;
    bool any = false;
#pragma unroll
    for (int p = 0; p < kTilePacks; ++p) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) any |= float(packs[p].v[j]) >= least;
    }
    unsigned mask = 0;
    if (!any) return mask;
#pragma unroll
    for (int p = 0; p < kTilePacks; ++p) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (float(packs[p].v[j]) >= least) mask |= 1u << (p * kSize + j);
      }
    }
    return mask;
  }
};

// The same for half precision. A number is a sign and a magnitude of 15 bits, and magnitudes order
// as integers. Subtractions in both halves of a word do not meet, because bit 15 of the minuends is
// set and that of the subtrahends is not.
template <typename T>
struct PairTest {
  static constexpr unsigned kSigns = 0x80008000u;
  // The magnitude of infinity, above which a number is NaN.
  static constexpr unsigned kInfinity = std::is_same_v<T, c10::Half> ? 0x7c00u : 0x7f80u;

  unsigned magnitude;  // of the bound, in both halves
  bool positive;       // the bound is above 0

  __device__ explicit PairTest(float least) {
    // Round the bound up to T. All numbers of T that are not below it are not below its rounded
    // value either.
    const T rounded = T(least);
    int bits = rounded.x;
    if (float(rounded) < least) {
      if ((bits & 0x7fff) == 0) {
        bits = 1;
      } else {
        bits += bits & 0x8000 ? -1 : 1;
      }
    }
    magnitude = unsigned(bits & 0x7fff) * 0x00010001u;
    positive = (bits & 0x8000) == 0 && (bits & 0x7fff) != 0;
  }

  // Sets the bit 15 of each half of the word whose number is not below the bound, and of a NaN.
  // Other bits may be set as well.
  template <bool kPositive>
  __device__ __forceinline__ unsigned not_below(unsigned word) const {
    // Not below a positive bound: the sign is 0 and the magnitude is not less.
    if constexpr (kPositive) return ((word | kSigns) - magnitude) & ~word;
    // Not below another bound: the sign is 0 or the magnitude is not greater.
    return ((magnitude | kSigns) - (word & ~kSigns)) | ~word;
  }
  // The OR of the same over the words of a pack.
  template <bool kPositive>
  __device__ __forceinline__ unsigned any_not_below(const unsigned (&words)[4]) const {
    unsigned any = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) any |= not_below<kPositive>(words[w]);
    return any;
  }

  // Sets the bit 15 of each half of the word whose number is not below the bound, and no other bit.
  __device__ __forceinline__ unsigned pair(unsigned word) const {
    const unsigned is_nan = (word & ~kSigns) + (0x7fffu - kInfinity) * 0x00010001u;
    return (positive ? not_below<true>(word) : not_below<false>(word)) & ~is_nan & kSigns;
  }

  __device__ __forceinline__ unsigned operator()(const StepPacks<T>& packs) const {
    unsigned word[kTilePacks][4], of_pack[kTilePacks], of_step = 0, mask = 0;
    std::memcpy(word, packs, sizeof(word));
    // Most steps end after this test of three instructions per word. NaN may count as passing.
#pragma unroll
    for (int p = 0; p < kTilePacks; ++p) {
      of_pack[p] = positive ? any_not_below<true>(word[p]) : any_not_below<false>(word[p]);
      of_step |= of_pack[p];
    }
    if ((of_step & kSigns) == 0) return mask;
#pragma unroll
    for (int p = 0; p < kTilePacks; ++p) {
      if ((of_pack[p] & kSigns) == 0) continue;
#pragma unroll
      for (int w = 0; w < 4; ++w) mask |= pair(word[p][w]) >> (15 - 4 * p - w);
    }
    return mask;
  }
};

template <>
struct StepTest<c10::Half> : PairTest<c10::Half> {
  using PairTest::PairTest;
};
template <>
struct StepTest<c10::BFloat16> : PairTest<c10::BFloat16> {
  using PairTest::PairTest;
};

}  // namespace retinanet
