// The operations on tiles: folds and gradients. Formulas and their reasons are those of `backends/torch.py`.
#pragma once

#include "../../statistics.h"
#include "../operations.h"
#include "exponential.h"

namespace vppo {
namespace {

constexpr int64_t kBlock = 4096;   // columns folded at a time: few enough to stay in a near cache for a second pass
constexpr float kMostGap = 80.0f;  // the exponential of such a gap is finite, also times the sum of a block
constexpr float kOut = -FLT_MAX;   // stands for entries beyond the end of a row: finite, and without weight

inline float* row_of(const Tile& tile, int view, int64_t row) {
  return tile.data + (view * tile.rows + row) * tile.columns;
}

inline float& field(const Fields& packed, int index, int64_t row) { return packed.data[index * packed.stride + row]; }

// The tile's column that is the target of a row; -1 if it lies elsewhere.
inline int64_t target_column(const Targets& targets, int64_t row, int64_t columns) {
  if (targets.data == nullptr) return -1;
  const int64_t target = targets.data[row];
  if (target < targets.first) return -1;
  // unsigned, as the difference of two signed integers may overflow
  const std::uint64_t column = static_cast<std::uint64_t>(target) - static_cast<std::uint64_t>(targets.first);
  return column < static_cast<std::uint64_t>(columns) ? static_cast<int64_t>(column) : -1;
}

// Distances of logits from `top`, at least kLeast, where exponentials are 0 already.
inline Vec below(Vec z, float top) { return max(all(kLeast), z - top); }

inline float largest(const float* z, int64_t columns) {
  Vec top = all(-INFINITY);
  each_vector(columns, [&](int64_t j, int n) { top = max(load(z + j, n, -INFINITY), top); });
  return largest(top);
}

// What distances are measured from: the largest logit, or where all words are masked a number far above theirs.
inline float base_of(float top) { return fmaxf(top, 0.1f * kFloor); }

// Logits; of masked words finite ones that have no weight.
inline Vec load_finite(const float* z, int count) { return max(all(kFloor), load(z, count, kFloor)); }

SoftmaxStats stats_of(const float* z, int64_t columns) {
  const float top = largest(z, columns), base = base_of(top);
  Vec total{}, weighted_sum{};
  each_vector(columns, [&](int64_t j, int n) {
    const Vec shifted = below(load(z + j, n, kOut), base), weight = exp_down(shifted);
    total += weight;
    weighted_sum += weight * shifted;
  });
  return {top, sum(total), sum(weighted_sum)};
}

// Statistics of both views of a block: the first pass makes the weights and the mean gap, the second the excess about
// it. Only with kRare is the result right for blocks with masked words, with a gap whose exponential overflows, or with
// maxima far apart. Without, the first two show in a mean gap that is not finite or beyond kMostGap.
template <bool kRare>
PairStats pair_stats_of(const float* z_p, const float* z_q, int64_t columns, float top_p, float top_q) {
  alignas(64) float weights_p[kBlock], weights_q[kBlock];
  const float base_p = kRare ? base_of(top_p) : top_p, base_q = kRare ? base_of(top_q) : top_q;
  const float between = base_p - base_q;
  const bool apart = fabsf(between) > kApart;
  const auto at = [](const float* z, int n) { return kRare ? load_finite(z, n) : load(z, n, kOut); };
  const auto gap_of = [&](Vec p, Vec q) {
    return kRare && apart ? (p - base_p) - (q - base_q) : (p - q) - between;
  };
  Vec total_p{}, weighted_sum_p{}, total_q{}, weighted_sum_q{}, gaps{};
  each_vector(columns, [&](int64_t j, int n) {
    const Vec p = at(z_p + j, n), q = at(z_q + j, n);
    const Vec shifted_p = below(p, base_p), weight_p = exp_down(shifted_p);
    const Vec shifted_q = below(q, base_q), weight_q = exp_down(shifted_q);
    store(weights_p + j, weight_p, n);
    store(weights_q + j, weight_q, n);
    total_p += weight_p;
    weighted_sum_p += weight_p * shifted_p;
    total_q += weight_q;
    weighted_sum_q += weight_q * shifted_q;
    gaps += weight_p * gap_of(p, q);
    if (kRare) {  // words that q alone masks
      const Int hidden = (load(z_q + j, n, -INFINITY) == -INFINITY) & (load(z_p + j, n, -INFINITY) != -INFINITY);
      gaps = hidden ? all(INFINITY) : gaps;
    }
  });
  const SoftmaxStats p{top_p, sum(total_p), sum(weighted_sum_p)}, q{top_q, sum(total_q), sum(weighted_sum_q)};
  const float mean_diff = kRare && !(p.sum > 0.0f) ? 0.0f : sum(gaps) / p.sum;
  // sum of w_p phi(d), d below the mean gap; unless d is near 0, w_p exp(d) = w_q exp(mean_diff) saves an exponential
  const float lift = expf(mean_diff);
  Vec excess{};
  each_vector(columns, [&](int64_t j, int n) {
    const Vec q = at(z_q + j, n), d = mean_diff - gap_of(at(z_p + j, n), q);
    const Vec weight_p = load(weights_p + j, n, 0.0f), weight_q = load(weights_q + j, n, 0.0f);
    const Vec lifted = kRare ? exp((q - base_q) + mean_diff) : weight_q * lift;
    excess += abs(d) < 0.5f ? weight_p * phi_near(d) : lifted - weight_p * (d + 1.0f);
  });
  return {p, q, mean_diff, sum(excess)};
}

PairStats pair_stats_of(const float* z_p, const float* z_q, int64_t columns) {
  const float top_p = largest(z_p, columns), top_q = largest(z_q, columns);
  if (fabsf(top_p - top_q) <= kApart) {
    const PairStats pair = pair_stats_of<false>(z_p, z_q, columns, top_p, top_q);
    if (fabsf(pair.mean_diff) < kMostGap) return pair;
  }
  return pair_stats_of<true>(z_p, z_q, columns, top_p, top_q);
}

// `first` is where the view begins: kP or kQ.
SoftmaxStats load_stats(const Fields& packed, int first, int64_t row) {
  return {field(packed, first + kMax, row), field(packed, first + kSum, row), field(packed, first + kWeightedSum, row)};
}

void store_stats(const Fields& packed, int first, int64_t row, const SoftmaxStats& stats) {
  field(packed, first + kMax, row) = stats.max;
  field(packed, first + kSum, row) = stats.sum;
  field(packed, first + kWeightedSum, row) = stats.weighted_sum;
}

// Calls `body(start, count)` for every block of a row.
template <typename Body>
void each_block(int64_t columns, const Body& body) {
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t rest = columns - start;
    body(start, rest < kBlock ? rest : kBlock);
  }
}

void fold(Tile tile, Targets targets, Fields stats, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* const z = row_of(tile, 0, row);
    SoftmaxStats total = load_stats(stats, kP, row);
    each_block(tile.columns, [&](int64_t start, int64_t count) { total = merge(total, stats_of(z + start, count)); });
    store_stats(stats, kP, row, total);
    const int64_t target = target_column(targets, row, tile.columns);
    if (target >= 0) field(stats, kTarget, row) = z[target];
  }
}

