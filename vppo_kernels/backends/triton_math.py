"""The statistics of `vppo_kernels.statistics` inside a kernel: folding a block of logits, merging two parts.

`z` is a `[rows, columns]` block of logits, -inf outside as where a word is masked; statistics are `[rows]` vectors.
Formulas and their reasons are those of `statistics.py` and `backends/torch.py`. Only what hardware
exponentials lack is added: `phi`, `expm1` and `log_share` that keep their digits near 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vppo_kernels import statistics

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
APART: tl.constexpr = tl.constexpr(4.0)
FLOOR: tl.constexpr = tl.constexpr(-1.0e30)  # -EXP_FLOOR
TRACE: tl.constexpr = tl.constexpr(1.0e-20)  # a weight too small to count, but not in a word that one view alone masks
NEAR: tl.constexpr = tl.constexpr(20.0)  # a maximum that lies this far above the known one costs an entropy no digits

# The fields of packed statistics; see `statistics.py`.
MAX, SUM, WEIGHTED_SUM, TARGET = (tl.constexpr(i) for i in range(4))
LOG_SUM, ENTROPY = tl.constexpr(statistics.LOG_SUM), tl.constexpr(statistics.ENTROPY)
P, Q, SOFTMAX_FIELDS = tl.constexpr(statistics.P), tl.constexpr(statistics.Q), tl.constexpr(statistics.SOFTMAX_FIELDS)
MEAN_DIFF, EXCESS, KL = (tl.constexpr(i) for i in (statistics.MEAN_DIFF, statistics.EXCESS, statistics.KL))
PAIR_FIELDS = tl.constexpr(statistics.PAIR_FIELDS)
JSD_P, JSD_Q = tl.constexpr(statistics.JSD_P), tl.constexpr(statistics.JSD_Q)
GRAD_LOGPROB, GRAD_ENTROPY = (tl.constexpr(i) for i in range(2))
GRAD_DIVERGENCE, GRAD_ENTROPY_P, GRAD_ENTROPY_Q, GRAD_LOGPROB_P, GRAD_LOGPROB_Q = (tl.constexpr(i) for i in range(5))


@triton.jit
def _phi_near(x):
    """`exp(x) - 1 - x` as a series, for |x| < 0.5, where the difference would lose its digits (error 1e-9 of it)."""
    series = 1 / 720 + x * (1 / 5040 + x * (1 / 40320 + x * (1 / 362880)))
    return x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * series))))


@triton.jit
def phi(x):
    """`exp(x) - 1 - x`"""
    return tl.where(tl.abs(x) < 0.5, _phi_near(x), tl.exp(x) - 1 - x)


@triton.jit
def expm1(x):
    """`exp(x) - 1`"""
    return tl.where(tl.abs(x) < 0.5, x + _phi_near(x), tl.exp(x) - 1)


@triton.jit
def log_share(d):
    """`log(p / m)` for `d = log(p / q)` and `m = (p + q) / 2`: `d / 2 - log cosh(d / 2)`."""
    s = 0.25 * d * d
    log_cosh = s * (0.5 + s * (-1 / 12 + s * (1 / 45 + s * (-17 / 2520 + s * (31 / 14175)))))
    return tl.where(tl.abs(d) < 0.5, 0.5 * d - log_cosh, tl.minimum(d, 0.0) + LN_2 - tl.log(1 + tl.exp(-tl.abs(d))))


@triton.jit
def log1p(u):
    """`log(1 + u)` for -0.5 <= u <= 1: twice the inverse hyperbolic tangent of u / (2 + u)."""
    s = u / (u + 2)
    t = s * s
    return 2 * s * (1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13)))))))


@triton.jit
def log_share_of(d, own, other, log_own, log_other):
    """The same for `m = own p + other q`: near 0 from the gap, elsewhere from logarithms, as exp(-d) could overflow."""
    from_q = log_other - d
    far = tl.maximum(log_own, from_q) + tl.log(1 + tl.exp(-tl.abs(log_own - from_q)))
    return -tl.where(tl.abs(d) < 0.5, log1p(other * expm1(tl.maximum(tl.minimum(-d, 0.5), -0.5))), far)


@triton.jit
def log_shares(d, beta, log_beta, log_rest, HALF: tl.constexpr):
    """`log(p / m)` and `log(q / m)` for `m = (1 - beta) p + beta q`; half the arithmetic where HALF, beta 0.5."""
    if HALF:
        return log_share(d), log_share(-d)
    else:
        of_p = log_share_of(d, 1 - beta, beta, log_rest, log_beta)
        return of_p, log_share_of(-d, beta, 1 - beta, log_beta, log_rest)


@triton.jit
def finite(z):
    """A logit; of a masked word one so low that it has no weight."""
    return tl.where(z < FLOOR, FLOOR, z)


@triton.jit
def base_of(top):
    """What distances are measured from: the largest logit, or where all words are masked a number far above theirs."""
    return tl.where(top < 0.1 * FLOOR, 0.1 * FLOOR, top)


@triton.jit
def fold_block(z):
    """One view, made finite: (max, sum, weighted_sum), and of each column its weight and its distance from the max."""
    top = tl.max(z, 1)
    shifted = z - base_of(top)[:, None]
    weights = tl.exp(shifted)
    top = tl.where(top == FLOOR, float("-inf"), top)
    return top, tl.sum(weights, 1), tl.sum(weights * shifted, 1), weights, shifted


@triton.jit
def gap_of(z_p, z_q, max_p, max_q):
    """`(z_p - m_p) - (z_q - m_q)`, in the order that loses least."""
    between = max_p - max_q
    return tl.where(tl.abs(between) > APART, (z_p - max_p) - (z_q - max_q), (z_p - z_q) - between)


@triton.jit
def fold_block_pair(z_p, z_q):
    """Two views: (max, sum, weighted_sum) of p and of q, mean_diff, excess."""
    z_p, z_q = finite(z_p), finite(z_q)
    max_p, sum_p, weighted_sum_p, weights, _ = fold_block(z_p)
    max_q, sum_q, weighted_sum_q, _, shifted_q = fold_block(z_q)
    x = gap_of(z_p, z_q, base_of(max_p)[:, None], base_of(max_q)[:, None])
    hidden = (z_q == FLOOR) & (z_p != FLOOR)  # words that the second view alone masks
    gaps = tl.where(hidden, float("inf"), weights * x)
    mean_diff = tl.where(sum_p > 0, tl.sum(gaps, 1) / sum_p, 0.0)
    d = mean_diff[:, None] - x
    near = weights * phi(tl.minimum(d, 1.0))
    far = tl.exp(shifted_q + mean_diff[:, None]) - weights * (1 + d)  # exp(d) alone could overflow
    excess = tl.sum(tl.where(d < 1.0, near, far), 1)
    return max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess


# In one pass: weights about the maxima known so far, gaps about the mean gap known so far. Each lane keeps sums of its
# own, and nothing is reduced before the last column. Where a maximum turns out to lie far above the known one, or the
# mean so far from the known one that the excess about it is lost, the columns are folded again, block by block.


@triton.jit
def load_logits(z_ptr, inside, MASKED: tl.constexpr):
    """Logits, made finite; a NaN stays one."""
    z = tl.load(z_ptr, mask=inside, other=float("-inf")) if MASKED else tl.load(z_ptr)
    return tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_block(z, about, tops, sums, weighted_sums):
    """Each lane's maximum, sum of weights and of weighted distances, with one more block."""
    shifted = z - about[:, None]
    weights = tl.exp(shifted)
    return tl.maximum(tops, z), sums + weights, weighted_sums + weights * shifted


