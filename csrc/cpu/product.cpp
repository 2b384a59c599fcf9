// bfloat16 x bfloat16 -> float32 on AVX512-BF16. No operator of torch does this on a CPU, and oneDNN's bfloat16 mode
// for float32 operands is hardly faster than float32 where there is no AMX.
//
// The instruction `vdpbf16ps` multiplies a pair of elements exactly and adds the two products to a sum, which is
// rounded to nearest after each (subnormal numbers count as zero). The error grows with the length of such a chain of
// additions, so a chain ends after `kChain` pairs, and the results of the chains are summed separately.
//
// Two views of a row are close, and their divergence needs the small difference of their logits. If each view were
// summed by itself, the two rounding errors would hide it. So where `shares_rounding` says so, the chain of the second
// row minus the chain of the first is summed, and at the end the product of the first row is added to that sum: both
// rows then carry the same error of the large sums. (Subtracting the operands instead would need a third product, as
// their difference does not fit into bfloat16.)
#include "product.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && __has_include(<avx512bf16intrin.h>)

#include <immintrin.h>

#include "operations.h"
#include "parallel.h"

#define VPPO_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace vppo {
namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;

constexpr int kLanes = 16;            // floats in a register
constexpr int kHalf = 7;              // first rows of a block, and as many second rows
constexpr int kRows = 2 * kHalf;      // 14 x 2 sums, 2 registers of weights and 1 of a row: 31 of 32 registers
constexpr int kColumns = 2 * kLanes;  // of a panel of weights
constexpr int kPairs = 768;           // pairs of a panel's columns: 96 KiB, a part of the L2 cache
constexpr int kChain = 16;            // pairs of a chain; 32 are 2 % faster, but with up to 2.5 times the error

int64_t pairs_of(int64_t hidden_size) { return (hidden_size + 1) / 2; }
int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

__mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1); }

// Transposes `count` rows of pairs: pair k of row j goes to `to[k * stride + j]`, and zeros to rows `count` to `width`.
// It takes one cache line of every row at a time, since the rows may compete for a few sets of the cache.
void transpose(const uint16_t* rows, int64_t row_stride, int64_t count, int64_t elements, int64_t pairs, uint32_t* to,
          int64_t stride, int64_t width) {
  for (int64_t start = 0; start < pairs; start += kLanes) {
    const int64_t stop = std::min(start + kLanes, pairs), whole = std::min(stop, elements / 2);
    for (int64_t j = 0; j < count; ++j) {
      const uint16_t* const row = rows + j * row_stride;
      __builtin_prefetch(row + 2 * start + 4 * kLanes);
      for (int64_t k = start; k < whole; ++k) std::memcpy(to + k * stride + j, row + 2 * k, sizeof(uint32_t));
      if (whole < stop) to[whole * stride + j] = row[2 * whole];  // the last element of an odd number
    }
    for (int64_t j = std::max<int64_t>(count, 0); j < width; ++j)
      for (int64_t k = start; k < stop; ++k) to[k * stride + j] = 0;
  }
}

