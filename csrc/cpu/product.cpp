// bfloat16 x bfloat16 -> float32 on AVX512-BF16: no operator of torch has it on a CPU, and oneDNN's bfloat16 mode for
// float32 operands is hardly faster than float32 where there is no AMX.
//
// `vdpbf16ps` adds the two exact products of a pair one after the other, each sum rounded to nearest (subnormal numbers
// count as zero). The longer such a chain, the larger its rounding: a chain ends after `kChain` pairs. Where two rows
// are alike, so are their chains, and what is summed further is the difference of the second from the first. Rounding
// of the large sums is then the same in both rows, and the gap of two views keeps its digits. (The difference of the
// operands would do the same, but it does not fit into bfloat16: its rest would be a third product.)
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
constexpr int kHalf = 7;              // first rows, and second rows, of a block:
constexpr int kRows = 2 * kHalf;      // 14 x 2 sums, two registers of weights and one of a row leave one of 32 free
constexpr int kColumns = 2 * kLanes;  // of a panel of weights
constexpr int kPairs = 768;           // depth of a panel in pairs: 96 KiB, a part of the L2 cache
constexpr int kChain = 16;            // pairs to a chain; 32 were 2 % faster, and the error of a divergence up to 2.5 times

int64_t pairs_of(int64_t hidden_size) { return (hidden_size + 1) / 2; }
int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

__mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1); }

// Turns `count` rows over: their pair k goes to `to[k * stride]`, one row beside the other, up to `width` with zeros.
// It takes a cache line of each row at a time, since the rows may well share a few sets of the cache.
void turn(const uint16_t* rows, int64_t row_stride, int64_t count, int64_t elements, int64_t pairs, uint32_t* to,
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

// One block of rows times one panel of weights, over part of the depth: added to what is in `out` unless this is the
// first part. With the last part a difference from the first row becomes the second row's product.
VPPO_AVX512_BF16 void multiply(const Product& given, int64_t block, const uint32_t* rows, int64_t column,
                               const uint32_t* weights, int64_t pairs, bool first_part, bool last_part) {
  const int64_t top = block * kHalf, firsts = given.half() - top, seconds = given.rows - given.half() - top;
  float* const out = given.out + top * given.columns + column;
  const int64_t to_second = given.half() * given.columns;
  const __mmask16 inside[2] = {lanes(given.columns - column), lanes(given.columns - column - kLanes)};
  __mmask16 shares_rounding[kHalf];
  for (int i = 0; i < kHalf; ++i) {
    shares_rounding[i] = lanes(i < seconds && given.shares_rounding[top + i] ? kLanes : 0);
    for (int side = 0; side < 2; ++side) {  // on its way while the chains run
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
      turn(given.first + top * given.first_stride, given.first_stride, std::min<int64_t>(kHalf, half - top),
           given.hidden_size, pairs, to, kRows, kHalf);
      turn(given.second + top * given.second_stride, given.second_stride,
           std::min<int64_t>(kHalf, given.rows - half - top), given.hidden_size, pairs, to + kHalf, kRows, kHalf);
    }
  });
  parallel_for(given.columns, kColumns, [&](int64_t column, int64_t end) {
    alignas(64) uint32_t weights[kPairs * kColumns];
    int64_t pair = 0;
    do {  // once without any depth: zeros
      const int64_t part = std::min<int64_t>(kPairs, pairs - pair);
      turn(given.weight + column * given.weight_stride + 2 * pair, given.weight_stride, end - column,
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