@triton.jit
def add_block_pair(
    z_p, z_q, about_p, about_q, between, growth,
    tops_p, sums_p, weighted_sums_p, tops_q, sums_q, weighted_sums_q, gaps, phis,
):  # fmt: skip
    """The same for two views, and `sum w d` and `sum w phi(d)`: `d` is the known mean gap less a word's."""
    shifted_p, shifted_q = z_p - about_p[:, None], z_q - about_q[:, None]
    p, q = tl.exp(shifted_p), tl.exp(shifted_q)
    d = between[:, None] - (z_p - z_q)
    weighted = p * d
    series = 1 / 24 + d * (1 / 120 + d * (1 / 720 + d * (1 / 5040 + d * (1 / 40320))))
    near = weighted * d * (0.5 + d * (1 / 6 + d * series))
    far = q * growth[:, None] - p - weighted  # p exp(d) is q exp(mean gap)
    return (
        tl.maximum(tops_p, z_p), sums_p + p, weighted_sums_p + p * shifted_p,
        tl.maximum(tops_q, z_q), sums_q + q, weighted_sums_q + q * shifted_q,
        gaps + (weighted + TRACE * d), phis + tl.where(tl.abs(d) < 0.5, near, far),
    )  # fmt: skip


@triton.jit
def joined(top, about, total, weighted_sum, tops, sums, weighted_sums):
    """Statistics of what was known, about its maximum, and of all lanes, about the new one."""
    found = tl.max(tops, 1)
    found = tl.maximum(top, tl.where(found == FLOOR, float("-inf"), found))
    total, weighted_sum = total + tl.sum(sums, 1), weighted_sum + tl.sum(weighted_sums, 1)
    down = distance(about, found)
    scale = tl.exp(down)
    return found, scale * total, scale * (weighted_sum + down * total)


