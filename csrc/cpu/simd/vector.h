// Vectors of floats as wide as the instruction set has them, by the vector extension of GCC and Clang.
//
// This folder is compiled once per instruction set, with VPPO_INSTRUCTIONS its name. Only the table of operations has
// external linkage. Of an inline function with external linkage the linker would keep a single copy, and an old
// processor might be given the one with AVX-512 in it. Hence the unnamed namespaces, and no standard library beyond
// C's.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace vppo {
namespace {

using std::int64_t;

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t Int __attribute__((vector_size(4 * kWidth)));  // also of conditions: -1 where true

inline Vec all(float value) { return Vec{} + value; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b if either is NaN
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec abs(Vec a) { return reinterpret_cast<Vec>(reinterpret_cast<Int>(a) & 0x7FFFFFFF); }

inline float sum(Vec value) {
  double total = 0;
  for (int i = 0; i < kWidth; ++i) total += value[i];
  return static_cast<float>(total);
}

inline float largest(Vec value) {
  float top = value[0];
  for (int i = 1; i < kWidth; ++i) top = value[i] > top ? value[i] : top;
  return top;
}

// Reads `count` entries, fewer than kWidth at the end of a row only, and fills the others with `rest`.
inline Vec load(const float* from, int count, float rest) {
  Vec value = all(rest);
  __builtin_memcpy(&value, from, sizeof(float) * count);
  return value;
}

inline void store(float* to, Vec value, int count) { __builtin_memcpy(to, &value, sizeof(float) * count); }

// Calls `body(column, count)` for the vectors of a row one after the other.
template <typename Body>
inline void each_vector(int64_t columns, const Body& body) {
  int64_t column = 0;
  for (; column + kWidth <= columns; column += kWidth) body(column, kWidth);
  if (column < columns) body(column, static_cast<int>(columns - column));
}

}  // namespace
}  // namespace vppo
