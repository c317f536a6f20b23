// The first tokens of an order by tier and score. An image of 64 bits orders a token: forced, tier, score.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../cpu/args.h"

namespace selection {

// Larger numbers have larger images; -0 has that of 0, and NaN is above infinity.
inline uint32_t image_of(float x) {
  x += 0.f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return ~uint32_t(0);
  return bits >> 31 ? ~bits : bits | uint32_t(1) << 31;
}

inline void select_entry(const SelectArgs& a, int64_t entry, std::vector<uint64_t>& images,
                         std::vector<uint64_t>& ordered) {
  const int64_t n = a.num_tokens, wanted = a.num_selected[entry];
  uint8_t* out = a.out + entry * n;
  if (wanted <= 0 || wanted >= n) {
    std::memset(out, wanted > 0, size_t(n));
    return;
  }
  const float* score = a.score + entry * n;
  const uint8_t* tier = a.tier ? a.tier + entry * a.tier_stride : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t is_forced = i < a.num_first || i >= n - a.num_last;
    images[size_t(i)] = is_forced << 40 | uint64_t(tier ? tier[i] : 0) << 32 | image_of(score[i]);
  }
  ordered = images;
  std::nth_element(ordered.begin(), ordered.begin() + (wanted - 1), ordered.end(), std::greater<>());
  const uint64_t threshold = ordered[size_t(wanted - 1)];
  // What stands before the threshold's place is at least as large.
  int64_t num_ties = wanted;
  for (int64_t i = 0; i < wanted; ++i) num_ties -= ordered[size_t(i)] > threshold;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t image = images[size_t(i)];
    out[i] = image > threshold || (image == threshold && num_ties-- > 0);
  }
}

inline void select(const SelectArgs& a) {
#pragma omp parallel num_threads(a.num_threads)
  {
    std::vector<uint64_t> images(size_t(a.num_tokens)), ordered(size_t(a.num_tokens));
#pragma omp for schedule(dynamic, 1)
    for (int64_t entry = 0; entry < a.num_entries; ++entry) select_entry(a, entry, images, ordered);
  }
}

}  // namespace selection
