"""The tile operations in plain torch: any device, any dtype, in place wherever torch can.

`tile` is `[rows, columns]` (or `[2, rows, columns]` for two views) of finished logits. Folds leave it as it was and
work in `scratch`, `[3, rows, columns]`; gradient operations overwrite it. Everything is elementwise or a row sum, and
the folds are in place: a fresh temporary costs more than the arithmetic on it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vppo_kernels.head import LogitTransform
from vppo_kernels.statistics import (
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
    """Statistics of one view, `[4, rows]`, with one more tile; `first` is the vocabulary index of its first column."""
    return pack(merge(unpack_stats(stats), _part(tile, targets, first, scratch)))


def fold_pair(tile: Tensor, targets: Tensor | None, first: int, stats: Tensor, scratch: Tensor) -> Tensor:
    """Statistics of both views, `[10, rows]`, with one more tile."""
    return pack(merge_pair(unpack_pair_stats(stats), _part_pair(tile, targets, first, scratch)))


def _part(tile: Tensor, targets: Tensor | None, first: int, scratch: Tensor) -> SoftmaxStats:
    """Statistics of one tile alone; leaves `exp(tile - max)` in `scratch[1]`."""
    shifted, weights = scratch[0], scratch[1]
    top = tile.amax(1)
    torch.sub(tile, top.unsqueeze(1), out=shifted)
    torch.exp(shifted, out=weights)
    return SoftmaxStats(top, weights.sum(1), _dot(weights, shifted, out=shifted), _target_logit(tile, targets, first))


def _part_pair(tile: Tensor, targets: Tensor | None, first: int, scratch: Tensor) -> PairStats:
    """The same for both views, with the mean gap and the excess about it."""
    z_p, z_q = tile[0], tile[1]
    q = _part(z_q, targets, first, scratch)
    p = _part(z_p, targets, first, scratch)
    x, weights, phi = scratch[0], scratch[1], scratch[2]
    torch.sub(z_p, z_q, out=x).sub_((p.max - q.max).unsqueeze(1))
    gap = _dot(weights, x, out=phi) / p.sum
    torch.sub(gap.unsqueeze(1), x, out=x)
    torch.expm1(x, out=phi).sub_(x)
    excess = _dot(weights, phi, out=phi)
    overflowed = ~torch.isfinite(excess)
    if overflowed.any():
        excess[overflowed] = _excess_of_far_views(
            x[overflowed], weights[overflowed], (z_q - q.max.unsqueeze(1))[overflowed] + gap[overflowed].unsqueeze(1)
        )
    return PairStats(p, q, gap, excess)


def _excess_of_far_views(x: Tensor, weights: Tensor, both: Tensor) -> Tensor:
    """The excess where `exp(x)` overflows; `both`, `x` plus the weight's logarithm, stays where q has any weight."""
    near = weights * (torch.expm1(x.clamp_max(1.0)) - x)
    far = both.exp() - weights * (1 + x)
    return torch.where(x < 1.0, near, far).sum(1)


def _log_share(d: Tensor) -> Tensor:
    """`log(p / m)` for `d = log(p / q)` and `m = (p + q) / 2`, accurate for small and for very negative `d`."""
    return torch.where(d > -1.0, torch.log1p(torch.tanh(0.5 * d)), math.log(2) - torch.nn.functional.softplus(-d))


def fold_jsd(tile: Tensor, pair: Tensor, halves: Tensor) -> Tensor:
    """`(KL(p || m), KL(q || m))`, `[2, rows]`, with one more tile; their mean is the Jensen-Shannon divergence."""
    p, q, d = _probabilities(tile, unpack_pair(pair))
    return halves.add_(torch.stack([p.mul_(_log_share(d)).sum(1), q.mul_(_log_share(-d)).sum(1)]))


