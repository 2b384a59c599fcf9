// One row of a softmax, or of two, and of their statistics, read from packed fields.
#pragma once

#include "../statistics.h"
#include "kernels.h"
#include "row.cuh"

namespace vppo {

// A logit; of a masked word a finite one whose probability is 0.
__device__ inline float finite(float z) { return z < kFloor ? kFloor : z; }

// `(z_p - m_p) - (z_q - m_q)`, in the order of subtractions that loses least; see APART in statistics.py.
__device__ inline float gap_of(float z_p, float z_q, float max_p, float max_q) {
  const float between = max_p - max_q;
  return fabsf(between) > kApart ? (z_p - max_p) - (z_q - max_q) : (z_p - z_q) - between;
}

// `log(p / m)` and `log(q / m)` for `d = log(p / q)` and the mixture m.
__device__ inline float log_share_p(float d, const Mixture& m) {
  return log_share(d, m.of_p, m.of_q, m.log_of_p, m.log_of_q);
}
__device__ inline float log_share_q(float d, const Mixture& m) {
  return log_share(-d, m.of_q, m.of_p, m.log_of_q, m.log_of_p);
}

// Statistics of a row; `first` is where a view's begin: kP or kQ.
__device__ inline SoftmaxStats load_stats(const Fields& packed, int first, int64_t row) {
  return {field(packed, first + kMax, row), field(packed, first + kSum, row), field(packed, first + kWeightedSum, row)};
}

__device__ inline PairStats load_pair_stats(const Fields& packed, int64_t row) {
  return {load_stats(packed, kP, row), load_stats(packed, kQ, row), field(packed, kMeanDiff, row),
          field(packed, kExcess, row)};
}

__device__ inline void store_stats(const Fields& packed, int first, int64_t row, const SoftmaxStats& stats) {
  field(packed, first + kMax, row) = stats.max;
  field(packed, first + kSum, row) = stats.sum;
  field(packed, first + kWeightedSum, row) = stats.weighted_sum;
}

__device__ inline void store_stats(const Fields& packed, int64_t row, const PairStats& stats) {
  store_stats(packed, kP, row, stats.p);
  store_stats(packed, kQ, row, stats.q);
  field(packed, kMeanDiff, row) = stats.mean_diff;
  field(packed, kExcess, row) = stats.excess;
}

// One view of a row over the whole vocabulary; `first` is where it begins: kP or kQ.
struct Softmax {
  float max, log_sum, entropy;

  __device__ Softmax(Fields packed, int first, int64_t row)
      : max(field(packed, first + kMax, row)),
        log_sum(field(packed, first + kLogSum, row)),
        entropy(field(packed, first + kEntropy, row)) {}
  // the normaliser is kept as two numbers, whose sum would be rounded
  __device__ float log_probability(float z) const { return (z - max) - log_sum; }
};

// Both views of a row over the whole vocabulary.
struct Pair {
  Softmax p, q;
  float mean_diff, kl;

  __device__ Pair(Fields packed, int64_t row)
      : p(packed, kP, row),
        q(packed, kQ, row),
        mean_diff(field(packed, kMeanDiff, row)),
        kl(field(packed, kKl, row)) {}
  // `log(p / q) - KL(p || q)`: how far the gap of each logit is from the mean gap
  __device__ float centred_gap(float z_p, float z_q) const { return gap_of(z_p, z_q, p.max, q.max) - mean_diff; }
  // `log(p / q)`, from the gap about the mean gap where that has more digits
  __device__ float log_ratio(float centred, float log_p, float log_q) const {
    return kl > kApart ? log_p - log_q : centred + kl;
  }
};

}  // namespace vppo
