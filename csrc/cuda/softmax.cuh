// One row of a finished softmax, or of two, out of the packed fields of `statistics.py`.
#pragma once

#include "../statistics.h"
#include "kernels.h"

namespace vppo {

// A logit, or of a masked word a finite one whose probability is 0.
__device__ inline float finite(float z) { return z < kFloor ? kFloor : z; }

// `(z_p - m_p) - (z_q - m_q)`, in the order that loses least.
__device__ inline float gap_of(float z_p, float z_q, float max_p, float max_q) {
  const float between = max_p - max_q;
  return fabsf(between) > kApart ? (z_p - max_p) - (z_q - max_q) : (z_p - z_q) - between;
}

struct Softmax {
  float max, log_sum, entropy;

  __device__ Softmax(Fields packed, int field, int64_t row) {
    const float* at = packed.data + field * packed.stride + row;
    max = at[0];
    log_sum = at[packed.stride];
    entropy = at[2 * packed.stride];
  }
  // the normaliser stays split in two: its sum would be rounded
  __device__ float log_probability(float z) const { return (z - max) - log_sum; }
};

struct SoftmaxPair {
  Softmax p, q;
  float mean_diff, kl;

  __device__ SoftmaxPair(Fields packed, int64_t row)
      : p(packed, 0, row),
        q(packed, 4, row),
        mean_diff(packed.data[8 * packed.stride + row]),
        kl(packed.data[9 * packed.stride + row]) {}
  // `log(p / q) - KL(p || q)`: the gap of each logit from the mean gap
  __device__ float centred_gap(float z_p, float z_q) const { return gap_of(z_p, z_q, p.max, q.max) - mean_diff; }
  // `log(p / q)`, from the gap about the mean gap where that has more digits.
  __device__ float log_ratio(float centred, float log_p, float log_q) const {
    return kl > kApart ? log_p - log_q : centred + kl;
  }
};

}  // namespace vppo
