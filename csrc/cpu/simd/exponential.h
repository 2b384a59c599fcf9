// Exponentials and logarithms of vectors. Tests compare them with float64 over the whole range of floats.
#pragma once

#include "../../types.h"
#include "vector.h"

namespace vppo {
namespace {

constexpr float kLeast = -104.0f;  // the exponential of this, and of everything below, is 0

// Splits `x = n ln 2 + r` with |r| <= 0.35 and returns `exp(r)`; n is in the lowest bits of `shifted`.
inline Vec exp_of_rest(Vec x, Vec& shifted) {
  shifted = x * 1.44269504088896341f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

inline Vec power_of_two(Int n) { return reinterpret_cast<Vec>((n + 127) << 23); }

// `exp(x)` for kLeast <= x <= 40; a NaN stays one.
inline Vec exp_down(Vec x) {
  Vec shifted;
  const Vec p = exp_of_rest(x, shifted);
  // times 2^(n + 64), then 2^-64, so that nothing but the result can be subnormal
  return p * power_of_two(reinterpret_cast<Int>(shifted) + 64) * 0x1p-64f;
}

// `exp(x)` of any x.
inline Vec exp(Vec x) {
  Vec shifted;
  const Vec p = exp_of_rest(min(all(89.0f), max(all(kLeast), x)), shifted);
  const Int n = reinterpret_cast<Int>(shifted) - reinterpret_cast<Int>(all(12582912.0f)), half = n >> 1;
  return p * power_of_two(half) * power_of_two(n - half);
}

// `exp(x) - 1 - x` for |x| <= 0.5, where subtracting would lose digits.
inline Vec phi_near(Vec x) {
  Vec p = x * 1.99448744416e-4f + 1.39821860463e-3f;
  p = p * x + 8.33323613352e-3f;
  p = p * x + 4.166579123e-2f;
  p = p * x + 1.66666668017e-1f;
  p = p * x + 5.00000012161e-1f;
  return x * x * p;
}

// `log(1 + u)` for -0.5 <= u <= 1: twice the inverse hyperbolic tangent of u / (2 + u).
inline Vec log1p(Vec u) {
  const Vec s = u / (u + 2.0f), t = s * s;
  Vec p = t * 1.1612164612e-1f + 1.08532879004e-1f;
  p = p * t + 1.42961789972e-1f;
  p = p * t + 1.9999853166e-1f;
  p = p * t + 3.33333336603e-1f;
  return 2.0f * (s + s * t * p);
}

// `log(p / m)` and `log(q / m)` for `d = log(p / q)` and `m = (p + q) / 2`: `+-d / 2 - log cosh(d / 2)`.
inline void log_shares(Vec d, Vec& of_p, Vec& of_q) {
  const Vec t = d * d;
  const Vec log_cosh = t * ((t * 3.37560846304e-4f - 5.20743339822e-3f) * t + 1.24999987515e-1f);
  const Vec rest = 0.69314718056f - log1p(exp_down(max(all(kLeast), -abs(d))));
  const Int near = abs(d) < 0.5f;
  of_p = near ? 0.5f * d - log_cosh : min(d, Vec{}) + rest;
  of_q = near ? -0.5f * d - log_cosh : min(-d, Vec{}) + rest;
}

// `-log(own + other exp(-d))`, where own and other add up to 1: `log(p / m)` of a mixture; see statistics.h.
inline Vec log_share(Vec d, float other, float log_own, float log_other) {
  const Vec near = -log1p(other * (phi_near(-d) - d)), from_q = log_other - d;
  const Vec far = max(log_own + Vec{}, from_q) + log1p(exp_down(max(all(kLeast), -abs(log_own - from_q))));
  return abs(d) < 0.5f ? near : -far;
}

// `log(p / m)` and `log(q / m)` for `d = log(p / q)` and the mixture m; kHalf, of equal shares, is half the arithmetic.
template <bool kHalf>
inline void log_shares(Vec d, const Mixture& mixture, Vec& of_p, Vec& of_q) {
  if (kHalf) return log_shares(d, of_p, of_q);
  of_p = log_share(d, mixture.of_q, mixture.log_of_p, mixture.log_of_q);
  of_q = log_share(-d, mixture.of_p, mixture.log_of_q, mixture.log_of_p);
}

inline bool evaluate(const char* function, const float* x, float* out, int64_t count) {
  const auto is = [&](const char* name) { return __builtin_strcmp(function, name) == 0; };
  const auto apply = [&](auto of) {
    each_vector(count, [&](int64_t i, int n) { store(out + i, of(load(x + i, n, 0.0f)), n); });
    return true;
  };
  if (is("exp_down")) return apply([](Vec v) { return exp_down(max(all(kLeast), v)); });
  if (is("exp")) return apply([](Vec v) { return exp(v); });
  if (is("phi_near")) return apply([](Vec v) { return phi_near(v); });
  if (is("log1p")) return apply([](Vec v) { return log1p(v); });
  return false;
}

}  // namespace
}  // namespace vppo
