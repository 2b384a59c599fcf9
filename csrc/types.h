// What the kernels of every device work on: tiles of logits, numbers of their rows, scores of tokens.
#pragma once

#include <cstdint>

namespace vppo {

// Packed numbers are `[fields, rows]`, in the order of `vppo_kernels/statistics.py`. The fields of one view:
constexpr int kMax = 0, kSum = 1, kWeightedSum = 2, kTarget = 3;  // of SoftmaxStats, over a part of the vocabulary
constexpr int kLogSum = 1, kEntropy = 2;                          // of Softmax, over all of it; its first is kMax too
constexpr int kSoftmaxFields = 4;

// Of two views: those of p, those of q, and two numbers of both.
constexpr int kP = 0, kQ = kSoftmaxFields, kMeanDiff = 2 * kSoftmaxFields;
constexpr int kExcess = kMeanDiff + 1, kKl = kMeanDiff + 1;  // of PairStats and of Pair
constexpr int kPairFields = kMeanDiff + 2;

// The two terms of a Jensen-Shannon divergence, `KL(p || m)` and `KL(q || m)`.
constexpr int kJsdP = 0, kJsdQ = 1, kJsdFields = 2;

// The shares of both views in its mean m, `m = of_p p + of_q q`, and their logarithms.
struct Mixture {
  float of_p, of_q, log_of_p, log_of_q;
};

// Upstream gradients of one view's outputs, and of two views'; the last two where there are targets.
constexpr int kGradLogprob = 0, kGradEntropy = 1, kGradFields = 2;
constexpr int kGradDivergence = 0, kGradEntropyP = 1, kGradEntropyQ = 2, kGradLogprobP = 3, kGradLogprobQ = 4;
constexpr int kPairGradFields = 5, kPairGradFieldsWithoutTargets = 3;

// Transformed logits, `[rows, columns]`, of one view, or of two views one after the other.
struct Tile {
  float* data;
  std::int64_t rows, columns;
};

// Field f of row r lies at `data[f * stride + r]`.
struct Fields {
  float* data;
  std::int64_t stride;
};

// The target of every row, where there are targets; `first` is the vocabulary index of the tile's first column.
struct Targets {
  const std::int64_t* data;
  std::int64_t first;
};

// Derivative of transformed logits z by raw ones: `scale * (1 - (to_cap z)^2)`; `to_cap` is 0 without a cap.
struct Slope {
  float scale, to_cap;
};

// Of each of two views.
struct Slopes {
  Slope p, q;
};

// Scores of trajectories: rows of `columns` each, or row r from `offsets[r]` to `offsets[r + 1]` where that is not
// null.
struct Scores {
  const float* data;
  const bool* valid;
  const std::int64_t* offsets;
  std::int64_t rows, columns, total;
};

}  // namespace vppo
