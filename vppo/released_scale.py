"""The trajectory factor as the paper's released code computes it, from a device's mini-batch and micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from vppo_kernels import TrajectoryStats, trajectory_scale


def micro_batch_scale(means: Tensor, window: Tensor, scale_min: float, scale_max: float | None) -> Tensor:
    """Factors by the minimum and maximum of this device's mini-batch and the mean of this micro-batch.

    Args:
        means: `[rows]` mean scores of the responses of a micro-batch, NaN for one that enters no statistic.
        window: `[N]` those of the mini-batch, of which it is a part.
        scale_min, scale_max: As in `vppo_kernels.trajectory_scale`.

    Returns:
        `[rows]`, 1 for a response that enters no statistic.
    """
    window = window[~window.isnan()]
    present = ~means.isnan()
    if not len(window) or not present.any():
        return torch.ones_like(means)
    stats = TrajectoryStats(window.min(), window.max(), means[present].mean(), len(window))
    alpha = trajectory_scale(
        means.nan_to_num().unsqueeze(1),
        present.unsqueeze(1),
        scale_min=scale_min,
        scale_max=scale_max,
        stats=stats,
    )
    # a micro-batch of minima alone has mean u = 0, and the factor of maximal u is infinite: u = 0 does not need it
    return torch.where(alpha.isnan() & (means == window.min()), scale_min, alpha)
