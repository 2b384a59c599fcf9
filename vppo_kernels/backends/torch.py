"""The tile operations in plain torch: any device, any dtype, in place wherever torch can.

Folds work in `scratch`, `[3, rows, columns]`. Everything is elementwise or a sum over a row, and works in place because
to allocate a temporary of a tile's size costs more than the arithmetic on it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vppo_kernels.logits import LogitTransform
from vppo_kernels.statistics import (
    APART,
    EXP_FLOOR,
    GRAD_DIVERGENCE,
    GRAD_ENTROPY,
    GRAD_ENTROPY_P,
    GRAD_ENTROPY_Q,
    GRAD_LOGPROB,
    GRAD_LOGPROB_P,
    GRAD_LOGPROB_Q,
    JSD_P,
    JSD_Q,
    Pair,
    PairStats,
    Softmax,
    SoftmaxStats,
    merge,
    merge_pair,
    pack,
    unpack_pair,
    unpack_pair_stats,
    unpack_softmax,
    unpack_stats,
)

SCRATCH = 3  # tiles of working space that a fold uses beside each view's logits
PEAK = 14  # tiles alive in the hungriest step, counted: the gradient of the Jensen-Shannon divergence, or far views


def _dot(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`sum_j a[i, j] b[i, j]`, through `out` (a batched matrix product is five times slower on a CPU)."""
    return torch.mul(a, b, out=out).sum(1)


def _target_logit(tile: Tensor, targets: Tensor | None, first: int) -> Tensor:
    if targets is None:
        return tile.new_full((len(tile),), -math.inf)
    column = targets - first
    inside = (column >= 0) & (column < tile.shape[1])
    value = tile.gather(1, column.clamp(0, tile.shape[1] - 1).unsqueeze(1)).squeeze(1)
    return torch.where(inside, value, -math.inf)


def fold(tile: Tensor, targets: Tensor | None, first: int, stats: Tensor, scratch: Tensor) -> Tensor:
    """See `TileOps`."""
    return pack(merge(unpack_stats(stats), _part(tile, targets, first, scratch)))


def fold_pair(tile: Tensor, targets: Tensor | None, first: int, stats: Tensor, scratch: Tensor) -> Tensor:
    """See `TileOps`."""
    return pack(merge_pair(unpack_pair_stats(stats), _part_pair(tile, targets, first, scratch)))


def _part(tile: Tensor, targets: Tensor | None, first: int, scratch: Tensor) -> SoftmaxStats:
    """Statistics of one tile alone; leaves `exp(tile - max)` in `scratch[1]`."""
    shifted, weights = scratch[0], scratch[1]
    top = tile.amax(1)
    torch.sub(tile, top.unsqueeze(1), out=shifted)
    torch.exp(shifted, out=weights)
    total, weighted_sum = weights.sum(1), _dot(weights, shifted, out=shifted)
    if not bool(torch.isfinite(weighted_sum).all()):  # 0 times the -inf of a masked word
        torch.sub(tile, top.clamp_min(-EXP_FLOOR).unsqueeze(1), out=shifted).clamp_min_(-EXP_FLOOR)
        torch.exp(shifted, out=weights)
        total, weighted_sum = weights.sum(1), _dot(weights, shifted, out=shifted)
    return SoftmaxStats(top, total, weighted_sum, _target_logit(tile, targets, first))


def _part_pair(tile: Tensor, targets: Tensor | None, first: int, scratch: Tensor) -> PairStats:
    """Statistics of both views of one tile alone."""
    z_p, z_q = tile[0], tile[1]
    q = _part(z_q, targets, first, scratch)
    p = _part(z_p, targets, first, scratch)
    x, weights, phi = scratch[0], scratch[1], scratch[2]
    between = p.max - q.max
    torch.sub(z_p, z_q, out=x).sub_(between.unsqueeze(1))
    mean_diff = _dot(weights, x, out=phi) / p.sum
    torch.sub(mean_diff.unsqueeze(1), x, out=x)
    torch.expm1(x, out=phi).sub_(x)
    excess = _dot(weights, phi, out=phi)
    rare = ~torch.isfinite(excess) | (between.abs() > APART)
    if bool(rare.any()):
        mean_diff[rare], excess[rare] = _gap_and_excess(z_p[rare], z_q[rare], weights[rare], p.max[rare], q.max[rare])
    return PairStats(p, q, mean_diff, excess)


