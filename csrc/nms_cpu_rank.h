// Ranking of candidates by their scores on the CPU.
//
// Scores of 32 bits or fewer become ranking keys. A radix sort orders the keys by their upper
// halves in three passes over the candidates. The sort is stable, so equal scores stay in index
// order.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "common/ranking_key.h"

namespace retinanet {

// Sorts keys by their upper halves, ascending. Keys with equal upper halves keep their order.
inline void radix_sort_upper(std::vector<uint64_t>& keys) {
  constexpr int kPasses = 3, kBits = 11, kBins = 1 << kBits;
  const auto digit = [](uint64_t key, int pass) {
    return size_t(key >> (32 + pass * kBits)) & (kBins - 1);
  };
  // Count the digits of all passes in one read of the keys.
  std::array<std::array<size_t, kBins>, kPasses> place{};
  for (const uint64_t key : keys)
    for (int pass = 0; pass < kPasses; ++pass) ++place[pass][digit(key, pass)];
  std::vector<uint64_t> sorted(keys.size());
  for (int pass = 0; pass < kPasses; ++pass) {
    // Turn counts into the place of each bin's first key, and move the keys there in order.
    std::exclusive_scan(place[pass].begin(), place[pass].end(), place[pass].begin(), size_t(0));
    for (const uint64_t key : keys) sorted[place[pass][digit(key, pass)]++] = key;
    keys.swap(sorted);
  }
}

// Writes the indices of the candidates by (score descending, index ascending) and returns the
// number of valid ones. Candidates from `count` on, and those whose score is NaN or -inf, are not
// valid and come last.
template <typename T>
int64_t rank_scores(const T* scores, int64_t candidates, int64_t count, int64_t* order) {
  constexpr Compute<T> kNone = -std::numeric_limits<Compute<T>>::infinity();
  const auto score = [&](int64_t i) {
    const Compute<T> s(scores[i]);
    return i < count && s > kNone ? s : kNone;
  };
  int64_t valid = 0;
  for (int64_t i = 0; i < count; ++i) valid += Compute<T>(scores[i]) > kNone;
  if constexpr (std::is_same_v<T, double>) {
    std::iota(order, order + candidates, 0);
    std::stable_sort(order, order + candidates,
                     [&](int64_t a, int64_t b) { return score(a) > score(b); });
  } else {
    // Flip all bits but the sign. As unsigned numbers, the keys then ascend from the best to the
    // worst, and the lower half of a key is the index itself.
    std::vector<uint64_t> keys(candidates);
    for (int64_t i = 0; i < candidates; ++i)
      keys[i] = uint64_t(ranking_key(score(i), uint32_t(i))) ^ (~uint64_t(0) >> 1);
    // The radix sort's passes over its bins alone cost as much as sorting a few hundred keys.
    if (candidates < 512) {
      std::sort(keys.begin(), keys.end());
    } else {
      radix_sort_upper(keys);
    }
    for (int64_t i = 0; i < candidates; ++i) order[i] = uint32_t(keys[i]);
  }
  return valid;
}

}  // namespace retinanet
