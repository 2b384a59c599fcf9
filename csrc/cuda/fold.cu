// Folding a tile into the statistics of its rows: one view, two views, and the two terms of the Jensen-Shannon
// divergence.
//
// Entries beyond the end of a row are -INFINITY, as the logits of masked words are: they take part in no sum. A row is
// read once. Its threads load a chunk into registers, reduce it to its maxima, then to its sums and mean gap, then to
// the excess about that gap; the first thread merges the chunk's statistics with those of earlier chunks.
#include <cmath>

#include "../statistics.h"
#include "kernels.h"
#include "row.cuh"
#include "softmax.cuh"

namespace vppo {
namespace {

constexpr int kHeld = 16;  // entries of each view that a thread holds at a time

// The entries of a thread in a chunk of a row: every THREADS-th vector of WIDTH neighbours.
template <int THREADS, int WIDTH>
struct Chunk {
  static constexpr int kColumns = THREADS * kHeld;
  int64_t first;  // column of this thread's first entry
  int left;       // columns from there to the end of the chunk or of the row

  __device__ Chunk(int64_t start, int64_t columns)
      : first(start + threadIdx.x * WIDTH),
        left(static_cast<int>(columns - start < kColumns ? columns - start : kColumns) -
             static_cast<int>(threadIdx.x) * WIDTH) {}

  __device__ bool inside(int entry) const { return entry / WIDTH * WIDTH * THREADS < left; }

  __device__ void load_into(float (&z)[kHeld], const float* row) const {
#pragma unroll
    for (int i = 0; i < kHeld; i += WIDTH) {
      if (inside(i)) {
        const auto vector = load<WIDTH>(row + first + i * THREADS);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) z[i + j] = vector.at[j];
      } else {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) z[i + j] = -INFINITY;
      }
    }
  }
};

template <int THREADS, int WIDTH>
__global__ void __launch_bounds__(THREADS * kRowsOfBlock<THREADS>)
    fold_kernel(Tile tile, Targets targets, Fields stats) {
  __shared__ Partials<THREADS, 1> tops;
  __shared__ Partials<THREADS, 2> sums;
  const int64_t row = row_of_thread();
  if (row >= tile.rows) return;
  const float* z_row = tile.data + row * tile.columns;

  SoftmaxStats total = load_stats(stats, kP, row);
  for (int64_t start = 0; start < tile.columns; start += Chunk<THREADS, WIDTH>::kColumns) {
    const Chunk<THREADS, WIDTH> chunk(start, tile.columns);
    float z[kHeld];
    chunk.load_into(z, z_row);
    float top[1] = {-INFINITY};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) top[0] = fmaxf(top[0], z[i]);
    reduce(top, tops, Max());

    float sum[2] = {};  // of weights, and of weights times distances from the maximum
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const bool seen = z[i] != -INFINITY;
      const float shifted = seen ? z[i] - top[0] : 0.0f, weight = seen ? expf(shifted) : 0.0f;
      sum[0] += weight;
      sum[1] += weight * shifted;
    }
    reduce(sum, sums, Add());
    if (threadIdx.x == 0) total = merge(total, SoftmaxStats{top[0], sum[0], sum[1]});
  }

  if (threadIdx.x == 0) {
    store_stats(stats, kP, row, total);
    const int64_t target = target_column(targets, row, tile.columns);
    if (target >= 0) field(stats, kTarget, row) = z_row[target];
  }
}

