// The clipped loss and its gradient; formulas are those of `_clipped_loss` in loss.py.
#pragma once

#include "../operations.h"
#include "exponential.h"

namespace vppo {
namespace {

// `x` held within bounds; a NaN stays one.
inline Vec within(Vec x, float low, float high) { return x < low ? all(low) : x > high ? all(high) : x; }

// Tokens `column` to `column + count` of a row; nothing but zeros where the mask is 0.
struct Some {
  const Tokens& tokens;
  int64_t first;
  int count;
  Int valid;
  Vec logprobs, advantages, log_ratio;

  Some(const Tokens& tokens, int64_t first, int count)
      : tokens(tokens), first(first), count(count), valid(load(tokens.mask + first, count)),
        logprobs(values(tokens.logprobs)), advantages(values(tokens.advantages)),
        log_ratio(logprobs - values(tokens.old_logprobs)) {}

  Vec values(const float* from) const {
    return from == nullptr ? Vec{} : valid ? load(from + first, count, 0.0f) : Vec{};
  }
};

// Ratio, clipped surrogate, and where gradient passes the clips.
struct Surrogate {
  Vec log_ratio, ratio, policy;
  Int passes;

  Surrogate(const Some& some, const LossOptions& options) {
    log_ratio = within(some.log_ratio, -options.limit, options.limit);
    ratio = exp(log_ratio);
    const Vec free = -ratio * some.advantages;
    const Vec clipped = -within(ratio, options.low, options.high) * some.advantages;
    policy = free > clipped ? free : clipped;
    passes = (clipped <= free) & (abs(some.log_ratio) <= options.limit);
    if (options.dual == INFINITY) return;
    const Vec most = -options.dual * some.advantages;
    const Int over = (some.advantages < 0.0f) & (policy > most);
    policy = over ? most : policy;
    passes = passes & ~over;
  }
};

void clipped_loss(const Tokens& tokens, const LossOptions& options, float* values, Fields row_sums, int64_t begin,
                  int64_t end) {
  const Vec one = all(1.0f), zero{};
  for (int64_t row = begin; row < end; ++row) {
    Vec sums[kSums] = {};
    each_vector(tokens.columns, [&](int64_t column, int count) {
      const Some some(tokens, row * tokens.columns + column, count);
      const Surrogate surrogate(some, options);
      const Int falling = some.advantages < 0.0f, rising = some.advantages > 0.0f;
      const Int active = some.valid & (some.advantages != 0.0f);  // a NaN is active
      const Vec entropy = some.values(tokens.entropy);
      Vec loss = surrogate.policy;
      if (tokens.is_weights != nullptr) loss *= some.values(tokens.is_weights);
      // a coefficient of 0 leaves its term out, whatever stands there
      if (options.nll_coef != 0.0f) loss -= options.nll_coef * some.logprobs;
      if (options.entropy_coef != 0.0f) loss -= options.entropy_coef * entropy;
      if (tokens.ref_logprobs != nullptr) {
        const Vec d = some.values(tokens.ref_logprobs) - some.logprobs;
        const Vec ref_kl = phi(within(d, -options.limit, options.limit));
        if (options.kl_coef != 0.0f) loss += options.kl_coef * ref_kl;
        sums[9] += (options.ref_of_all ? some.valid : active) ? ref_kl : zero;
      }
      loss = some.valid ? loss : zero;
      if (values != nullptr) store(values + some.first, loss, count);
      const Int kept = some.valid & load(tokens.keep + some.first, count);
      sums[0] += some.valid ? one : zero;
      sums[1] += kept ? one : zero;
      sums[2] += active ? one : zero;
      sums[3] += entropy;
      sums[4] += active ? surrogate.ratio : zero;
      sums[5] += active ? phi(surrogate.log_ratio) : zero;
      sums[6] += falling & (surrogate.ratio < options.low) ? one : zero;
      sums[7] += rising & (surrogate.ratio > options.high) ? one : zero;
      sums[8] += falling & (surrogate.ratio > options.dual) ? one : zero;
      sums[10] += some.values(tokens.dependency);
      sums[11] += loss;
    });
    for (int i = 0; i < kSums; ++i) row_sums.data[i * row_sums.stride + row] = sum(sums[i]);
  }
}

void clipped_loss_gradient(const Tokens& tokens, const LossOptions& options, const LossGradient& gradient,
                           int64_t begin, int64_t end) {
  const Vec zero{};
  for (int64_t row = begin; row < end; ++row) {
    each_vector(tokens.columns, [&](int64_t column, int count) {
      const Some some(tokens, row * tokens.columns + column, count);
      const Surrogate surrogate(some, options);
      const Vec upstream = gradient.per_token ? some.values(gradient.upstream)
                                              : (some.valid ? all(gradient.upstream[row]) : zero);
      Vec slope = surrogate.passes ? -surrogate.ratio * some.advantages : zero;
      if (tokens.is_weights != nullptr) slope *= some.values(tokens.is_weights);
      slope -= options.nll_coef;
      if (tokens.ref_logprobs != nullptr && options.kl_coef != 0.0f) {
        const Vec d = some.values(tokens.ref_logprobs) - some.logprobs;
        slope -= abs(d) > options.limit ? zero : options.kl_coef * expm1(d);
      }
      store(gradient.logprobs + some.first, some.valid ? slope * upstream : zero, count);
      if (gradient.entropy != nullptr) {
        store(gradient.entropy + some.first, -options.entropy_coef * upstream, count);
      }
    });
  }
}

}  // namespace
}  // namespace vppo