def _gap_and_excess(z_p: Tensor, z_q: Tensor, weights: Tensor, max_p: Tensor, max_q: Tensor) -> tuple[Tensor, Tensor]:
    """Mean gap and excess of rows that need care: masked words, maxima far apart, gaps whose exponential overflows.

    Overwrites `z_p` and `z_q`.
    """
    hidden = ((z_q == -math.inf) & (z_p != -math.inf)).any(1)  # rows with words that the second view alone masks
    # the maximum of a row whose words are all masked: a finite number far below any logit, far above a masked word's
    max_p, max_q = (top.clamp_min(-0.1 * EXP_FLOOR).unsqueeze(1) for top in (max_p, max_q))
    z_p, z_q, between = z_p.clamp_min_(-EXP_FLOOR), z_q.clamp_min_(-EXP_FLOOR), max_p - max_q
    log_q, apart = z_q - max_q, between.abs() > APART
    x = z_p.sub_(torch.where(apart, max_p, 0.0)).sub_(torch.where(apart, log_q, z_q))
    x.sub_(torch.where(apart, 0.0, between))
    total = weights.sum(1)
    mean_diff = torch.where(total > 0, torch.mul(weights, x, out=z_q).sum(1) / total, 0.0)
    d = torch.sub(mean_diff.unsqueeze(1), x, out=x)
    near = d.clamp_max(1.0).expm1_().sub_(d).mul_(weights)
    # exp(d) alone could overflow; exp(log_q + mean_diff), its product with the weight, stays where q has any weight
    far = log_q.add_(mean_diff.unsqueeze(1)).exp_().sub_(torch.add(d, 1.0, out=z_q).mul_(weights))
    return torch.where(hidden, math.inf, mean_diff), torch.where(d < 1.0, near, far).sum(1)


class _Share(NamedTuple):
    """Of one view in `m = own p + other q`: the other's share, and the logarithms of both."""

    other: float
    log_own: float
    log_other: float


def _shares(beta: float) -> tuple[_Share, _Share]:
    """Of p and of q in `m = (1 - beta) p + beta q`."""
    return _Share(beta, math.log1p(-beta), math.log(beta)), _Share(1 - beta, math.log(beta), math.log1p(-beta))


def _log_share(d: Tensor, of: _Share) -> Tensor:
    """`log(p / m)` for `d = log(p / q)`, accurate for small and for very negative `d`."""
    if of.other == 0.5:
        return torch.where(d > -1.0, torch.log1p(torch.tanh(0.5 * d)), math.log(2) - torch.nn.functional.softplus(-d))
    # near 0 from the gap itself, elsewhere from logarithms: exp(-d) could overflow, or cancel what is added to it
    near = torch.log1p(d.clamp(-0.5, 0.5).neg_().expm1_().mul_(of.other))
    far = torch.logaddexp(of.log_other - d, d.new_tensor(of.log_own))
    return torch.where(d.abs() < 0.5, near, far).neg_()


def fold_jsd(tile: Tensor, pair: Tensor, jsd_terms: Tensor, beta: float) -> Tensor:
    """See `TileOps`."""
    tile, both = tile.clamp_min(-EXP_FLOOR), unpack_pair(pair)
    logp, logq = _log_softmax(tile[0], both.p), _log_softmax(tile[1], both.q)
    d, (of_p, of_q) = _log_ratio(_centred_gap(tile, both), both.kl, logp, logq), _shares(beta)
    return jsd_terms.add_(
        torch.stack([logp.exp_().mul_(_log_share(d, of_p)).sum(1), logq.exp_().mul_(_log_share(-d, of_q)).sum(1)])
    )


def _log_ratio(centred: Tensor, kl: Tensor, logp: Tensor, logq: Tensor) -> Tensor:
    """`log(p / q)` of a tile: from the gaps about their mean, or where the divergence is large from the logarithms."""
    d, large = centred + kl.unsqueeze(1), kl > APART
    if bool(large.any()):
        d[large] = logp[large] - logq[large]
    return d


def _centred_gap(tile: Tensor, pair: Pair) -> Tensor:
    """`log(p / q) - KL(p || q)`: the gap of each logit from the mean gap."""
    between = pair.p.max - pair.q.max
    gap = (tile[0] - tile[1]).sub_(between.unsqueeze(1))
    apart = between.abs() > APART
    if bool(apart.any()):
        of_p, of_q = (z[apart] - view.max[apart].unsqueeze(1) for z, view in ((tile[0], pair.p), (tile[1], pair.q)))
        gap[apart] = of_p.sub_(of_q)
    return gap.sub_(pair.mean_diff.unsqueeze(1))


def _log_softmax(z: Tensor, view: Softmax) -> Tensor:
    return (z - view.max.unsqueeze(1)).sub_(view.log_sum.unsqueeze(1))


