// The launchers of the CUDA library's kernels. Each enqueues one kernel and returns at once.
//
// Arguments are checked, on the current device and not empty. Tiles are contiguous and in single precision; contracts
// are those of `vppo_kernels/backends/protocols.py`.
#pragma once

#include <cuda_runtime.h>

#include "../types.h"

namespace vppo {

cudaError_t fold(Tile tile, Targets targets, Fields stats, cudaStream_t stream);
cudaError_t fold_pair(Tile tile, Targets targets, Fields stats, cudaStream_t stream);
cudaError_t fold_jsd(Tile tile, Fields pair, Mixture mixture, Fields jsd_terms, cudaStream_t stream);
cudaError_t gradient(Tile tile, Fields softmax, Targets targets, Fields grads, Slope slope, cudaStream_t stream);
// `jsd_terms.data` is null where the divergence is not Jensen-Shannon's
cudaError_t gradient_pair(Tile tile, Fields pair, Fields jsd_terms, Mixture mixture, Targets targets, Fields grads,
                          Slopes slopes, cudaStream_t stream);
// Out is float or bool; `keep` may be the scores
template <typename Out>
cudaError_t topk_mask(Scores scores, double keep_ratio, float threshold, Out* keep, cudaStream_t stream);

// Numbers of 16 bits. Rows lie `stride` numbers apart, and data and stride are multiples of 16 bytes.
struct Matrix {
  const void* data;
  std::int64_t rows, columns, stride;
  bool bfloat16;  // else float16
};

constexpr int kMostRanks = 4;

// What a fused sweep makes of `hidden weight^T`. Of two views the rows of `hidden` alternate in eights.
struct Sweep {
  Matrix hidden, weight;
  const float* bias;  // null, or one for each row of the weight
  float scale;        // on the sum of product and bias
  Targets targets;
  std::int64_t rows;  // of each view
  int splits, ranks;  // parts of the vocabulary; blocks of a cluster, which share the weight: 1, 2 or 4
  float* parts;       // [splits, fields, rows], where there is more than one part
  Fields stats;
};

// Two kernels where the vocabulary goes in parts. Of one view `stats` are those of SoftmaxStats, else of PairStats.
cudaError_t sweep(const Sweep& given, bool pair, cudaStream_t stream);
// How many clusters of so many blocks the current device runs at a time; 0 if the fused sweep was not compiled for it.
int sweep_places(int ranks);

}  // namespace vppo
