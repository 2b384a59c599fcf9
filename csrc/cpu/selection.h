// Token-level gradient filtering; `vppo_kernels/selection.py` says what is kept.
#pragma once

#include <cstdint>

namespace vppo {

// Scores of trajectories: rows of `columns` each, or row r from `offsets[r]` to `offsets[r + 1]` where that is not null.
struct Scores {
  const float* data;
  const bool* valid;
  const std::int64_t* offsets;
  std::int64_t rows, columns, total;
};

// Writes the mask of rows `begin` to `end` into `keep`, which may be the scores. Out is float or bool.
template <typename Out>
void topk_mask(const Scores& scores, double keep_ratio, Out* keep, std::int64_t begin, std::int64_t end);

}  // namespace vppo
