// The operations of the CUDA library, as its bindings see them. Each enqueues one kernel and returns at once.
//
// Arguments are checked, on the current device and not empty. Tiles are contiguous and in single precision; contracts
// are those of `vppo_kernels/backends/torch.py`, `selection.py` and `loss.py`.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vppo {

// Numbers of every row, field by field: field f of row r lies at `data[f * stride + r]`.
struct Fields {
  float* data;
  int64_t stride;
};

// Views of logits under each other, each `[rows, columns]`.
struct Tile {
  float* data;
  int64_t rows, columns;
};

// The target of every row within a tile whose first column is entry `first` of the vocabulary; `index` may be null.
struct Targets {
  const int64_t* index;
  int64_t first;
};

// Derivative of finished logits z by raw ones: `scale * (1 - (to_cap z)^2)`; `to_cap` is 0 without a cap.
struct Slope {
  float scale, to_cap;
};

// Scores of trajectories: rows of `columns` each, or row r from `offsets[r]` to `offsets[r + 1]` if that is not null.
struct Scores {
  const float* data;
  const bool* valid;
  const int64_t* offsets;
  int64_t rows, columns, total;
};

// Tokens `[rows, columns]` of a batch; nothing is read where `mask` is false. From `entropy` on they may be null.
struct Tokens {
  const float *logprobs, *old_logprobs, *advantages;
  const bool *keep, *mask;
  const float *entropy, *ref_logprobs, *is_weights, *dependency;
  int64_t rows, columns;
};

// As the arguments of `_clipped_loss` in `loss.py`; `dual` is infinite where there is no such clip.
struct LossOptions {
  float low, high, dual, limit, nll_coef, entropy_coef, kl_coef;
  bool ref_of_all;
};

cudaError_t fold(Tile tile, Targets targets, Fields stats, cudaStream_t stream);
cudaError_t fold_pair(Tile tile, Targets targets, Fields stats, cudaStream_t stream);
cudaError_t fold_jsd(Tile tile, Fields pair, Fields halves, cudaStream_t stream);
cudaError_t gradient(Tile tile, Fields view, Targets targets, Fields grads, Slope slope, cudaStream_t stream);
// `halves.data` is null where the divergence is not Jensen-Shannon's
cudaError_t gradient_pair(Tile tile, Fields pair, Fields halves, Targets targets, Fields grads, Slope slope,
                          cudaStream_t stream);
// Out is float or bool; `keep` may be the scores
template <typename Out>
cudaError_t topk_mask(Scores scores, double keep_ratio, Out* keep, cudaStream_t stream);
// `values`, `[rows, columns]`, may be null; `sums` are those of `SUMS` in `loss.py`, `[12, rows]`
cudaError_t clipped_loss(Tokens tokens, LossOptions options, float* values, float* sums, cudaStream_t stream);
// `upstream` is `[rows, columns]` or `[rows]`; `grad_entropy` may be null
cudaError_t clipped_loss_gradient(Tokens tokens, LossOptions options, const float* upstream, bool upstream_per_token,
                                  float* grad, float* grad_entropy, cudaStream_t stream);

}  // namespace vppo
