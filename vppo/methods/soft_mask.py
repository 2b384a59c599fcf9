"""The soft mask that VPPO is compared with: every token keeps a part of its gradient (arXiv 2510.09285, appendix I)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vppo.methods.tokens import checked, inside
from vppo_kernels.statistics import DivergenceOutput

HALVINGS = 64  # of an interval in float64, after which its ends are neighbours


@torch.no_grad()
def soft_mask_weights(views: DivergenceOutput, mask: Tensor, *, mean_weight: float = 0.4) -> Tensor:
    """`sigmoid(Z - c)` with `Z` the dependency's z-score within its response, and `c` such that the mean is as asked.

    Args:
        views: Of `linear_divergence`; `divergence` is read, `[B, T]` floating in nats.
        mask: `[B, T]` bool or 0/1, the response tokens; nothing else is read.
        mean_weight: Of each response's tokens, between 0 and 1 (0.4 in the paper, as many as its binary mask keeps).

    Returns:
        `[B, T]` float32 (float64 for float64), 0 at padding; `mean_weight` everywhere where all tokens depend alike.
        Not differentiable.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or, on a CPU, not finite.
    """
    inside("mean_weight", mean_weight)
    valid, divergence = checked(mask, divergence=views.divergence)
    count = valid.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(valid, divergence - divergence.sum(1, keepdim=True) / count, 0)
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    z = centred / deviation.masked_fill(deviation == 0, 1)
    # sigmoid(z - c) is the mean for some z of the row, so c is some z less this
    offset = math.log(mean_weight / (1 - mean_weight))
    low, high = z.amin(1, keepdim=True) - offset, z.amax(1, keepdim=True) - offset
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        heavy = torch.where(valid, torch.sigmoid(z - middle), 0).sum(1, keepdim=True) > mean_weight * count
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    return torch.where(valid, torch.sigmoid(z - (low + high) / 2), 0)
