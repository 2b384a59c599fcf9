// Token-level gradient filtering; `vppo_kernels/selection.py` says what is kept.
#pragma once

#include "../types.h"

namespace vppo {

// Writes the mask of rows `begin` to `end` into `keep`, which may be the scores. Out is float or bool.
template <typename Out>
void topk_mask(const Scores& scores, double keep_ratio, float threshold, Out* keep, std::int64_t begin, std::int64_t end);

}  // namespace vppo
