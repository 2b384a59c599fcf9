// What all kernels share: a group of threads that walks a row of a tile and reduces over it.
//
// A row of up to 1024 columns gets one warp, with four rows to a block and no barriers; a longer one gets a block.
// The order of additions depends on the shape alone, so results are bitwise repeatable.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace vppo {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Rows of a block, given the threads of a row.
template <int THREADS>
constexpr int kRowsOfBlock = THREADS == kWarp ? 4 : 1;

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Where the warps of a row leave their partial results. Successive reductions need one each, because no barrier
// separates reading the results of one from writing those of the next.
template <int THREADS, int VALUES>
struct Partials {
  float of_warp[THREADS / kWarp][VALUES];
};

template <int WIDTH, int VALUES, typename Combine>
__device__ void reduce_lanes(float (&values)[VALUES], Combine combine) {
#pragma unroll
  for (int step = WIDTH / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < VALUES; ++i) values[i] = combine(values[i], __shfl_xor_sync(kAllLanes, values[i], step));
  }
}

// Combines each of the values over the threads of a row; all of them get the results.
template <int THREADS, int VALUES, typename Combine>
__device__ void reduce(float (&values)[VALUES], Partials<THREADS, VALUES>& partials, Combine combine) {
  reduce_lanes<kWarp>(values, combine);
  if constexpr (THREADS > kWarp) {
    constexpr int kWarps = THREADS / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < VALUES; ++i) partials.of_warp[threadIdx.x / kWarp][i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < VALUES; ++i) values[i] = partials.of_warp[lane % kWarps][i];
    reduce_lanes<kWarps>(values, combine);
  }
}

// Neighbouring numbers that are read as one access of 16 bytes (WIDTH 4), or a single number (WIDTH 1).
template <int WIDTH>
struct alignas(WIDTH * sizeof(float)) Vector {
  float at[WIDTH];
};

template <int WIDTH>
__device__ Vector<WIDTH> load(const float* address) {
  return *reinterpret_cast<const Vector<WIDTH>*>(address);
}

template <int WIDTH>
__device__ void store(float* address, const Vector<WIDTH>& vector) {
  *reinterpret_cast<Vector<WIDTH>*>(address) = vector;
}

// Whether a tile can be read 16 bytes at a time.
inline bool aligned(const Tile& tile) {
  return tile.columns % 4 == 0 && reinterpret_cast<uintptr_t>(tile.data) % 16 == 0;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Blocks of so many columns each for every row; where the grid can have no more blocks, each takes more columns.
inline dim3 grid_over(int64_t rows, int64_t columns, int64_t columns_of_block) {
  const int64_t blocks = (columns + columns_of_block - 1) / columns_of_block, most = 65535;
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(blocks < most ? blocks : most));
}

__device__ inline float& field(const Fields& packed, int index, int64_t row) {
  return packed.data[index * packed.stride + row];
}

// Column of a row's target within the tile, or -1.
__device__ inline int64_t target_column(const Targets& targets, int64_t row, int64_t columns) {
  if (targets.data == nullptr || targets.data[row] < targets.first) return -1;
  const uint64_t column = static_cast<uint64_t>(targets.data[row]) - static_cast<uint64_t>(targets.first);
  return column < static_cast<uint64_t>(columns) ? static_cast<int64_t>(column) : -1;
}

// Starts a kernel over the rows of a tile. `choose(threads, width)` returns the kernel in which a row has so many
// threads that read so many numbers at once; both are integral constants.
template <typename Choose, typename... Arguments>
cudaError_t launch_rows(const Tile& tile, cudaStream_t stream, Choose choose, Arguments... arguments) {
  const auto start = [&](auto threads, auto width) {
    constexpr int kRows = kRowsOfBlock<threads>;
    const dim3 grid(static_cast<unsigned>((tile.rows + kRows - 1) / kRows)), block(threads, kRows);
    return launch(choose(threads, width), grid, block, stream, arguments...);
  };
  const auto with_width = [&](auto threads) {
    return aligned(tile) ? start(threads, std::integral_constant<int, 4>())
                         : start(threads, std::integral_constant<int, 1>());
  };
  if (tile.columns <= 1024) return with_width(std::integral_constant<int, 32>());
  if (tile.columns <= 8192) return with_width(std::integral_constant<int, 128>());
  return with_width(std::integral_constant<int, 512>());
}

// The row of this thread, in a kernel that `launch_rows` started.
__device__ inline int64_t row_of_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

}  // namespace vppo
