"""Selection and the clipped loss through the native library; formulas are those of the torch code beside each call.

Tensors arrive checked, on one device, none of them empty or float64. The library takes single precision; what is 16
bits wide is converted, as little as it is next to the logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vppo_kernels.native_library import library

SUMS = 12  # of each row, in the order of `SUMS` of loss.py


def topk(scores: Tensor, valid: Tensor, keep_ratio: float, cu_seqlens: Tensor | None, out: Tensor) -> None:
    """Write the top-k mask of selection.py into `out`, which may be `scores`; both contiguous."""
    keep = out if out.dtype in (torch.bool, torch.float32) else torch.zeros_like(out, dtype=torch.bool)
    offsets = None if cu_seqlens is None else cu_seqlens.long().contiguous()
    library(scores.device.type).topk_mask(scores.float(), valid.contiguous(), keep_ratio, offsets, keep)
    if keep is not out:
        out.copy_(keep)


class _ClippedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        old_logprobs: Tensor,
        advantages: Tensor,
        keep: Tensor,
        mask: Tensor,
        ref_logprobs: Tensor | None,
        is_weights: Tensor | None,
        dependency: Tensor | None,
        numbers: tuple[float, ...],
        per_token: bool,
        ref_of_all: bool,
    ) -> tuple[Tensor, Tensor]:
        values = torch.empty_like(logprobs) if per_token else None
        sums = logprobs.new_empty((SUMS, len(mask)))
        library(mask.device.type).clipped_loss(
            logprobs, entropy, old_logprobs, advantages, keep, mask, ref_logprobs, is_weights, dependency,
            *numbers, ref_of_all, values, sums,
        )  # fmt: skip
        ctx.save_for_backward(logprobs, old_logprobs, advantages, mask, ref_logprobs, is_weights)
        ctx.numbers = numbers
        ctx.mark_non_differentiable(sums)
        return sums[-1].clone() if values is None else values, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, old_logprobs, advantages, mask, ref_logprobs, is_weights = ctx.saved_tensors
        grad = torch.empty_like(logprobs)
        grad_entropy = torch.empty_like(logprobs) if ctx.needs_input_grad[1] else None
        library(mask.device.type).clipped_loss_gradient(
            logprobs, old_logprobs, advantages, mask, ref_logprobs, is_weights, upstream.resolve_neg().contiguous(),
            *ctx.numbers, grad, grad_entropy,
        )  # fmt: skip
        return grad, grad_entropy, *(None,) * 10


def clipped_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    keep: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    dependency: Tensor | None,
    *,
    low: float,
    high: float,
    dual: float | None,
    limit: float,
    nll_coef: float,
    entropy_coef: float,
    kl_coef: float,
    per_token: bool,
    ref_of_all: bool,
) -> tuple[Tensor, Tensor]:
    """As `_clipped_loss` of loss.py, from arguments that may hold anything where `mask` is 0."""
    floats = (logprobs, entropy, old_logprobs, advantages, ref_logprobs, is_weights, dependency)
    given = [None if x is None else x.float().resolve_neg().contiguous() for x in floats]
    numbers = (low, high, math.inf if dual is None else dual, limit, nll_coef, entropy_coef, kl_coef)
    return _ClippedLoss.apply(
        *given[:4],
        keep.contiguous(),
        mask.contiguous(),
        *given[4:],
        tuple(float(x) for x in numbers),
        per_token,
        ref_of_all,
    )