@triton.jit
def joined_pair(
    max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess, known, about_p, about_q, centre,
    tops_p, sums_p, weighted_sums_p, tops_q, sums_q, weighted_sums_q, gaps, phis,
):  # fmt: skip
    """The same for two views, and whether they are as good as those of blocks."""
    found_p, total_p, weighted_sum_p = joined(max_p, about_p, sum_p, weighted_sum_p, tops_p, sums_p, weighted_sums_p)
    found_q, total_q, weighted_sum_q = joined(max_q, about_q, sum_q, weighted_sum_q, tops_q, sums_q, weighted_sums_q)
    total, phi_sum = sum_p + tl.sum(sums_p, 1), tl.sum(phis, 1)
    off = centre - mean_diff  # what is known, about the centre
    before = excess * tl.exp(off) + phi(off) * sum_p
    move = (tl.sum(gaps, 1) + off * sum_p) / total  # from the new mean gap to the centre
    moved = (before + phi_sum - phi(move) * total) * tl.exp(-move)
    moved = tl.where(moved > 0, moved, 0.0)
    # what the difference may have lost, some of the last bits of its terms, has to be small beside the bound
    lost = tl.maximum(phi_sum, phi(move) * total) * tl.exp(-move)
    close = lost <= 4 * moved + 1.2 * tl.sqrt(moved * total) + 0.004 * total
    close &= known & (found_p - about_p <= NEAR) & (found_q - about_q <= NEAR) & (tl.abs(move) <= NEAR)
    down_p, down_q = distance(about_p, found_p), distance(about_q, found_q)
    mean_diff = (centre - move) + (down_p - down_q)
    return found_p, total_p, weighted_sum_p, found_q, total_q, weighted_sum_q, mean_diff, tl.exp(down_p) * moved, close


@triton.jit
def distance(part, whole):
    """`part - whole <= 0`, finite also where one or both are -inf."""
    return tl.maximum(tl.where(part == whole, 0.0, part - whole), FLOOR)


@triton.jit
def merge(max_a, sum_a, weighted_sum_a, max_b, sum_b, weighted_sum_b):
    """Statistics of the union of two disjoint parts, one view."""
    top = tl.maximum(max_a, max_b)
    down_a, down_b = distance(max_a, top), distance(max_b, top)
    scale_a, scale_b = tl.exp(down_a), tl.exp(down_b)
    total = scale_a * sum_a + scale_b * sum_b
    weighted_sum = scale_a * (weighted_sum_a + down_a * sum_a) + scale_b * (weighted_sum_b + down_b * sum_b)
    return top, total, weighted_sum


