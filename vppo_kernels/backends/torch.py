"""The tile operations in plain torch: any device, any dtype, in place wherever torch can.

`tile` is `[rows, columns]` (or `[2, rows, columns]` for two views) of finished logits. Folds leave it as it was and
work in `scratch`, `[3, rows, columns]`; gradient operations overwrite it. Everything is elementwise or a row sum, and
the folds are in place: a fresh temporary costs more than the arithmetic on it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vppo_kernels.statistics import Pair, PairStats, Softmax, SoftmaxStats


def _dot(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`sum_j a[i, j] b[i, j]`, through `out` (a batched matrix product is five times slower on a CPU)."""
    return torch.mul(a, b, out=out).sum(1)


def _target_logit(tile: Tensor, targets: Tensor | None, first: int) -> Tensor | None:
    if targets is None:
        return None
    column = targets - first
    inside = (column >= 0) & (column < tile.shape[1])
    value = tile.gather(1, column.clamp(0, tile.shape[1] - 1).unsqueeze(1)).squeeze(1)
    return torch.where(inside, value, -math.inf)


def fold(tile: Tensor, targets: Tensor | None, first: int, scratch: Tensor) -> SoftmaxStats:
    """Statistics of one view of one tile; `first` is the vocabulary index of its first column.

    Leaves `exp(tile - max)` in `scratch[1]`.
    """
    shifted, weights = scratch[0], scratch[1]
    top = tile.amax(1)
    torch.sub(tile, top.unsqueeze(1), out=shifted)
    torch.exp(shifted, out=weights)
    return SoftmaxStats(top, weights.sum(1), _dot(weights, shifted, out=shifted), _target_logit(tile, targets, first))


def fold_pair(tile: Tensor, targets: Tensor | None, first: int, scratch: Tensor) -> PairStats:
    """Statistics of both views of one tile, with the mean gap and the excess about it."""
    z_p, z_q = tile[0], tile[1]
    q = fold(z_q, targets, first, scratch)
    p = fold(z_p, targets, first, scratch)
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


def fold_jsd(tile: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """This tile's part of `(KL(p || m), KL(q || m))`, `[rows]` each; their mean is the Jensen-Shannon divergence."""
    p, q, d = _probabilities(tile, pair)
    return p.mul_(_log_share(d)).sum(1), q.mul_(_log_share(-d)).sum(1)


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


def _add_at_targets(grad: Tensor, targets: Tensor | None, first: int, value: Tensor | None) -> None:
    if targets is None or value is None:
        return
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
    tile: Tensor, view: Softmax, targets: Tensor, first: int, grad_entropy: Tensor, grad_logprobs: Tensor
) -> None:
    """Overwrite one view's tile with the gradient of its log-probability and entropy, given theirs (`[rows]`)."""
    logp = _log_softmax(tile, view)
    tile.copy_(_view_gradient(logp, view, grad_entropy, grad_logprobs, 0.0))
    _add_at_targets(tile, targets, first, grad_logprobs)


def gradient_pair_(
    tile: Tensor,
    pair: Pair,
    jsd_parts: tuple[Tensor, Tensor] | None,
    targets: Tensor | None,
    first: int,
    grad_divergence: Tensor,
    grad_entropy: tuple[Tensor, Tensor],
    grad_logprobs: tuple[Tensor | None, Tensor | None],
) -> None:
    """Overwrite both views' tile with the gradient of all outputs, given theirs (`[rows]`).

    The divergence is `KL(p || q)`, or the Jensen-Shannon divergence when its two halves are given as `jsd_parts`.
    """
    z_p, z_q = tile[0], tile[1]
    scale = grad_divergence.unsqueeze(1)
    centred = _centred_gap(tile, pair)
    logp, logq = _log_softmax(z_p, pair.p), _log_softmax(z_q, pair.q)
    d = centred + pair.kl.unsqueeze(1)  # log(p / q)
    if jsd_parts is None:
        # q - p over q: the difference of two exponentials would lose the digits of a small gap
        inner_p, inner_q = scale * centred, scale * -torch.expm1(d.clamp_max(1.0))
    else:
        inner_p = 0.5 * scale * (_log_share(d) - jsd_parts[0].unsqueeze(1))
        inner_q = 0.5 * scale * (_log_share(-d) - jsd_parts[1].unsqueeze(1))
    z_p.copy_(_view_gradient(logp, pair.p, grad_entropy[0], grad_logprobs[0], inner_p))
    z_q.copy_(_view_gradient(logq, pair.q, grad_entropy[1], grad_logprobs[1], inner_q))
    if jsd_parts is None:  # what the clamp has cut off: p - e q
        z_q.sub_(torch.where(d > 1.0, scale * (logp.exp_() - math.e * logq.exp_()), 0.0))
    _add_at_targets(z_p, targets, first, grad_logprobs[0])
    _add_at_targets(z_q, targets, first, grad_logprobs[1])
