// Overwriting a tile of logits with the gradient of raw ones: entry by entry, with one or more blocks per row.
#include <cmath>

#include "../statistics.h"
#include "kernels.h"
#include "row.cuh"
#include "softmax.cuh"

namespace vppo {
namespace {

constexpr int kThreads = 128;
constexpr int kEntries = 16;  // of a row for each thread, unless the grid would then have too many blocks

__device__ float slope_at(Slope slope, float z) {
  const float capped = z * slope.to_cap;
  return slope.scale * (1.0f - capped * capped);
}

// Calls `at(column)` with the first column of every vector that this thread has.
template <int WIDTH, typename At>
__device__ void each_vector(int64_t columns, At at) {
  const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads * WIDTH;
  for (int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * WIDTH; column < columns;
       column += step) {
    at(column);
  }
}

template <int WIDTH>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Tile tile, Fields softmax, Targets targets, Fields grads, Slope slope) {
  const int64_t row = blockIdx.x;
  float* z_row = tile.data + row * tile.columns;
  const Softmax p(softmax, kP, row);
  const float of_logprob = field(grads, kGradLogprob, row), of_entropy = field(grads, kGradEntropy, row);
  const int64_t target = target_column(targets, row, tile.columns);

  each_vector<WIDTH>(tile.columns, [&](int64_t column) {
    auto z = load<WIDTH>(z_row + column);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      z.at[i] = finite(z.at[i]);
      const float log_p = p.log_probability(z.at[i]);
      float grad = expf(log_p) * (-of_entropy * (log_p + p.entropy) - of_logprob);
      if (column + i == target) grad += of_logprob;
      z.at[i] = grad * slope_at(slope, z.at[i]);
    }
    store(z_row + column, z);
  });
}

template <bool JSD, int WIDTH>
__global__ void __launch_bounds__(kThreads)
    gradient_pair_kernel(Tile tile, Fields pair, Fields jsd_terms, Mixture mixture, Targets targets, Fields grads,
                         Slopes slopes) {
  const int64_t row = blockIdx.x;
  float* p_row = tile.data + row * tile.columns;
  float* q_row = p_row + tile.rows * tile.columns;
  const Pair both(pair, row);
  const float term_p = JSD ? field(jsd_terms, kJsdP, row) : 0.0f, term_q = JSD ? field(jsd_terms, kJsdQ, row) : 0.0f;
  const float upstream = field(grads, kGradDivergence, row);
  const float of_divergence_p = upstream * (JSD ? mixture.of_p : 1.0f);
  const float of_divergence_q = upstream * (JSD ? mixture.of_q : 1.0f);
  const float of_entropy_p = field(grads, kGradEntropyP, row), of_entropy_q = field(grads, kGradEntropyQ, row);
  const bool with_targets = targets.data != nullptr;
  const float of_logprob_p = with_targets ? field(grads, kGradLogprobP, row) : 0.0f;
  const float of_logprob_q = with_targets ? field(grads, kGradLogprobQ, row) : 0.0f;
  const int64_t target = target_column(targets, row, tile.columns);

  each_vector<WIDTH>(tile.columns, [&](int64_t column) {
    auto z_p = load<WIDTH>(p_row + column), z_q = load<WIDTH>(q_row + column);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      z_p.at[i] = finite(z_p.at[i]);
      z_q.at[i] = finite(z_q.at[i]);
      const float log_p = both.p.log_probability(z_p.at[i]), log_q = both.q.log_probability(z_q.at[i]);
      const float p = expf(log_p), q = expf(log_q);
      const float centred = both.centred_gap(z_p.at[i], z_q.at[i]), d = both.log_ratio(centred, log_p, log_q);
      float grad_p, grad_q;
      if constexpr (JSD) {
        grad_p = p * (log_share_p(d, mixture) - term_p);
        grad_q = q * (log_share_q(d, mixture) - term_q);
      } else {
        grad_p = p * centred;
        // q - p = -q (exp(d) - 1): the difference of two exponentials would lose the digits of a small gap
        grad_q = d > 1.0f ? q - p : -q * expm1f(d);
      }
      grad_p = of_divergence_p * grad_p - of_entropy_p * p * (log_p + both.p.entropy) - of_logprob_p * p;
      grad_q = of_divergence_q * grad_q - of_entropy_q * q * (log_q + both.q.entropy) - of_logprob_q * q;
      if (column + i == target) {
        grad_p += of_logprob_p;
        grad_q += of_logprob_q;
      }
      z_p.at[i] = grad_p * slope_at(slopes.p, z_p.at[i]);
      z_q.at[i] = grad_q * slope_at(slopes.q, z_q.at[i]);
    }
    store(p_row + column, z_p);
    store(q_row + column, z_q);
  });
}

template <typename... Arguments>
cudaError_t launch_columns(void (*vectors)(Arguments...), void (*scalars)(Arguments...), const Tile& tile,
                           cudaStream_t stream, Arguments... arguments) {
  const dim3 grid = grid_over(tile.rows, tile.columns, kThreads * kEntries);
  return launch(aligned(tile) ? vectors : scalars, grid, dim3(kThreads), stream, arguments...);
}

}  // namespace

cudaError_t gradient(Tile tile, Fields softmax, Targets targets, Fields grads, Slope slope, cudaStream_t stream) {
  return launch_columns(gradient_kernel<4>, gradient_kernel<1>, tile, stream, tile, softmax, targets, grads, slope);
}

cudaError_t gradient_pair(Tile tile, Fields pair, Fields jsd_terms, Mixture mixture, Targets targets, Fields grads,
                          Slopes slopes, cudaStream_t stream) {
  return jsd_terms.data == nullptr
             ? launch_columns(gradient_pair_kernel<false, 4>, gradient_pair_kernel<false, 1>, tile, stream, tile, pair,
                              jsd_terms, mixture, targets, grads, slopes)
             : launch_columns(gradient_pair_kernel<true, 4>, gradient_pair_kernel<true, 1>, tile, stream, tile, pair,
                              jsd_terms, mixture, targets, grads, slopes);
}

}  // namespace vppo
