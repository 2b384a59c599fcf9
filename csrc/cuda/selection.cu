// The top-k mask: one block per trajectory finds the lowest kept score by radix select, then writes the mask, which may
// overwrite the scores.
//
// Scores become unsigned keys of the same order. The lowest kept key is found eight bits at a time, from the highest: a
// histogram of the keys whose higher bits are those of it gives the next eight. After four rounds the key is known, and
// how many of the keys that equal it are kept.
#include <cstdint>

#include "kernels.h"
#include "row.cuh"

namespace vppo {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigits = 256;
constexpr int kStaged = 8192;  // keys that stay in shared memory; longer rows are read again for every digit

// Keys have the order of scores: -0 equals 0, every NaN is the same and above all numbers. No score has the key 0.
__device__ unsigned key_of(float score) {
  const int bits = __float_as_int(score), magnitude = bits & 0x7fffffff;
  const int ordered = magnitude > 0x7f800000 ? 0x7fffffff : bits < 0 ? -magnitude : magnitude;
  return static_cast<unsigned>(ordered) ^ 0x80000000u;
}

// Sum of the values of earlier threads; `total` becomes that of all.
__device__ int sum_before(int value, int (&of_warp)[kWarps], int& total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) of_warp[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += of_warp[i];
    total += of_warp[i];
  }
  __syncthreads();  // before anyone writes `of_warp` again
  return before + sum - value;
}

template <typename Out>
__global__ void __launch_bounds__(kThreads) topk_mask_kernel(Scores scores, double keep_ratio, float threshold,
                                                             Out* keep) {
  __shared__ unsigned staged[kStaged];
  __shared__ int counts[kDigits], of_warp[kWarps];
  __shared__ struct {
    int digit, above, equal;  // of the lowest kept key; how many keys with the same higher bits are above it and at it
  } found;

  int64_t first = blockIdx.x * scores.columns, last = first + scores.columns;
  if (scores.offsets != nullptr) {  // forced into bounds, as nobody has checked them
    first = min(max(scores.offsets[blockIdx.x], int64_t{0}), scores.total);
    last = min(max(scores.offsets[blockIdx.x + 1], first), scores.total);
  }
  const bool fits = last - first <= kStaged;
  const auto read_key = [&](int64_t i) { return scores.valid[i] ? key_of(scores.data[i]) : 0u; };
  const auto key_at = [&](int64_t i) { return fits ? staged[i - first] : read_key(i); };

  int present = 0;
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    const unsigned key = read_key(i);
    present += key != 0;
    if (fits) staged[i - first] = key;
  }
  if (threadIdx.x == 0) found = {0, 0, 0};
  int tokens;
  sum_before(present, of_warp, tokens);

  // rounded as in `keep_counts` of backends/torch_tokens.py
  int wanted = static_cast<int>(ceil(tokens * keep_ratio * (1.0 - 0x1p-40)));
  unsigned lowest = 0, known = 0;  // the lowest kept key as far as it is known, and ones at its known digits
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < kDigits) counts[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
      const unsigned key = key_at(i);
      if (key != 0 && (key & known) == lowest) atomicAdd(&counts[key >> shift & 255u], 1);
    }
    __syncthreads();
    const int digit = kDigits - 1 - static_cast<int>(threadIdx.x), count = digit >= 0 ? counts[digit] : 0;
    int all;
    const int above = sum_before(count, of_warp, all);
    if (above < wanted && wanted <= above + count) found = {digit, above, count};
    __syncthreads();
    lowest |= static_cast<unsigned>(found.digit) << shift;
    known |= 255u << shift;
    wanted -= found.above;
  }

  const unsigned bar = isnan(threshold) ? 0u : key_of(threshold);  // NaN is no threshold
  const bool surplus = found.equal > wanted;  // then the earlier of the equal ones are kept
  int equal_before = 0;
  for (int64_t start = first; start < last; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    const unsigned key = i < last ? key_at(i) : 0u;
    const bool equal = key != 0 && key == lowest;
    int rank = 0;
    if (surplus) {
      int equals;
      rank = equal_before + sum_before(equal, of_warp, equals);
      equal_before += equals;
    }
    if (i < last) keep[i] = static_cast<Out>(key > bar && (key > lowest || (equal && rank < wanted)));
  }
}

}  // namespace

template <typename Out>
cudaError_t topk_mask(Scores scores, double keep_ratio, float threshold, Out* keep, cudaStream_t stream) {
  return launch(topk_mask_kernel<Out>, dim3(static_cast<unsigned>(scores.rows)), dim3(kThreads), stream, scores,
                keep_ratio, threshold, keep);
}

template cudaError_t topk_mask(Scores, double, float, float*, cudaStream_t);
template cudaError_t topk_mask(Scores, double, float, bool*, cudaStream_t);

}  // namespace vppo
