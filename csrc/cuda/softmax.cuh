// One row of a finished softmax, or of two, out of the packed fields of `statistics.py`.
#pragma once

#include "kernels.h"

namespace vppo {

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
  float gap, kl;

  __device__ SoftmaxPair(Fields packed, int64_t row)
      : p(packed, 0, row),
        q(packed, 4, row),
        gap(packed.data[8 * packed.stride + row]),
        kl(packed.data[9 * packed.stride + row]) {}
  // `log(p / q) - KL(p || q)`: the gap of each logit from the mean gap
  __device__ float centred_gap(float z_p, float z_q) const { return (z_p - z_q) - (p.max - q.max) - gap; }
};

}  // namespace vppo
