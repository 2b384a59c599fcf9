"""VEPO: tokens that are uncertain and whose distribution the image moves (arXiv 2606.03937)."""

from __future__ import annotations

import torch
from torch import Tensor

from vppo.methods.tokens import checked, share, unit_range
from vppo_kernels import topk_mask
from vppo_kernels.statistics import DivergenceOutput


@torch.no_grad()
def vepo_scores(views: DivergenceOutput, mask: Tensor, *, jsd_share: float = 0.7) -> Tensor:
    """`(1 - (1 - J)^a (1 - G)^(1 - a)) H`, the score D of VEPO's released code.

    `J` is the Jensen-Shannon divergence of the two views, `G` the size of the difference of their entropies, `H` the
    entropy given the clean image, each moved to 0..1 within its response; `a` is `jsd_share`.

    Args:
        views: Of `linear_divergence(..., kind="jsd")`; `divergence`, `entropy` and `entropy_perturbed` are read, each
            `[B, T]` floating in nats.
        mask: `[B, T]` bool or 0/1, the response tokens; nothing else is read.
        jsd_share: From 0 to 1 (alpha; 0.7 in the released script).

    Returns:
        `[B, T]` float32 (float64 for float64) in 0..1, 0 at padding. Not differentiable.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or, on a CPU, not finite.
    """
    share("jsd_share", jsd_share)
    valid, jsd, entropy, perturbed = checked(
        mask, divergence=views.divergence, entropy=views.entropy, entropy_perturbed=views.entropy_perturbed
    )
    moved, gap = unit_range(jsd, valid), unit_range((perturbed - entropy).abs(), valid)
    visual = 1 - (1 - moved).pow(jsd_share) * (1 - gap).pow(1 - jsd_share)
    return visual * unit_range(entropy, valid)


@torch.no_grad()
def vepo_weights(
    views: DivergenceOutput, mask: Tensor, *, keep_ratio: float = 0.2, jsd_share: float = 0.7
) -> Tensor:  # fmt: skip
    """Factors on the advantages of VEPO: the `ceil(keep_ratio * n)` tokens of highest score in each response.

    The released loss is a mean over the tokens that are kept. So a kept token weighs as much as the batch has tokens
    for each one kept, and the mean over all tokens, of any clipped loss, is that mean.

    Args:
        views, mask, jsd_share: As in `vepo_scores`.
        keep_ratio: Above 0 and at most 1 (0.2 in the released script).

    Returns:
        `[B, T]` float32 (float64 for float64), 0 where a token is not kept. Not differentiable.

    Raises:
        TypeError, ValueError: As in `vepo_scores`.
    """
    scores = vepo_scores(views, mask, jsd_share=jsd_share)
    keep = topk_mask(scores, mask, keep_ratio)
    return keep * ((mask != 0).sum() / keep.sum().clamp(min=1)).to(scores)
