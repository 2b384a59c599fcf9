"""Token-level gradient filtering: which tokens of a trajectory depend most on the image (VPPO, Eq. 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vppo_kernels import checks


def keep_counts(lengths: Tensor, keep_ratio: float) -> Tensor:
    """`ceil(keep_ratio * n)` of each length, as int64 on its device."""
    # 0.07 * 100 is 7.000000000000001 in binary: step below the rounding before the ceiling
    return torch.ceil(lengths.double() * keep_ratio * (1 - 2**-40)).long()


def _checked(scores: Tensor, mask: Tensor, keep_ratio: float, check: bool | None) -> Tensor:
    checks.matrix("scores", scores)
    checks.fraction("keep_ratio", keep_ratio)
    valid = checks.token_mask(mask, scores)
    if checks.wanted(check, scores):
        checks.all_finite("scores", scores, valid)
    return valid


def _select(scores: Tensor, valid: Tensor, keep_ratio: float) -> Tensor:
    padded = torch.where(valid, scores, -math.inf)
    order = padded.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))
    return (rank < keep_counts(valid.sum(1), keep_ratio).unsqueeze(1)) & valid


@torch.no_grad()
def topk_mask(scores: Tensor, mask: Tensor, keep_ratio: float, *, check: bool | None = None) -> Tensor:
    """Keep, in each row, the `ceil(keep_ratio * n)` highest of its `n` valid scores; the earlier wins among equals.

    Args:
        scores: `[B, T]` floating dependency of each token; not read where `mask` is 0.
        mask: `[B, T]` bool or 0/1, the response tokens.
        keep_ratio: Fraction kept, above 0 and at most 1 (0.4 in the paper).
        check: Raise on NaN or inf among valid scores. None looks on the CPU, where looking costs no synchronisation.
            Unchecked, a NaN ranks above every number.

    Returns:
        `[B, T]` bool, never True where `mask` is 0. A row without valid tokens keeps none. Not differentiable.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or not finite when checked.
    """
    return _select(scores, _checked(scores, mask, keep_ratio, check), keep_ratio)


@torch.no_grad()
def topk_mask_(scores: Tensor, mask: Tensor, keep_ratio: float, *, check: bool | None = None) -> Tensor:
    """`topk_mask` written over `scores`: 1 where kept, 0 elsewhere.

    Args:
        scores, mask, keep_ratio, check: As in `topk_mask`.

    Returns:
        `scores`.
    """
    return scores.copy_(_select(scores, _checked(scores, mask, keep_ratio, check), keep_ratio))