@triton.jit
def move_excess(excess, weight, d, down, both):
    """A part's excess about a mean gap that is higher by `d` and a maximum higher by `-down`; `both` is `down + d`."""
    near = tl.exp(down) * phi(tl.minimum(d, 1.0))
    far = tl.exp(both) - tl.exp(down) * (1 + d)
    return tl.exp(both) * excess + tl.where(d < 1.0, near, far) * weight


@triton.jit
def merge_pair(
    max_p_a, sum_p_a, weighted_sum_p_a, max_q_a, sum_q_a, weighted_sum_q_a, mean_diff_a, excess_a,
    max_p_b, sum_p_b, weighted_sum_p_b, max_q_b, sum_q_b, weighted_sum_q_b, mean_diff_b, excess_b,
):  # fmt: skip
    """Statistics of the union of two disjoint parts, two views."""
    max_p, sum_p, weighted_sum_p = merge(max_p_a, sum_p_a, weighted_sum_p_a, max_p_b, sum_p_b, weighted_sum_p_b)
    max_q, sum_q, weighted_sum_q = merge(max_q_a, sum_q_a, weighted_sum_q_a, max_q_b, sum_q_b, weighted_sum_q_b)
    down_a, down_b = distance(max_p_a, max_p), distance(max_p_b, max_p)
    lower_a, lower_b = distance(max_q_a, max_q), distance(max_q_b, max_q)
    mean_a, mean_b = mean_diff_a + (down_a - lower_a), mean_diff_b + (down_b - lower_b)
    weight_a, weight_b = tl.exp(down_a) * sum_p_a, tl.exp(down_b) * sum_p_b
    total = tl.maximum(sum_p, 1.0e-37)
    mean_diff = tl.where(
        weight_a > weight_b,
        mean_a + weight_b / total * (mean_b - mean_a),
        mean_b + weight_a / total * (mean_a - mean_b),
    )
    mean_diff = tl.where(sum_p > 0, mean_diff, 0.0)
    mean_diff = tl.where((mean_diff_a == float("inf")) | (mean_diff_b == float("inf")), float("inf"), mean_diff)
    excess = move_excess(excess_a, sum_p_a, mean_diff - mean_a, down_a, lower_a + (mean_diff - mean_diff_a))
    excess += move_excess(excess_b, sum_p_b, mean_diff - mean_b, down_b, lower_b + (mean_diff - mean_diff_b))
    return max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess


@triton.jit
def load_stats(packed, stride, there):
    """(max, sum, weighted_sum) of one view from packed statistics, whose fields lie `stride` apart."""
    max_ = tl.load(packed + MAX * stride, mask=there, other=0.0)
    sum_ = tl.load(packed + SUM * stride, mask=there, other=0.0)
    return max_, sum_, tl.load(packed + WEIGHTED_SUM * stride, mask=there, other=0.0)


@triton.jit
def load_pair_stats(packed, stride, there):
    """What `merge_pair` takes of one part."""
    max_p, sum_p, weighted_sum_p = load_stats(packed + P * stride, stride, there)
    max_q, sum_q, weighted_sum_q = load_stats(packed + Q * stride, stride, there)
    mean_diff = tl.load(packed + MEAN_DIFF * stride, mask=there, other=0.0)
    excess = tl.load(packed + EXCESS * stride, mask=there, other=0.0)
    return max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess


@triton.jit
def store_stats(packed, stride, there, max_, sum_, weighted_sum):
    tl.store(packed + MAX * stride, max_, mask=there)
    tl.store(packed + SUM * stride, sum_, mask=there)
    tl.store(packed + WEIGHTED_SUM * stride, weighted_sum, mask=there)


@triton.jit
def store_pair_stats(
    packed, stride, there, max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess
):  # fmt: skip
    store_stats(packed + P * stride, stride, there, max_p, sum_p, weighted_sum_p)
    store_stats(packed + Q * stride, stride, there, max_q, sum_q, weighted_sum_q)
    tl.store(packed + MEAN_DIFF * stride, mean_diff, mask=there)
    tl.store(packed + EXCESS * stride, excess, mask=there)
