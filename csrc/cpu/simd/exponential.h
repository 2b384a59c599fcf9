// Exponentials of vectors; `tests/vppo_kernels/test_native.py` holds them to float64.
#pragma once

#include "vector.h"

namespace vppo {
namespace {

// `exp(x)` for x <= 0, at most 2 units in the last place off, numbers below the normal ones included.
inline Vec exp_down(Vec x) {
  const Vec least = all(-104.0f);  // exp of it is 0
  x = max(least, x);               // a NaN stays one
  // n = round(x / ln 2), the integer left in the lowest bits of `shifted`; r = x - n ln 2, |r| <= 0.35
  const Vec shifted = x * 1.44269504088896341f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^(n + 64), then 2^-64: the result alone may be below the normal numbers
  const Int bits = (reinterpret_cast<Int>(shifted) + (64 + 127)) << 23;
  return p * reinterpret_cast<Vec>(bits) * 0x1p-64f;
}

}  // namespace
}  // namespace vppo
