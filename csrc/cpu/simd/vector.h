// Vectors of floats as wide as the instruction set has them, by the vector extension of GCC and Clang.
//
// This folder is compiled once per instruction set, with VPPO_INSTRUCTIONS its name. Nothing in it may have external
// linkage but the table of operations: the linker keeps one copy of an inline function, and a baseline machine must not
// be given the one with AVX-512 in it. Hence the namespaces without names, and no standard library.
#pragma once

#include <cstdint>

namespace vppo {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t Int __attribute__((vector_size(4 * kWidth)));
typedef Vec Unaligned __attribute__((aligned(4), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Unaligned*>(to) = value; }
inline Vec all(float value) { return value - Vec{}; }
inline Vec select(Int where, Vec yes, Vec no) { return where ? yes : no; }

// The larger; the second if either is NaN.
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }
inline Vec min(Vec a, Vec b) { return select(a < b, a, b); }

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

// Calls `body(column, count)` for consecutive vectors of a row of `columns`; `count` is less than kWidth in the last only.
template <typename Body>
inline void each_vector(std::int64_t columns, const Body& body) {
  std::int64_t column = 0;
  for (; column + kWidth <= columns; column += kWidth) body(column, kWidth);
  if (column < columns) body(column, static_cast<int>(columns - column));
}

inline Vec load(const float* from, int count, float rest) {
  if (count == kWidth) return load(from);
  Vec value = all(rest);
  for (int i = 0; i < count; ++i) value[i] = from[i];
  return value;
}

inline void store(float* to, Vec value, int count) {
  if (count == kWidth) return store(to, value);
  for (int i = 0; i < count; ++i) to[i] = value[i];
}

}  // namespace
}  // namespace vppo