void fold_pair(Tile tile, Targets targets, Fields stats, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float *const z_p = row_of(tile, 0, row), *const z_q = row_of(tile, 1, row);
    PairStats total{load_stats(stats, kP, row), load_stats(stats, kQ, row), field(stats, kMeanDiff, row),
                    field(stats, kExcess, row)};
    each_block(tile.columns, [&](int64_t start, int64_t count) {
      total = merge(total, pair_stats_of(z_p + start, z_q + start, count));
    });
    store_stats(stats, kP, row, total.p);
    store_stats(stats, kQ, row, total.q);
    field(stats, kMeanDiff, row) = total.mean_diff;
    field(stats, kExcess, row) = total.excess;
    const int64_t target = target_column(targets, row, tile.columns);
    if (target >= 0) {
      field(stats, kP + kTarget, row) = z_p[target];
      field(stats, kQ + kTarget, row) = z_q[target];
    }
  }
}

// One view of a row over the whole vocabulary; `first` is where it begins: kP or kQ.
struct Softmax {
  float max, log_sum, entropy;

  Softmax(const Fields& packed, int first, int64_t row)
      : max(field(packed, first + kMax, row)), log_sum(field(packed, first + kLogSum, row)),
        entropy(field(packed, first + kEntropy, row)) {}

