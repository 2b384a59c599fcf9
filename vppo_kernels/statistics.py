"""The online statistics of a softmax, and the three verbs that every sweep over the vocabulary uses.

A backend *folds* one tile of logits into a handful of numbers per row; `merge` joins the numbers of two disjoint parts
of the vocabulary; `finish` turns the numbers of the whole vocabulary into log-probabilities, entropies and divergences.
Vocabulary tiles, split partials of a fused kernel and tensor-parallel ranks are all "parts" in this sense.

How the divergence keeps its digits. With `g = z_p - z_q` and any constant `c`,

    KL(p || q) = E_p[g - c] + log E_p[exp(-(g - c))],

and for `c = E_p[g]` the first term vanishes: `KL = log1p(E_p[phi(c - g)])` with `phi(x) = exp(x) - 1 - x >= 0`. Every
term of that sum is non-negative, so nothing cancels however small the divergence is, and it cannot turn negative. A
part therefore carries its own mean gap and its excess `sum w phi(c - g)` about that mean; merging two parts moves both
to the common mean (the step by which Chan's formula merges two variances).

A logit of -inf is a masked word: it has no weight and no part in any sum, so a part that is masked whole is the empty
part. A word that only the second view masks makes the divergence infinite, however little probability it has; its gap
of +inf is the part's mean, and stays in every merge. A row without any word has no distribution: its results are NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# stands for an infinite distance: exp(-EXP_FLOOR) and 0 * EXP_FLOOR are 0, and no two logits lie further apart
EXP_FLOOR = 1.0e30

# How far apart the maxima of two views may lie before the order of subtractions changes. Up to here `z_p - z_q` comes
# first, which is exact between similar views. Beyond, that difference would be rounded by more than similar views
# differ, so each logit is measured from its own view's maximum first. For the same reason `log(p / q)` is made from the
# gap where the divergence is at most this, and is the difference of the two logarithms where it is larger.
APART = 4.0


class LogprobOutput(NamedTuple):
    """Per-row results of one view; both `[...]` fp32, in nats."""

    logprobs: Tensor
    entropy: Tensor


class DivergenceOutput(NamedTuple):
    """Per-row results of two views; all `[...]` fp32, in nats. The log-probabilities are None without targets."""

    divergence: Tensor
    entropy: Tensor
    entropy_perturbed: Tensor
    logprobs: Tensor | None
    logprobs_perturbed: Tensor | None


class SoftmaxStats(NamedTuple):
    """One view over one part of the vocabulary; every field is `[rows]`.

    Attributes:
        max: Largest logit `m`.
        sum: `sum exp(z - m)`.
        weighted_sum: `sum exp(z - m) (z - m)`.
        target: Logit of the target if it lies in this part, else -inf.
    """

    max: Tensor
    sum: Tensor
    weighted_sum: Tensor
    target: Tensor


class PairStats(NamedTuple):
    """Two views `p`, `q` over one part of the vocabulary; `mean_diff` and `excess` are `[rows]`.

    Attributes:
        p: Statistics of the first view.
        q: Statistics of the second view.
        mean_diff: Mean of the gaps `g = (z_p - m_p) - (z_q - m_q)` under this part's share of `p`. Gaps are measured
            from the maxima, because a mean of the size of the logits would be rounded by more than a small divergence.
            +inf where q alone masks a word, 0 where p masks all.
        excess: `sum exp(z_p - m_p) phi(mean_diff - g)`, `phi(x) = exp(x) - 1 - x`.
    """

    p: SoftmaxStats
    q: SoftmaxStats
    mean_diff: Tensor
    excess: Tensor


class Softmax(NamedTuple):
    """One view over the whole vocabulary, each `[rows]`: what a backward needs besides the logits themselves.

    The normaliser is kept as two numbers, as their sum `max + log_sum` would lose digits where logits are large.
    Without targets `logprobs` is -inf.
    """

    max: Tensor
    log_sum: Tensor
    entropy: Tensor
    logprobs: Tensor


class Pair(NamedTuple):
    """Two views over the whole vocabulary: `mean_diff = E_p[(z_p - m_p) - (z_q - m_q)]`, `kl = KL(p || q)`, `[rows]`.

    `log(p / q)` of a word is its gap, minus `mean_diff`, plus `kl`. Where `kl` is infinite, `mean_diff` is 0, as there
    is no mean.
    """

    p: Softmax
    q: Softmax
    mean_diff: Tensor
    kl: Tensor


# Between sweep, kernels and ranks statistics travel packed, as `[fields, rows]`. `csrc/types.h` has the same names.
MAX, SUM, WEIGHTED_SUM, TARGET = range(4)  # the fields of SoftmaxStats
LOG_SUM, ENTROPY, LOGPROB = 1, 2, 3  # those of Softmax, whose first is MAX too
SOFTMAX_FIELDS = 4
P, Q = 0, SOFTMAX_FIELDS  # where the fields of p and of q begin among those of two views
MEAN_DIFF = 2 * SOFTMAX_FIELDS  # what follows them,
EXCESS = KL = MEAN_DIFF + 1  # and the last one: a PairStats has its excess there, a Pair its divergence
PAIR_FIELDS = MEAN_DIFF + 2

# The two terms of a Jensen-Shannon divergence, `KL(p || m)` and `KL(q || m)`, are packed in the same way.
JSD_P, JSD_Q, JSD_FIELDS = 0, 1, 2
# So are the upstream gradients: of one view's outputs, and of two views'. Without targets the last two are missing.
GRAD_LOGPROB, GRAD_ENTROPY = range(2)
GRAD_DIVERGENCE, GRAD_ENTROPY_P, GRAD_ENTROPY_Q, GRAD_LOGPROB_P, GRAD_LOGPROB_Q = range(5)


def pack(stats: SoftmaxStats | PairStats | Softmax | Pair) -> Tensor:
    """Statistics as one tensor: `[4, rows]` for one view, `[10, rows]` for two (p, q, mean_diff, excess or kl)."""
    if isinstance(stats, SoftmaxStats | Softmax):
        return torch.stack(stats)
    return torch.stack([*stats.p, *stats.q, *stats[2:]])


def unpack_stats(packed: Tensor) -> SoftmaxStats:
    """`[4, rows]` to `SoftmaxStats`."""
    return SoftmaxStats(*packed)


def unpack_pair_stats(packed: Tensor) -> PairStats:
    """`[10, rows]` to `PairStats`."""
    return PairStats(SoftmaxStats(*packed[P:Q]), SoftmaxStats(*packed[Q:MEAN_DIFF]), packed[MEAN_DIFF], packed[EXCESS])


def unpack_softmax(packed: Tensor) -> Softmax:
    """`[4, rows]` to `Softmax`."""
    return Softmax(*packed)


def unpack_pair(packed: Tensor) -> Pair:
    """`[10, rows]` to `Pair`."""
    return Pair(Softmax(*packed[P:Q]), Softmax(*packed[Q:MEAN_DIFF]), packed[MEAN_DIFF], packed[KL])


def nothing(views: int, rows: int, like: Tensor) -> Tensor:
    """Packed statistics of an empty part of the vocabulary, the neutral element of merging."""
    packed = like.new_zeros(SOFTMAX_FIELDS if views == 1 else PAIR_FIELDS, rows)
    for first in (P, Q)[:views]:
        packed[first + MAX] = packed[first + TARGET] = -torch.inf
    return packed


def _distance(part: Tensor, whole: Tensor) -> Tensor:
    """`part - whole <= 0`, finite also where one or both are -inf."""
    return torch.where(part == whole, 0.0, part - whole).clamp_min(-EXP_FLOOR)


def merge(a: SoftmaxStats, b: SoftmaxStats) -> SoftmaxStats:
    """Statistics of the union of two disjoint parts of the vocabulary."""
    top = torch.maximum(a.max, b.max)
    down_a, down_b = _distance(a.max, top), _distance(b.max, top)
    scale_a, scale_b = down_a.exp(), down_b.exp()
    return SoftmaxStats(
        top,
        scale_a * a.sum + scale_b * b.sum,
        scale_a * (a.weighted_sum + down_a * a.sum) + scale_b * (b.weighted_sum + down_b * b.sum),
        torch.maximum(a.target, b.target),
    )


def merge_pair(a: PairStats, b: PairStats) -> PairStats:
    """Statistics of the union of two disjoint parts of the vocabulary, two views."""
    p, q = merge(a.p, b.p), merge(a.q, b.q)
    down_a, down_b = _distance(a.p.max, p.max), _distance(b.p.max, p.max)
    lower_a, lower_b = _distance(a.q.max, q.max), _distance(b.q.max, q.max)
    mean_diff_a, mean_diff_b = a.mean_diff + (down_a - lower_a), b.mean_diff + (down_b - lower_b)
    weight_a, weight_b = down_a.exp() * a.p.sum, down_b.exp() * b.p.sum
    total = p.sum.clamp_min(torch.finfo(p.sum.dtype).tiny)
    # starting from the heavier part: a huge gap in a part with hardly any weight must not swallow its digits
    mean_diff = torch.where(
        weight_a > weight_b,
        mean_diff_a + weight_b / total * (mean_diff_b - mean_diff_a),
        mean_diff_b + weight_a / total * (mean_diff_a - mean_diff_b),
    )
    mean_diff = torch.where(p.sum > 0, mean_diff, 0.0)
    mean_diff = torch.where((a.mean_diff == torch.inf) | (b.mean_diff == torch.inf), torch.inf, mean_diff)
    excess_a = _move_excess(a, mean_diff - mean_diff_a, down_a, lower_a + (mean_diff - a.mean_diff))
    excess_b = _move_excess(b, mean_diff - mean_diff_b, down_b, lower_b + (mean_diff - b.mean_diff))
    return PairStats(p, q, mean_diff, excess_a + excess_b)


def _move_excess(part: PairStats, d: Tensor, down: Tensor, both: Tensor) -> Tensor:
    """The part's excess about a mean gap that is higher by `d` and a maximum that is higher by `-down`.

    `both` is `down + d`, without its rounding.

    `sum w phi(d + x) = exp(d) sum w phi(x) + phi(d) sum w`, since `sum w x = 0`.
    """
    near = down.exp() * (torch.expm1(d.clamp_max(1.0)) - d)
    far = both.exp() - down.exp() * (1 + d)  # exp(d) alone could overflow while exp(down + d) does not
    return both.exp() * part.excess + torch.where(d < 1.0, near, far) * part.p.sum


def finish(stats: SoftmaxStats) -> Softmax:
    """Normaliser, entropy and target log-probability of a view whose statistics cover the whole vocabulary."""
    log_sum = torch.where(stats.sum > 0, stats.sum, torch.nan).log()
    logprobs = (stats.target - stats.max) - log_sum
    return Softmax(stats.max, log_sum, log_sum - stats.weighted_sum / stats.sum, logprobs)


def finish_pair(stats: PairStats) -> Pair:
    """Both views' results and `KL(p || q)`, never negative."""
    p, q = finish(stats.p), finish(stats.q)
    exact = torch.log1p(stats.excess / stats.p.sum)
    # where `exact` overflows some gap is about 88, and the divergence so large that the textbook formula is accurate
    plain = stats.mean_diff + (q.log_sum - p.log_sum)
    kl = torch.where(torch.isfinite(exact), exact, plain).clamp_min(0.0)
    return Pair(p, q, torch.where(kl == torch.inf, 0.0, stats.mean_diff), kl)