def _probabilities(tile: Tensor, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """`p`, `q` and `log(p / q)` of a tile."""
    d = _centred_gap(tile, pair).add_(pair.kl.unsqueeze(1))
    return _log_softmax(tile[0], pair.p).exp_(), _log_softmax(tile[1], pair.q).exp_(), d


def _centred_gap(tile: Tensor, pair: Pair) -> Tensor:
    """`log(p / q) - KL(p || q)`: the gap of each logit from the mean gap."""
    gap = (tile[0] - tile[1]).sub_((pair.p.max - pair.q.max).unsqueeze(1))
    return gap.sub_(pair.gap.unsqueeze(1))


def _log_softmax(z: Tensor, view: Softmax) -> Tensor:
    return (z - view.max.unsqueeze(1)).sub_(view.log_sum.unsqueeze(1))


def _add_at_targets(grad: Tensor, targets: Tensor, first: int, value: Tensor) -> None:
    column = targets - first
    inside = (column >= 0) & (column < grad.shape[1])
    value = torch.where(inside, value, 0.0)
    grad.scatter_add_(1, column.clamp(0, grad.shape[1] - 1).unsqueeze(1), value.unsqueeze(1))


def _view_gradient(
    logp: Tensor, view: Softmax, grad_entropy: Tensor, grad_logprobs: Tensor | None, inner: Tensor | float
) -> Tensor:
    """`p * (inner - grad_entropy (log p + H) - grad_logprobs)`: what of a view's gradient is a multiple of p."""
    factor = (logp + view.entropy.unsqueeze(1)).mul_(-grad_entropy.unsqueeze(1)).add_(inner)
    if grad_logprobs is not None:
        factor.sub_(grad_logprobs.unsqueeze(1))
    return factor.mul_(logp.exp())


def gradient_(
    tile: Tensor, view: Tensor, targets: Tensor, first: int, grads: Tensor, transform: LogitTransform
) -> None:
    """Overwrite one view's tile with the gradient of raw logits, given `grads`, `[2, rows]`: log-probability, entropy.

    `view` is a packed `Softmax`, `[4, rows]`.
    """
    slope, softmax = transform.slope(tile), unpack_softmax(view)
    logp = _log_softmax(tile, softmax)
    tile.copy_(_view_gradient(logp, softmax, grads[1], grads[0], 0.0))
    _add_at_targets(tile, targets, first, grads[0])
    tile.mul_(slope)


def gradient_pair_(
    tile: Tensor,
    pair: Tensor,
    halves: Tensor | None,
    targets: Tensor | None,
    first: int,
    grads: Tensor,
    transform: LogitTransform,
) -> None:
    """Overwrite both views' tile with the gradient of raw logits, given that of all outputs.

    Args:
        tile: `[2, rows, columns]`.
        pair: A packed `Pair`, `[10, rows]`.
        halves: `[2, rows]` where the divergence is Jensen-Shannon's; None where it is `KL(p || q)`.
        targets: `[rows]` or None.
        first: Vocabulary index of the tile's first column.
        grads: `[5, rows]`, of divergence, entropy of p and q, log-probability of p and q; `[3, rows]` without targets.
        transform: Of raw logits to these.
    """
    slope, both = transform.slope(tile), unpack_pair(pair)
    z_p, z_q = tile[0], tile[1]
    scale = grads[0].unsqueeze(1)
    centred = _centred_gap(tile, both)
    logp, logq = _log_softmax(z_p, both.p), _log_softmax(z_q, both.q)
    d = centred + both.kl.unsqueeze(1)  # log(p / q)
    if halves is None:
        # q - p over q: the difference of two exponentials would lose the digits of a small gap
        inner_p, inner_q = scale * centred, scale * -torch.expm1(d.clamp_max(1.0))
    else:
        inner_p = 0.5 * scale * (_log_share(d) - halves[0].unsqueeze(1))
        inner_q = 0.5 * scale * (_log_share(-d) - halves[1].unsqueeze(1))
    grad_logprobs = (None, None) if targets is None else (grads[3], grads[4])
    z_p.copy_(_view_gradient(logp, both.p, grads[1], grad_logprobs[0], inner_p))
    z_q.copy_(_view_gradient(logq, both.q, grads[2], grad_logprobs[1], inner_q))
    if halves is None:  # what the clamp has cut off: p - e q
        z_q.sub_(torch.where(d > 1.0, scale * (logp.exp_() - math.e * logq.exp_()), 0.0))
    if targets is not None:
        _add_at_targets(z_p, targets, first, grads[3])
        _add_at_targets(z_q, targets, first, grads[4])
    tile.mul_(slope)