  // Where a logit lies so low that its probability is 0, its log-probability is kLeast.
  Vec log_probability(Vec z) const { return vppo::max(all(kLeast), (z - max) - log_sum); }
};

// Both views of a row over the whole vocabulary.
struct Pair {
  Softmax p, q;
  float between, mean_diff, kl;
  bool apart;

  Pair(const Fields& packed, int64_t row)
      : p(packed, kP, row), q(packed, kQ, row), between(p.max - q.max), mean_diff(field(packed, kMeanDiff, row)),
        kl(field(packed, kKl, row)), apart(fabsf(between) > kApart) {}

  // `log(p / q) - KL(p || q)`: how far the gap of each logit is from the mean gap.
  Vec centred_gap(Vec z_p, Vec z_q) const {
    return (apart ? (z_p - p.max) - (z_q - q.max) : (z_p - z_q) - between) - mean_diff;
  }

  // `log(p / q)`, from the gap about the mean gap where that has more digits.
  Vec log_ratio(Vec centred, Vec log_p, Vec log_q) const { return kl > kApart ? log_p - log_q : centred + kl; }
};

template <bool kHalf>
void fold_jsd_rows(Tile tile, Fields pair, Mixture mixture, Fields jsd_terms, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float *const z_p = row_of(tile, 0, row), *const z_q = row_of(tile, 1, row);
    const Pair both(pair, row);
    Vec term_p{}, term_q{};
    each_vector(tile.columns, [&](int64_t j, int n) {
      const Vec p = load_finite(z_p + j, n), q = load_finite(z_q + j, n);
      const Vec log_p = both.p.log_probability(p), log_q = both.q.log_probability(q);
      Vec of_p, of_q;
      log_shares<kHalf>(both.log_ratio(both.centred_gap(p, q), log_p, log_q), mixture, of_p, of_q);
      term_p += exp_down(log_p) * of_p;
      term_q += exp_down(log_q) * of_q;
    });
    field(jsd_terms, kJsdP, row) += sum(term_p);
    field(jsd_terms, kJsdQ, row) += sum(term_q);
  }
}

void fold_jsd(Tile tile, Fields pair, Mixture mixture, Fields jsd_terms, int64_t begin, int64_t end) {
  const auto rows = mixture.of_p == mixture.of_q ? fold_jsd_rows<true> : fold_jsd_rows<false>;
  rows(tile, pair, mixture, jsd_terms, begin, end);
}

inline Vec times_slope(Vec gradient, Vec z, const Slope& slope) {
  if (slope.to_cap == 0.0f) return gradient * slope.scale;  // 0 times an infinite z would be NaN
  const Vec share = z * slope.to_cap;
  return gradient * (slope.scale - slope.scale * share * share);
}

// The target's own term of a log-probability's gradient. It needs the logit, so call it before that is overwritten.
inline float at_target(const float* z, int64_t target, float gradient, const Slope& slope) {
  return target < 0 ? 0.0f : times_slope(all(gradient), all(z[target]), slope)[0];
}

