// Ranking of candidates by their scores, on the CPU.
//
// Scores of 32 bits and fewer become ranking keys, which a radix sort orders by their upper halves
// in three passes over the candidates; it is stable, so that equal scores stay in index order.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "common/ranking_key.h"

namespace retinanet {

// Sorts ascending by the upper halves; elements of equal upper halves keep their order.
inline void radix_sort_upper(std::vector<uint64_t>& keys) {
  constexpr int kPasses = 3, kBits = 11, kBins = 1 << kBits;
  const auto digit = [](uint64_t key, int pass) {
    return size_t(key >> (32 + pass * kBits)) & (kBins - 1);
  };
  std::array<std::array<size_t, kBins>, kPasses> place{};
  for (const uint64_t key : keys)
    for (int pass = 0; pass < kPasses; ++pass) ++place[pass][digit(key, pass)];
  std::vector<uint64_t> sorted(keys.size());
  for (int pass = 0; pass < kPasses; ++pass) {
    std::exclusive_scan(place[pass].begin(), place[pass].end(), place[pass].begin(), size_t(0));
    for (const uint64_t key : keys) sorted[place[pass][digit(key, pass)]++] = key;
    keys.swap(sorted);
  }
}

// Writes the indices of the candidates by (score descending, index ascending), those beyond `count`
// and those of score NaN or -inf last; returns how many are not among these.
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
    // With all bits flipped but the sign's, a better key is a smaller number, its lower half the
    // index.
    std::vector<uint64_t> keys(candidates);
    for (int64_t i = 0; i < candidates; ++i)
      keys[i] = uint64_t(ranking_key(score(i), uint32_t(i))) ^ (~uint64_t(0) >> 1);
    // The radix sort's passes over its bins take as long as sorting some hundred keys.
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
