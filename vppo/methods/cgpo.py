"""CGPO: tokens that its evidence moves, and tokens of high entropy (DOI 10.1145/3767308.3835969)."""

from __future__ import annotations

import torch
from torch import Tensor

from vppo.methods.tokens import checked
from vppo_kernels import arguments, topk_mask
from vppo_kernels.statistics import DivergenceOutput


@torch.no_grad()
def cgpo_weights(
    views: DivergenceOutput,
    mask: Tensor,
    evidence: Tensor | None = None,
    *,
    perception_ratio: float = 0.3,
    entropy_ratio: float = 0.3,
    scale: float = 0.1,
) -> Tensor:
    """Factors on the advantages of CGPO: `alpha` of its response at a perceptive token, 1 at an uncertain one, else 0.

    The perturbed view has to be the paper's: the image in which the regions that the response itself names as evidence
    are filled with their mean colour. Perceptive are the tokens of highest divergence in the batch, and those that name
    the evidence; uncertain are those of highest entropy in the batch. With `S` the mean divergence of a response,
    `alpha = 1 + scale * tanh((S - median) / MAD)`, the median and the median absolute deviation over the batch.

    Args:
        views: Of `linear_divergence`; `divergence` and `entropy` are read, each `[B, T]` floating in nats.
        mask: `[B, T]` bool or 0/1, the response tokens; nothing else is read.
        evidence: `[B, T]` bool or 0/1, the tokens that name regions; None for none.
        perception_ratio, entropy_ratio: Fractions of the batch's tokens, above 0 and at most 1 (0.3 in the paper).
        scale: At least 0 (lambda; 0.1 in the paper).

    Returns:
        `[B, T]` float32 (float64 for float64), 0 at padding. Not differentiable.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or, on a CPU, not finite.
    """
    arguments.fraction("perception_ratio", perception_ratio)
    arguments.fraction("entropy_ratio", entropy_ratio)
    arguments.non_negative("scale", scale)
    valid, divergence, entropy = checked(mask, divergence=views.divergence, entropy=views.entropy)
    perceptive = _top(divergence, valid, perception_ratio)
    if evidence is not None:
        perceptive |= valid & arguments.token_mask(evidence, divergence, "evidence")
    present = valid.any(1)
    means = divergence.sum(1) / valid.sum(1).clamp(min=1)
    alpha = torch.ones_like(means)
    if present.sum() > 1:
        median = means[present].median()  # of an even number the lower one of the two, as in the released code
        spread = (means[present] - median).abs().median()
        alpha = 1 + scale * torch.tanh((means - median) / (spread + 1e-8))
    return torch.where(perceptive, alpha.unsqueeze(1), _top(entropy, valid, entropy_ratio).to(alpha))


def _top(values: Tensor, valid: Tensor, ratio: float) -> Tensor:
    """The highest of the whole batch's valid values; the earlier wins among equals."""
    return topk_mask(values.reshape(1, -1), valid.reshape(1, -1), ratio).view_as(valid)