void gradient(Tile tile, Fields softmax, Targets targets, Fields grads, Slope slope, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float* const z = row_of(tile, 0, row);
    const Softmax p(softmax, kP, row);
    const float of_logprob = field(grads, kGradLogprob, row), of_entropy = field(grads, kGradEntropy, row);
    const int64_t target = target_column(targets, row, tile.columns);
    const float more = at_target(z, target, of_logprob, slope);
    each_vector(tile.columns, [&](int64_t j, int n) {
      const Vec at = load(z + j, n, kOut), log_p = p.log_probability(at);
      const Vec factor = -of_entropy * (log_p + p.entropy) - of_logprob;
      store(z + j, times_slope(exp_down(log_p) * factor, at, slope), n);
    });
    if (target >= 0) z[target] += more;
  }
}

template <bool kJsd, bool kHalf>
void gradient_rows(Tile tile, Fields pair, Fields jsd_terms, Mixture mixture, Targets targets, Fields grads,
                   Slopes slopes, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float *const z_p = row_of(tile, 0, row), *const z_q = row_of(tile, 1, row);
    const Pair both(pair, row);
    const float of_divergence = field(grads, kGradDivergence, row);
    const float of_entropy_p = field(grads, kGradEntropyP, row), of_entropy_q = field(grads, kGradEntropyQ, row);
    const float of_logprob_p = targets.data == nullptr ? 0.0f : field(grads, kGradLogprobP, row);
    const float of_logprob_q = targets.data == nullptr ? 0.0f : field(grads, kGradLogprobQ, row);
    const float term_p = kJsd ? field(jsd_terms, kJsdP, row) : 0.0f;
    const float term_q = kJsd ? field(jsd_terms, kJsdQ, row) : 0.0f;
    const float share_p = kHalf ? 0.5f : mixture.of_p, share_q = kHalf ? 0.5f : mixture.of_q;
    const int64_t target = target_column(targets, row, tile.columns);
    const float more_p = at_target(z_p, target, of_logprob_p, slopes.p);
    const float more_q = at_target(z_q, target, of_logprob_q, slopes.q);
    each_vector(tile.columns, [&](int64_t j, int n) {
      const Vec at_p = load_finite(z_p + j, n), at_q = load_finite(z_q + j, n);
      const Vec log_p = both.p.log_probability(at_p), log_q = both.q.log_probability(at_q);
      const Vec centred = both.centred_gap(at_p, at_q);
      const Vec p = exp_down(log_p), q = exp_down(log_q), d = both.log_ratio(centred, log_p, log_q);
      Vec factor_p = -of_entropy_p * (log_p + both.p.entropy) - of_logprob_p;
      Vec grad_q = q * (-of_entropy_q * (log_q + both.q.entropy) - of_logprob_q);
      if (kJsd) {
        Vec of_p, of_q;
        log_shares<kHalf>(d, mixture, of_p, of_q);
        factor_p += share_p * of_divergence * (of_p - term_p);
        grad_q += share_q * of_divergence * q * (of_q - term_q);
      } else {
        factor_p += of_divergence * centred;
        // q - p, near 0 as -q (exp(d) - 1): the difference would lose the digits of a small gap
        grad_q += of_divergence * (abs(d) < 0.5f ? -q * (d + phi_near(d)) : q - p);
      }
      store(z_p + j, times_slope(p * factor_p, at_p, slopes.p), n);
      store(z_q + j, times_slope(grad_q, at_q, slopes.q), n);
    });
    if (target >= 0) {
      z_p[target] += more_p;
      z_q[target] += more_q;
    }
  }
}

void gradient_pair(Tile tile, Fields pair, Fields jsd_terms, Mixture mixture, Targets targets, Fields grads,
                   Slopes slopes, int64_t begin, int64_t end) {
  const auto rows = jsd_terms.data == nullptr        ? gradient_rows<false, false>
                    : mixture.of_p == mixture.of_q ? gradient_rows<true, true>
                                                   : gradient_rows<true, false>;
  rows(tile, pair, jsd_terms, mixture, targets, grads, slopes, begin, end);
}

}  // namespace
}  // namespace vppo
