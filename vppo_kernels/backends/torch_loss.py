"""The clip rule and the terms beside it, in plain torch (VPPO, Eq. 6). `triton_loss.py` has the same as kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from vppo_kernels.backends.protocols import LOG_RATIO_LIMIT, LossInputs, LossOptions


def clipped_surrogate(ratio: Tensor, advantages: Tensor, options: LossOptions) -> Tensor:
    """The clip rule: the larger of the plain and the clipped loss, for negative advantages at most the dual clip's."""
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(*options.ratio_bounds) * advantages)
    if options.clip_dual is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -options.clip_dual * advantages), loss)


def _k3(log_ratio: Tensor) -> Tensor:
    """`exp(d) - 1 - d`, the estimate of a divergence from one log-ratio; never negative."""
    return torch.expm1(log_ratio) - log_ratio


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_loss(inputs: LossInputs, options: LossOptions, per_token: bool) -> tuple[Tensor, Tensor]:
    """See `TokenOps`."""
    mask = inputs.mask

    def wide(values: Tensor) -> Tensor:
        """In single precision at least, and 0 outside of the mask: nothing there may reach a sum or a gradient."""
        return torch.where(mask, values, 0).to(torch.promote_types(values.dtype, torch.float32))

    logprobs, advantages = wide(inputs.logprobs), wide(inputs.advantages)
    entropy = None if inputs.entropy is None else wide(inputs.entropy)
    log_ratio = _bounded(logprobs - wide(inputs.old_logprobs))
    ratio = log_ratio.exp()
    loss = clipped_surrogate(ratio, advantages, options)
    if inputs.is_weights is not None:
        loss = loss * wide(inputs.is_weights)
    # a term whose coefficient is 0 is left out, so that a NaN in it does no harm
    if options.nll_coef:
        loss = loss - options.nll_coef * logprobs
    if options.entropy_coef and entropy is not None:
        loss = loss - options.entropy_coef * entropy
    ref_kl = None if inputs.ref_logprobs is None else _k3(_bounded(wide(inputs.ref_logprobs) - logprobs))
    if options.kl_coef and ref_kl is not None:
        loss = loss + options.kl_coef * ref_kl
    loss = torch.where(mask, loss, 0)
    rows = loss.sum(1)

    with torch.no_grad():
        active = mask & (advantages != 0)
        falling, rising = active & (advantages < 0), active & (advantages > 0)
        low, high = options.ratio_bounds

        def row_sums(values: Tensor | None, where: Tensor) -> Tensor:
            return torch.where(where, 0 if values is None else values, 0).sum(1, dtype=rows.dtype)

        sums = [  # in the order of `SUMS`
            row_sums(mask, mask),
            row_sums(inputs.keep, mask),
            row_sums(active, mask),
            row_sums(entropy, mask),
            row_sums(ratio, active),
            row_sums(_k3(log_ratio), active),
            row_sums(ratio < low, falling),
            row_sums(ratio > high, rising),
            row_sums(None if options.clip_dual is None else ratio > options.clip_dual, falling),
            row_sums(ref_kl, mask if options.every_token else active),
            row_sums(inputs.dependency, mask),
            rows,
        ]
        return loss if per_token else rows, torch.stack(sums)