def _add_at_targets(grad: Tensor, targets: Tensor, first: int, value: Tensor) -> None:
    column = targets - first
    inside = (column >= 0) & (column < grad.shape[1])
    value = torch.where(inside, value, 0.0)
    grad.scatter_add_(1, column.clamp(0, grad.shape[1] - 1).unsqueeze(1), value.unsqueeze(1))


def _times_(tile: Tensor, slope: Tensor | float) -> None:
    if isinstance(slope, Tensor) or slope != 1.0:
        tile.mul_(slope)


def _view_gradient(
    logp: Tensor, view: Softmax, grad_entropy: Tensor, grad_logprobs: Tensor | None, inner: Tensor | None
) -> Tensor:
    """`p * (inner - grad_entropy (log p + H) - grad_logprobs)`: a view's gradient but for the target's own term.

    Overwrites `inner`; None stands for 0.
    """
    factor, slope = logp + view.entropy.unsqueeze(1), -grad_entropy.unsqueeze(1)
    factor = factor.mul_(slope) if inner is None else inner.addcmul_(factor, slope)
    if grad_logprobs is not None:
        factor.sub_(grad_logprobs.unsqueeze(1))
    return factor.mul_(logp.exp())


def gradient_(
    tile: Tensor,
    softmax: Tensor,
    targets: Tensor,
    first: int,
    grads: Tensor,
    transform: LogitTransform,
    out: Tensor,
) -> None:
    """See `TileOps`."""
    tile.clamp_min_(-EXP_FLOOR)  # a masked word: a finite logit whose probability is 0
    slope, view = transform.slope(tile), unpack_softmax(softmax)
    grad_logprob, grad_entropy = grads[GRAD_LOGPROB], grads[GRAD_ENTROPY]
    tile.copy_(_view_gradient(_log_softmax(tile, view), view, grad_entropy, grad_logprob, None))
    _add_at_targets(tile, targets, first, grad_logprob)
    _times_(tile, slope)
    if out.dtype != tile.dtype:
        out.copy_(tile)


def gradient_pair_(
    tile: Tensor,
    pair: Tensor,
    jsd_terms: Tensor | None,
    beta: float,
    targets: Tensor | None,
    first: int,
    grads: Tensor,
    transforms: tuple[LogitTransform, ...],
    out: Tensor,
) -> None:
    """See `TileOps`."""
    tile.clamp_min_(-EXP_FLOOR)  # a masked word: a finite logit whose probability is 0
    z_p, z_q = tile[0], tile[1]
    slopes, both = [transform.slope(z) for transform, z in zip(transforms, tile, strict=True)], unpack_pair(pair)
    scale = grads[GRAD_DIVERGENCE].unsqueeze(1)
    centred = _centred_gap(tile, both)
    logp, logq = _log_softmax(z_p, both.p), _log_softmax(z_q, both.q)
    d = _log_ratio(centred, both.kl, logp, logq)
    if jsd_terms is None:
        # q - p = -q (exp(d) - 1): the difference of two exponentials would lose the digits of a small gap
        inner_p, inner_q = scale * centred, d.clamp_max(1.0).expm1_().mul_(-scale)
    else:
        of_p, of_q = _shares(beta)
        inner_p = (1 - beta) * scale * (_log_share(d, of_p) - jsd_terms[JSD_P].unsqueeze(1))
        inner_q = beta * scale * (_log_share(-d, of_q) - jsd_terms[JSD_Q].unsqueeze(1))
    grad_logprobs = (None, None) if targets is None else (grads[GRAD_LOGPROB_P], grads[GRAD_LOGPROB_Q])
    z_p.copy_(_view_gradient(logp, both.p, grads[GRAD_ENTROPY_P], grad_logprobs[0], inner_p))
    z_q.copy_(_view_gradient(logq, both.q, grads[GRAD_ENTROPY_Q], grad_logprobs[1], inner_q))
    if jsd_terms is None:  # the clamp made q - e q of q - p where d > 1: the rest is p - e q
        z_q.sub_(torch.where(d > 1.0, scale * (logp.exp_() - math.e * logq.exp_()), 0.0))
    if targets is not None:
        _add_at_targets(z_p, targets, first, grads[GRAD_LOGPROB_P])
        _add_at_targets(z_q, targets, first, grads[GRAD_LOGPROB_Q])
    _times_(z_p, slopes[0])
    _times_(z_q, slopes[1])
    if out.dtype != tile.dtype:
        out.copy_(tile)
