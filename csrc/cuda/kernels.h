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

}  // namespace vppo