template <int THREADS, int WIDTH>
__global__ void __launch_bounds__(THREADS * kRowsOfBlock<THREADS>)
    fold_pair_kernel(Tile tile, Targets targets, Fields stats) {
  __shared__ Partials<THREADS, 2> tops;
  __shared__ Partials<THREADS, 5> sums;
  __shared__ Partials<THREADS, 1> excesses;
  const int64_t row = row_of_thread();
  if (row >= tile.rows) return;
  const float* p_row = tile.data + row * tile.columns;
  const float* q_row = p_row + tile.rows * tile.columns;

  PairStats total = load_pair_stats(stats, row);
  for (int64_t start = 0; start < tile.columns; start += Chunk<THREADS, WIDTH>::kColumns) {
    const Chunk<THREADS, WIDTH> chunk(start, tile.columns);
    float z_p[kHeld], z_q[kHeld];
    chunk.load_into(z_p, p_row);
    chunk.load_into(z_q, q_row);
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      top[0] = fmaxf(top[0], z_p[i]);
      top[1] = fmaxf(top[1], z_q[i]);
    }
    reduce(top, tops, Max());

    float weight[kHeld], gap[kHeld];
    float sum[5] = {};  // weights and weighted_sum of p, of q, and the gaps under p
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const bool seen_p = z_p[i] != -INFINITY, seen_q = z_q[i] != -INFINITY;
      const float log_p = seen_p ? z_p[i] - top[0] : 0.0f, log_q = seen_q ? z_q[i] - top[1] : 0.0f;
      const float weight_q = seen_q ? expf(log_q) : 0.0f;
      weight[i] = seen_p ? expf(log_p) : 0.0f;
      gap[i] = seen_p && seen_q ? gap_of(z_p[i], z_q[i], top[0], top[1]) : seen_q ? kFloor : 0.0f;
      sum[0] += weight[i];
      sum[1] += weight[i] * log_p;
      sum[2] += weight_q;
      sum[3] += weight_q * log_q;
      sum[4] += seen_p && !seen_q ? INFINITY : weight[i] * gap[i];
    }
    reduce(sum, sums, Add());

    const float mean = sum[0] > 0.0f ? sum[4] / sum[0] : 0.0f;
    bool near = true;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) near &= fabsf(mean - gap[i]) < 0.5f;
    float excess[1] = {};
    if (near) {  // the usual case, as most tokens hardly depend on the image: a polynomial is enough
#pragma unroll
      for (int i = 0; i < kHeld; ++i) excess[0] += weight[i] * phi_near(mean - gap[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) excess[0] += excess_of(weight[i], mean - gap[i], z_q[i] - top[1], mean);
    }
    reduce(excess, excesses, Add());
    if (threadIdx.x == 0) {
      total = merge(total, PairStats{{top[0], sum[0], sum[1]}, {top[1], sum[2], sum[3]}, mean, excess[0]});
    }
  }

  if (threadIdx.x == 0) {
    store_stats(stats, row, total);
    const int64_t target = target_column(targets, row, tile.columns);
    if (target >= 0) {
      field(stats, kP + kTarget, row) = p_row[target];
      field(stats, kQ + kTarget, row) = q_row[target];
    }
  }
}

template <int THREADS, int WIDTH>
__global__ void __launch_bounds__(THREADS * kRowsOfBlock<THREADS>)
    fold_jsd_kernel(Tile tile, Fields pair, Mixture mixture, Fields jsd_terms) {
  __shared__ Partials<THREADS, 2> sums;
  const int64_t row = row_of_thread();
  if (row >= tile.rows) return;
  const float* p_row = tile.data + row * tile.columns;
  const float* q_row = p_row + tile.rows * tile.columns;
  const Pair both(pair, row);

  float terms[2] = {};
#pragma unroll 2
  for (int64_t column = threadIdx.x * WIDTH; column < tile.columns; column += THREADS * WIDTH) {
    const auto z_p = load<WIDTH>(p_row + column), z_q = load<WIDTH>(q_row + column);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float p = finite(z_p.at[i]), q = finite(z_q.at[i]);
      const float log_p = both.p.log_probability(p), log_q = both.q.log_probability(q);
      const float d = both.log_ratio(both.centred_gap(p, q), log_p, log_q);
      terms[0] += expf(log_p) * log_share_p(d, mixture);
      terms[1] += expf(log_q) * log_share_q(d, mixture);
    }
  }
  reduce(terms, sums, Add());
  if (threadIdx.x == 0) {
    field(jsd_terms, kJsdP, row) += terms[0];
    field(jsd_terms, kJsdQ, row) += terms[1];
  }
}

}  // namespace

cudaError_t fold(Tile tile, Targets targets, Fields stats, cudaStream_t stream) {
  return launch_rows(
      tile, stream, [](auto threads, auto width) { return fold_kernel<threads, width>; }, tile, targets, stats);
}

cudaError_t fold_pair(Tile tile, Targets targets, Fields stats, cudaStream_t stream) {
  return launch_rows(
      tile, stream, [](auto threads, auto width) { return fold_pair_kernel<threads, width>; }, tile, targets, stats);
}

cudaError_t fold_jsd(Tile tile, Fields pair, Mixture mixture, Fields jsd_terms, cudaStream_t stream) {
  return launch_rows(
      tile, stream, [](auto threads, auto width) { return fold_jsd_kernel<threads, width>; }, tile, pair, mixture,
      jsd_terms);
}

}  // namespace vppo
