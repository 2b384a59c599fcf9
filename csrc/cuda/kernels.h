// The operations of the CUDA library, as its bindings see them. Each enqueues one kernel on a stream and returns at once.
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

cudaError_t fold(Tile tile, Targets targets, Fields stats, cudaStream_t stream);
cudaError_t fold_pair(Tile tile, Targets targets, Fields stats, cudaStream_t stream);
cudaError_t fold_jsd(Tile tile, Fields pair, Fields halves, cudaStream_t stream);
cudaError_t gradient(Tile tile, Fields view, Targets targets, Fields grads, Slope slope, cudaStream_t stream);
// `halves.data` is null where the divergence is not Jensen-Shannon's
cudaError_t gradient_pair(Tile tile, Fields pair, Fields halves, Targets targets, Fields grads, Slope slope,
                          cudaStream_t stream);

}  // namespace vppo
