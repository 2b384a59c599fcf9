// What the kernels of every device work on: tiles of logits, numbers of their rows, tokens.
#pragma once

#include <cstdint>

namespace vppo {

// Packed numbers of all rows, in the order of statistics.py.
constexpr int kViewFields = 4, kPairFields = 10;

// Finished logits, `[rows, columns]`, of one view, or of two views one after the other.
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

// Scores of trajectories: rows of `columns` each, or row r from `offsets[r]` to `offsets[r + 1]` where that is not null.
struct Scores {
  const float* data;
  const bool* valid;
  const std::int64_t* offsets;
  std::int64_t rows, columns, total;
};

}  // namespace vppo
