"""The definitions, written plainly on materialised logits: the truth that every test and `check=True` compare with.

Nothing here is fast or saves memory. Every function takes any floating dtype and computes in it; float64 is the truth.
Logits of -inf are masked words: they have no probability and no part in any sum.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from vppo_kernels.statistics import DivergenceOutput, LogprobOutput

LOGPROB_BOUND = 2e-5  # nats: how far a float32 log-probability or entropy may lie from float64
LOGPROB_BOUND_CUT = 2e-4  # where logits are sums of 16-bit products on tensor cores, which cut off what they add


def divergence_bound(truth: Tensor, cut: bool = False) -> Tensor:
    """How far float32 divergences may lie from their float64 `truth`: the last digits, and the rounding of logits.

    With `cut` logits are sums of 16-bit products on tensor cores, which cut off what they add.
    """
    truth = truth.clamp_min(0)
    return 1e-5 * truth + (2e-5 if cut else 3e-6) * truth.sqrt() + 1e-8


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """`[..., D]` hidden states to `[..., V]` logits: project, scale, cap, divide by the temperature."""
    z = hidden @ weight[:vocab_size].T
    if bias is not None:
        z = z + bias[:vocab_size]
    return transform(z, temperature=temperature, logit_scale=logit_scale, softcap=softcap)


def transform(z: Tensor, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """What happens to a logit after the projection."""
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def _sum(p: Tensor, logarithm: Tensor, masked: Tensor) -> Tensor:
    """`sum p log(...)` over the last dimension, of the words that are not masked (0 log 0 = 0)."""
    return (p * logarithm.masked_fill(masked, 0.0)).sum(-1)


def entropy(z: Tensor) -> Tensor:
    """`-sum p log p` over the last dimension, in nats."""
    logp = z.log_softmax(-1)
    return -_sum(logp.exp(), logp, logp == -math.inf)


def logprob(z: Tensor, targets: Tensor) -> Tensor:
    """`log p(target)`; that of a masked word is -inf, without gradient."""
    value = z.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return torch.where(value == -math.inf, -math.inf, value)


def kl(z_p: Tensor, z_q: Tensor) -> Tensor:
    """`KL(p || q)` over the last dimension (VPPO, Eq. 3), in nats; +inf, without gradient, if q alone masks a word."""
    logp, logq = z_p.log_softmax(-1), z_q.log_softmax(-1)
    hidden = (logq == -math.inf) & (logp > -math.inf)
    value = _sum(logp.exp(), logp - logq.masked_fill(hidden, 0.0), logp == -math.inf)
    return torch.where(hidden.any(-1), math.inf, value)


def jsd(z_p: Tensor, z_q: Tensor, beta: float = 0.5) -> Tensor:
    """`(1 - beta) KL(p || m) + beta KL(q || m)`, `m = (1 - beta) p + beta q`; at 0 `KL(q || p)`, at 1 `KL(p || q)`."""
    if beta in (0, 1):
        return kl(z_p, z_q) if beta else kl(z_q, z_p)
    logp, logq = z_p.log_softmax(-1), z_q.log_softmax(-1)
    no_p, no_q = logp == -math.inf, logq == -math.inf
    neither = no_p & no_q
    parts = (logp.masked_fill(neither, 0.0) + math.log1p(-beta), logq.masked_fill(neither, 0.0) + math.log(beta))
    logm = torch.logaddexp(*parts)
    return (1 - beta) * _sum(logp.exp(), logp - logm, no_p) + beta * _sum(logq.exp(), logq - logm, no_q)


def topk(z_p: Tensor, z_q: Tensor, k: int) -> Tensor:
    """`KL(q || p)` of k + 1 probabilities: of the k likeliest words of q, and of all others together."""
    best = z_q.argsort(dim=-1, descending=True, stable=True)[..., :k]
    taken = torch.zeros_like(z_q, dtype=torch.bool).scatter(-1, best, True)

    def bins(z: Tensor) -> Tensor:
        if k >= z.shape[-1]:
            return z
        return torch.cat([z.gather(-1, best), z.masked_fill(taken, -math.inf).logsumexp(-1, keepdim=True)], -1)

    return kl(bins(z_q), bins(z_p))


def margin(z: Tensor, k: int) -> Tensor:
    """How far the k-th largest logit lies above the next one; inf where there is no next one."""
    ordered = z.sort(-1, descending=True).values
    return ordered[..., k - 1] - ordered[..., k] if k < z.shape[-1] else torch.full_like(z[..., 0], math.inf)


def divergence(
    z_p: Tensor,
    z_q: Tensor,
    targets: Tensor | None = None,
    kind: str = "kl",
    beta: float = 0.5,
    k: int | None = None,
) -> DivergenceOutput:
    """All outputs of `vppo_kernels.divergence` from two sets of logits."""
    value = {
        "kl": lambda: kl(z_p, z_q),
        "reverse_kl": lambda: kl(z_q, z_p),
        "jsd": lambda: jsd(z_p, z_q, beta),
        "topk": lambda: topk(z_p, z_q, k or 1),
    }[kind]()
    return DivergenceOutput(
        value,
        entropy(z_p),
        entropy(z_q),
        None if targets is None else logprob(z_p, targets),
        None if targets is None else logprob(z_q, targets),
    )


def logprob_output(z: Tensor, targets: Tensor) -> LogprobOutput:
    """All outputs of `vppo_kernels.linear_logprob` from logits."""
    return LogprobOutput(logprob(z, targets), entropy(z))


def keep_count(length: int, keep_ratio: float) -> int:
    """`ceil(keep_ratio * length)`, with the ratio read as the decimal that was written."""
    return math.ceil(Fraction(str(keep_ratio)) * length)


def topk_mask(scores: Tensor, mask: Tensor, keep_ratio: float, keep_threshold: float | None = None) -> Tensor:
    """Per row the `ceil(keep_ratio * n)` highest of the `n` valid scores, the earlier first among equals (Eq. 4); of
    these, where there is a threshold, only those above it.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(scores.shape[0]):
        valid = [t for t in range(scores.shape[1]) if bool(mask[row, t])]
        best = sorted(valid, key=lambda t: (-float(scores[row, t]), t))
        best = best[: keep_count(len(valid), keep_ratio)]
        keep[row, [t for t in best if keep_threshold is None or bool(scores[row, t] > keep_threshold)]] = True
    return keep


def trajectory_scale(scores: Tensor, mask: Tensor, scale_min: float = 0.9, scale_max: float | None = None) -> Tensor:
    """Advantage factor of each row from its mean score, min-max normalised over the rows that have tokens (Eq. 5)."""
    alpha = torch.ones(scores.shape[0], dtype=scores.dtype)
    rows = [row for row in range(scores.shape[0]) if bool(mask[row].any())]
    if len(rows) < 2:
        return alpha
    means = torch.stack([scores[row][mask[row].bool()].mean() for row in rows])
    low, high = means.min(), means.max()
    if high - low <= 1e-6:
        return alpha
    u = (means - low) / (high - low)
    top = scale_min + (1 - scale_min) / u.mean() if scale_max is None else scale_max
    alpha[rows] = scale_min + u * (top - scale_min)
    return alpha


def clipped_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_dual: float | None = None,
) -> Tensor:
    """The negated clipped surrogate of every token (Eq. 6), before any mask or mean."""
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if clip_dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -clip_dual * advantages), loss)
    return loss
