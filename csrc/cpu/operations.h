// The tile operations for the rows `begin` to `end` of a tile, once per instruction set; `backends/torch.py` says what each
// does. Every row is computed by itself, so results do not depend on how rows are divided among threads.
#pragma once

#include <cstdint>

namespace vppo {

constexpr int kViewFields = 4, kPairFields = 10;  // of packed statistics, in the order of statistics.py

// Finished logits, `[rows, columns]`, of one view, or of two views one after the other.
struct Tile {
  float* data;
  std::int64_t rows, columns;

  float* view(int index, std::int64_t row) const { return data + (index * rows + row) * columns; }
};

// Packed statistics, `[fields, rows]`; fields lie `stride` apart.
struct Fields {
  float* data;
  std::int64_t stride;

  float& operator()(int field, std::int64_t row) const { return data[field * stride + row]; }
};

// Targets of all rows, or none; `first` is the vocabulary index of the tile's first column.
struct Targets {
  const std::int64_t* data;
  std::int64_t first;

  // The tile's column that is the target of a row, -1 if it is not in this tile.
  std::int64_t column(std::int64_t row, std::int64_t columns) const {
    if (data == nullptr || data[row] < first || data[row] - first >= columns) return -1;
    return data[row] - first;
  }
};

struct Operations {
  const char* name;
  void (*fold)(const Tile& tile, const Targets& targets, const Fields& stats, std::int64_t begin, std::int64_t end);
};

extern const Operations operations_baseline;
#ifdef __x86_64__
extern const Operations operations_avx2, operations_avx512;
#endif

// Those for the best instruction set of this processor, or the one that VPPO_KERNELS_ISA names.
const Operations& operations();

}  // namespace vppo
