#include "selection.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace vppo {
namespace {

// An integer that orders as the score does: -0 equals 0, every NaN is the same and above all numbers. None is 0.
std::uint32_t key_of(float score) {
  std::uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu, middle = 0x80000000u;
  if (magnitude > 0x7F800000u) return 0xFFFFFFFFu;
  return bits & middle ? middle - magnitude : middle + magnitude;
}

}  // namespace

template <typename Out>
void topk_mask(const Scores& scores, double keep_ratio, float threshold, Out* keep, std::int64_t begin,
               std::int64_t end) {
  const std::uint32_t bar = std::isnan(threshold) ? 0 : key_of(threshold);
  for (std::int64_t row = begin; row < end; ++row) {
    std::int64_t first = row * scores.columns, last = first + scores.columns;
    if (scores.offsets != nullptr) {
      first = std::clamp<std::int64_t>(scores.offsets[row], 0, scores.total);
      last = std::clamp<std::int64_t>(scores.offsets[row + 1], first, scores.total);
    }
    // Finds the lowest kept key, eight bits at a time, from histograms of the keys whose higher bits are those of it.
    std::uint32_t lowest = 0, known = 0;  // its bits as far as they are known, and ones where they are
    std::int64_t wanted = 0;              // how many to keep of the keys with these bits
    for (int shift = 24; shift >= 0; shift -= 8) {
      std::int64_t counts[256] = {};
      for (std::int64_t i = first; i < last; ++i) {
        if (!scores.valid[i]) continue;
        const std::uint32_t key = key_of(scores.data[i]);
        if ((key & known) == lowest) ++counts[(key >> shift) & 255];
      }
      if (known == 0) {
        std::int64_t valid = 0;
        for (const std::int64_t count : counts) valid += count;
        // rounded as in `keep_counts` of backends/torch_tokens.py
        wanted = static_cast<std::int64_t>(std::ceil(static_cast<double>(valid) * keep_ratio * (1.0 - 0x1p-40)));
      }
      std::uint32_t digit = 255;
      for (; digit > 0 && wanted > counts[digit]; --digit) wanted -= counts[digit];
      lowest |= digit << shift;
      known |= 255u << shift;
    }
    for (std::int64_t i = first; i < last; ++i) {
      const std::uint32_t key = scores.valid[i] ? key_of(scores.data[i]) : 0;  // no score has this key
      const bool equal = key == lowest && wanted > 0;  // of equal scores the earlier ones are kept
      wanted -= equal;
      keep[i] = static_cast<Out>(key > bar && (key > lowest || equal));
    }
  }
}

template void topk_mask(const Scores&, double, float, float*, std::int64_t, std::int64_t);
template void topk_mask(const Scores&, double, float, bool*, std::int64_t, std::int64_t);

}  // namespace vppo
