// The statistics of `vppo_kernels/statistics.py` for one row: the scalar formulas that CPU and CUDA code share.
//
// Names, formulas and their reasons are those of that file. Comments here are about single precision alone.
#pragma once

#include <cfloat>
#include <cmath>

#ifdef __CUDACC__
#define VPPO_BOTH __host__ __device__ __forceinline__
#else
#define VPPO_BOTH static inline  // so that every instruction set compiles its own copy
#endif

namespace vppo {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kFloor = -1.0e30f;  // -EXP_FLOOR of statistics.py: stands for an infinite distance
constexpr float kApart = 4.0f;      // APART of statistics.py

// `a / b` for b from FLT_MIN to 1e38, on a GPU to 2 ulp: exact division calls a function there, and saves registers for it.
VPPO_BOTH float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// `exp(x) - 1 - x` as a series, for |x| < 0.5: there the difference would lose its digits (error 1e-9 of the value).
VPPO_BOTH float phi_near(float x) {
  float series = 1.0f / 5040 + x * (1.0f / 40320 + x * (1.0f / 362880));
  series = 1.0f / 24 + x * (1.0f / 120 + x * (1.0f / 720 + x * series));
  return x * x * (0.5f + x * (1.0f / 6 + x * series));
}

// `exp(x) - 1 - x`
VPPO_BOTH float phi(float x) { return fabsf(x) < 0.5f ? phi_near(x) : expf(x) - 1.0f - x; }

// `log(p / m)` for `d = log(p / q)` and `m = (p + q) / 2`: `d / 2 - log cosh(d / 2)`.
VPPO_BOTH float log_share(float d) {
  if (fabsf(d) >= 0.5f) return fminf(d, 0.0f) + kLn2 - log1pf(expf(-fabsf(d)));
  const float s = 0.25f * d * d;
  const float log_cosh = s * (0.5f + s * (-1.0f / 12 + s * (1.0f / 45 + s * (-17.0f / 2520 + s * (31.0f / 14175)))));
  return 0.5f * d - log_cosh;
}

// `log(p / m)` for `d = log(p / q)` and `m = own p + other q`, from the shares and their logarithms: near 0 from the
// gap itself, as a sum of logarithms would lose digits, and elsewhere from those, as exp(-d) could overflow.
VPPO_BOTH float log_share(float d, float own, float other, float log_own, float log_other) {
  if (own == other) return log_share(d);
  if (fabsf(d) < 0.5f) return -log1pf(other * expm1f(-d));
  const float from_q = log_other - d;
  return -fmaxf(log_own, from_q) - log1pf(expf(-fabsf(log_own - from_q)));
}

// One view over a part of the vocabulary: largest logit m, `sum exp(z - m)`, `sum exp(z - m) (z - m)`.
struct SoftmaxStats {
  float max, sum, weighted_sum;
};

// Two views over a part of the vocabulary, with the mean gap under p and the excess about it.
struct PairStats {
  SoftmaxStats p, q;
  float mean_diff, excess;
};

// `w phi(d)` of an entry with weight `w = exp(z_p - m_p)` whose gap is `d` below the mean; `log_q` is `z_q - m_q`.
VPPO_BOTH float excess_of(float weight, float d, float log_q, float mean_diff) {
  // exp(d) alone could overflow while its product with the weight, exp(log_q + mean_diff), does not
  return d < 1.0f ? weight * phi(d) : expf(log_q + mean_diff) - weight * (1.0f + d);
}

// `part - whole <= 0`, finite also where one or both are -inf.
VPPO_BOTH float distance(float part, float whole) { return part == whole ? 0.0f : fmaxf(part - whole, kFloor); }

VPPO_BOTH SoftmaxStats merge(const SoftmaxStats& a, const SoftmaxStats& b) {
  const float top = fmaxf(a.max, b.max);
  const float down_a = distance(a.max, top), down_b = distance(b.max, top);
  const float scale_a = expf(down_a), scale_b = expf(down_b);
  return {top, scale_a * a.sum + scale_b * b.sum,
          scale_a * (a.weighted_sum + down_a * a.sum) + scale_b * (b.weighted_sum + down_b * b.sum)};
}

// A part's excess about a mean gap that is higher by `d` and a maximum higher by `-down`; `both` is `down + d`.
VPPO_BOTH float move_excess(const PairStats& part, float d, float down, float both) {
  const float step = d < 1.0f ? expf(down) * phi(d) : expf(both) - expf(down) * (1.0f + d);
  return expf(both) * part.excess + step * part.p.sum;
}

VPPO_BOTH PairStats merge(const PairStats& a, const PairStats& b) {
  const SoftmaxStats p = merge(a.p, b.p), q = merge(a.q, b.q);
  const float down_a = distance(a.p.max, p.max), down_b = distance(b.p.max, p.max);
  const float lower_a = distance(a.q.max, q.max), lower_b = distance(b.q.max, q.max);
  const float mean_diff_a = a.mean_diff + (down_a - lower_a), mean_diff_b = b.mean_diff + (down_b - lower_b);
  const float weight_a = expf(down_a) * a.p.sum, weight_b = expf(down_b) * b.p.sum;
  const float total = fmaxf(p.sum, FLT_MIN);
  // starting from the heavier part: a huge gap in a part with hardly any weight must not swallow its digits
  const float mean = weight_a > weight_b ? mean_diff_a + quotient(weight_b, total) * (mean_diff_b - mean_diff_a)
                                         : mean_diff_b + quotient(weight_a, total) * (mean_diff_a - mean_diff_b);
  const float mean_diff = a.mean_diff == INFINITY || b.mean_diff == INFINITY ? INFINITY : p.sum > 0.0f ? mean : 0.0f;
  return {p, q, mean_diff,
          move_excess(a, mean_diff - mean_diff_a, down_a, lower_a + (mean_diff - a.mean_diff)) +
              move_excess(b, mean_diff - mean_diff_b, down_b, lower_b + (mean_diff - b.mean_diff))};
}

}  // namespace vppo
