// The clipped loss of every token with the sums of each row, a block to a row; and its gradient, token by token.
#include <cmath>

#include "../statistics.h"
#include "kernels.h"
#include "row.cuh"

namespace vppo {
namespace {

constexpr int kThreads = 256;

// `x` held within bounds; a NaN stays one.
__device__ float within(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

__device__ float value(const float* values, int64_t token) { return values == nullptr ? 0.0f : values[token]; }

// Ratio, clipped surrogate, and whether gradient passes the clips.
struct Surrogate {
  float log_ratio, ratio, policy;
  bool passes;

  __device__ Surrogate(float log_ratio, float advantage, const LossOptions& options)
      : log_ratio(within(log_ratio, -options.limit, options.limit)) {
    ratio = expf(this->log_ratio);
    const float free = -ratio * advantage, clipped = -within(ratio, options.low, options.high) * advantage;
    policy = free > clipped ? free : clipped;
    passes = clipped <= free && fabsf(log_ratio) <= options.limit;
    const float most = -options.dual * advantage;
    if (advantage < 0.0f && policy > most) {
      policy = most;
      passes = false;
    }
  }
};

__global__ void __launch_bounds__(kThreads)
    clipped_loss_kernel(Tokens tokens, LossOptions options, float* values, Fields row_sums) {
  __shared__ Partials<kThreads, kSums> partials;
  const int64_t first = blockIdx.x * tokens.columns;
  float sums[kSums] = {};
  for (int64_t column = threadIdx.x; column < tokens.columns; column += kThreads) {
    const int64_t token = first + column;
    if (!tokens.mask[token]) {
      if (values != nullptr) values[token] = 0.0f;
      continue;
    }
    const float logprob = tokens.logprobs[token], advantage = tokens.advantages[token];
    const float entropy = value(tokens.entropy, token);
    const Surrogate surrogate(logprob - tokens.old_logprobs[token], advantage, options);
    const bool active = advantage != 0.0f, falling = advantage < 0.0f, rising = advantage > 0.0f;

    float loss = surrogate.policy;
    if (tokens.is_weights != nullptr) loss *= tokens.is_weights[token];
    // a coefficient of 0 leaves its term out, whatever stands there
    if (options.nll_coef != 0.0f) loss -= options.nll_coef * logprob;
    if (options.entropy_coef != 0.0f) loss -= options.entropy_coef * entropy;
    float ref_kl = 0.0f;
    if (tokens.ref_logprobs != nullptr) {
      ref_kl = phi(within(tokens.ref_logprobs[token] - logprob, -options.limit, options.limit));
      if (options.kl_coef != 0.0f) loss += options.kl_coef * ref_kl;
    }
    if (values != nullptr) values[token] = loss;

    sums[0] += 1.0f;
    sums[1] += tokens.keep[token] ? 1.0f : 0.0f;
    sums[2] += active ? 1.0f : 0.0f;
    sums[3] += entropy;
    sums[4] += active ? surrogate.ratio : 0.0f;
    sums[5] += active ? phi(surrogate.log_ratio) : 0.0f;
    sums[6] += falling && surrogate.ratio < options.low ? 1.0f : 0.0f;
    sums[7] += rising && surrogate.ratio > options.high ? 1.0f : 0.0f;
    sums[8] += falling && surrogate.ratio > options.dual ? 1.0f : 0.0f;
    sums[9] += active || options.ref_of_all ? ref_kl : 0.0f;
    sums[10] += value(tokens.dependency, token);
    sums[11] += loss;
  }
  reduce(sums, partials, Add());
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) row_sums.data[i * row_sums.stride + blockIdx.x] = sums[i];
  }
}

__global__ void __launch_bounds__(kThreads)
    clipped_loss_gradient_kernel(Tokens tokens, LossOptions options, LossGradient gradient) {
  const int64_t row = blockIdx.x;
  for (int64_t column = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; column < tokens.columns;
       column += static_cast<int64_t>(gridDim.y) * kThreads) {
    const int64_t token = row * tokens.columns + column;
    float slope = 0.0f, of_token = 0.0f;
    if (tokens.mask[token]) {
      const float logprob = tokens.logprobs[token], advantage = tokens.advantages[token];
      const Surrogate surrogate(logprob - tokens.old_logprobs[token], advantage, options);
      of_token = gradient.upstream[gradient.per_token ? token : row];
      slope = surrogate.passes ? -surrogate.ratio * advantage : 0.0f;
      if (tokens.is_weights != nullptr) slope *= tokens.is_weights[token];
      slope -= options.nll_coef;
      if (tokens.ref_logprobs != nullptr && options.kl_coef != 0.0f) {
        const float d = tokens.ref_logprobs[token] - logprob;
        if (!(fabsf(d) > options.limit)) slope -= options.kl_coef * expm1f(d);
      }
      slope *= of_token;
    }
    gradient.logprobs[token] = slope;
    if (gradient.entropy != nullptr) gradient.entropy[token] = -options.entropy_coef * of_token;
  }
}

}  // namespace

cudaError_t clipped_loss(Tokens tokens, LossOptions options, float* values, Fields sums, cudaStream_t stream) {
  return launch(clipped_loss_kernel, dim3(static_cast<unsigned>(tokens.rows)), dim3(kThreads), stream, tokens, options,
                values, sums);
}

cudaError_t clipped_loss_gradient(Tokens tokens, LossOptions options, LossGradient gradient, cudaStream_t stream) {
  return launch(clipped_loss_gradient_kernel, grid_over(tokens.rows, tokens.columns, kThreads), dim3(kThreads), stream,
                tokens, options, gradient);
}

}  // namespace vppo
