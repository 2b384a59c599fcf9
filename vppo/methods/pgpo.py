"""PGPO: advantages reallocated to the tokens that depend on the image, at an unchanged sum (arXiv 2604.01840)."""

from __future__ import annotations

import torch
from torch import Tensor

from vppo.methods.tokens import checked, inside, unit_range
from vppo_kernels import arguments
from vppo_kernels.statistics import DivergenceOutput


@torch.no_grad()
def pgpo_weights(views: DivergenceOutput, mask: Tensor, *, threshold: float = 0.4, boost: float = 2.0) -> Tensor:
    """Factors on the advantages of PGPO (Eq. 4 to 8).

    `I` is `log(1 + S)` of the dependency, moved to 0..1 within each response. The weight is `I / threshold` below the
    threshold, `1 + boost * (I - threshold) / (1 - threshold)` from it on, times what makes a response's weights sum to
    its length. The equations' small constants against divisions by 0 are 0 here; where all tokens depend alike, and
    nothing can be told apart, every weight is 1.

    Args:
        views: Of `linear_divergence`; `divergence` is read, `[B, T]` floating in nats, and what lies below 0 is 0.
        mask: `[B, T]` bool or 0/1, the response tokens; nothing else is read.
        threshold: Between 0 and 1 (tau; 0.4 in the paper).
        boost: At least 0 (beta; 2 in the paper).

    Returns:
        `[B, T]` float32 (float64 for float64), 0 at padding. Not differentiable.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or, on a CPU, not finite.
    """
    inside("threshold", threshold)
    arguments.non_negative("boost", boost)
    valid, divergence = checked(mask, divergence=views.divergence)
    score = unit_range(torch.log1p(divergence.clamp(min=0)), valid)
    above = 1 + boost * (score - threshold) / (1 - threshold)
    weights = torch.where(valid, torch.where(score < threshold, score / threshold, above), 0)
    total, length = weights.sum(1, keepdim=True), valid.sum(1, keepdim=True)
    return torch.where(total > 0, weights * (length / total), valid.to(weights))