// One block of rows times one panel of weights, over a part of the hidden size. The result is added to what is in
// `out`, unless this is the first part. With the last part, a second row that is a difference gets the first row added.
VPPO_AVX512_BF16 void multiply(const Product& given, int64_t block, const uint32_t* rows, int64_t column,
                               const uint32_t* weights, int64_t pairs, bool first_part, bool last_part) {
  const int64_t top = block * kHalf, firsts = given.half() - top, seconds = given.rows - given.half() - top;
  float* const out = given.out + top * given.columns + column;
  const int64_t to_second = given.half() * given.columns;
  const __mmask16 inside[2] = {lanes(given.columns - column), lanes(given.columns - column - kLanes)};
  __mmask16 shares_rounding[kHalf];
  for (int i = 0; i < kHalf; ++i) {
    shares_rounding[i] = lanes(i < seconds && given.shares_rounding[top + i] ? kLanes : 0);
    for (int side = 0; side < 2; ++side) {  // fetched while the chains are computed
      const float* const line = out + i * given.columns + side * kLanes;
      if (i < firsts && inside[side]) __builtin_prefetch(line, 1);
      if (i < seconds && inside[side]) __builtin_prefetch(line + to_second, 1);
    }
  }
  alignas(64) float sums[kRows][2][kLanes] = {};
  for (int64_t start = 0; start < pairs; start += kChain) {
    __m512 chain[kRows][2];
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) chain[i][0] = chain[i][1] = _mm512_setzero_ps();
    for (int64_t k = start; k < std::min(start + kChain, pairs); ++k) {
      const auto left = (__m512bh)_mm512_load_si512(weights + k * kColumns);
      const auto right = (__m512bh)_mm512_load_si512(weights + k * kColumns + kLanes);
#pragma GCC unroll 14
      for (int i = 0; i < kRows; ++i) {
        const auto row = (__m512bh)_mm512_set1_epi32(static_cast<int>(rows[k * kRows + i]));
        chain[i][0] = _mm512_dpbf16_ps(chain[i][0], row, left);
        chain[i][1] = _mm512_dpbf16_ps(chain[i][1], row, right);
      }
    }
#pragma GCC unroll 7
    for (int i = 0; i < kHalf; ++i)
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side) {
        const __m512 one = chain[i][side];
        const __m512 other = _mm512_sub_ps(chain[kHalf + i][side], _mm512_maskz_mov_ps(shares_rounding[i], one));
        _mm512_store_ps(sums[i][side], _mm512_add_ps(_mm512_load_ps(sums[i][side]), one));
        _mm512_store_ps(sums[kHalf + i][side], _mm512_add_ps(_mm512_load_ps(sums[kHalf + i][side]), other));
      }
  }
  for (int i = 0; i < std::min<int64_t>(kHalf, firsts); ++i)
    for (int side = 0; side < 2; ++side) {
      float* const first = out + i * given.columns + side * kLanes;
      __m512 one = _mm512_load_ps(sums[i][side]);
      if (!first_part) one = _mm512_add_ps(one, _mm512_maskz_loadu_ps(inside[side], first));
      _mm512_mask_storeu_ps(first, inside[side], one);
      if (i >= seconds) continue;
      __m512 other = _mm512_load_ps(sums[kHalf + i][side]);
      if (!first_part) other = _mm512_add_ps(other, _mm512_maskz_loadu_ps(inside[side], first + to_second));
      if (last_part) other = _mm512_add_ps(other, _mm512_maskz_mov_ps(shares_rounding[i], one));
      _mm512_mask_storeu_ps(first + to_second, inside[side], other);
    }
}

}  // namespace

bool has_product() { return &operations() == &operations_avx512 && __builtin_cpu_supports("avx512bf16"); }

int64_t product_scratch(int64_t rows, int64_t hidden_size) {
  return blocks_of(rows + rows % 2) * kRows * pairs_of(hidden_size);
}

void product(const Product& given) {
  const int64_t half = given.half(), pairs = pairs_of(given.hidden_size), blocks = blocks_of(2 * half);
  auto* const rows = reinterpret_cast<uint32_t*>(given.scratch);
  parallel_for(blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t top = block * kHalf;
      uint32_t* const to = rows + block * pairs * kRows;
      transpose(given.first + top * given.first_stride, given.first_stride, std::min<int64_t>(kHalf, half - top),
           given.hidden_size, pairs, to, kRows, kHalf);
      transpose(given.second + top * given.second_stride, given.second_stride,
           std::min<int64_t>(kHalf, given.rows - half - top), given.hidden_size, pairs, to + kHalf, kRows, kHalf);
    }
  });
  parallel_for(given.columns, kColumns, [&](int64_t column, int64_t end) {
    alignas(64) uint32_t weights[kPairs * kColumns];
    int64_t pair = 0;
    do {  // at least once: a hidden size of 0 gives zeros
      const int64_t part = std::min<int64_t>(kPairs, pairs - pair);
      transpose(given.weight + column * given.weight_stride + 2 * pair, given.weight_stride, end - column,
           given.hidden_size - 2 * pair, part, weights, kColumns, kColumns);
      for (int64_t block = 0; block < blocks; ++block)
        multiply(given, block, rows + (block * pairs + pair) * kRows, column, weights, part, pair == 0,
                 pair + part == pairs);
      pair += part;
    } while (pair < pairs);
  });
}

}  // namespace vppo

#else

namespace vppo {

bool has_product() { return false; }
std::int64_t product_scratch(std::int64_t, std::int64_t) { return 0; }
void product(const Product&) {}

}  // namespace vppo

#endif
