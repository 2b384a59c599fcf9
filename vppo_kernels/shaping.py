"""Trajectory-level advantage shaping, and the adapter that turns plain advantages into VPPO's (VPPO, Eq. 4 and 5).

The clipped losses of the PPO family are positively homogeneous in the advantage, so the token mask (0 or 1) and the
trajectory factor (above 0) fold into per-token advantages exactly: any trainer that accepts `[B, T]` advantages runs
VPPO unchanged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vppo_kernels import backends, checks
from vppo_kernels.selection import topk_mask

MIN_SPREAD = 1e-6


class TrajectoryStats(NamedTuple):
    """Statistics of the trajectories' mean dependencies; each a scalar tensor, or a number.

    Attributes:
        minimum: Smallest mean.
        maximum: Largest mean.
        mean: Mean of the means.
        trajectories: How many they were taken over; below 2 nothing is shaped.
    """

    minimum: Tensor | float
    maximum: Tensor | float
    mean: Tensor | float
    trajectories: Tensor | float = 2


class Shaped(NamedTuple):
    """Advantages `[B, T]`, the kept tokens `[B, T]` (bool) and the trajectory factor `[B]` they were folded from."""

    advantages: Tensor
    keep: Tensor
    alpha: Tensor


def _row_means(scores: Tensor, valid: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Mean score of each row over its valid tokens, and which rows have any."""
    kernels = backends.token_kernels(backend, scores)
    if kernels is not None and hasattr(kernels, "row_means"):
        return kernels.row_means(scores, valid)
    count = valid.sum(1)
    total = torch.where(valid, scores, 0).sum(1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return total / count.clamp_min(1), count > 0


@torch.no_grad()
def trajectory_stats(
    scores: Tensor, mask: Tensor, *, process_group: Any = None, backend: str = "auto"
) -> TrajectoryStats:  # fmt: skip
    """Minimum, maximum, mean and count of the rows' mean scores, over all ranks of `process_group`.

    Args:
        scores: `[B, T]` dependency of each token; not read where `mask` is 0.
        mask: `[B, T]` bool or 0/1; rows without a valid token are left out.
        process_group: A `torch.distributed` group whose ranks hold parts of the batch; None for this process alone.
        backend: As in `topk_mask`.

    Returns:
        `TrajectoryStats` of scalar tensors on the device of `scores`.
    """
    checks.matrix("scores", scores)
    return _stats(*_row_means(scores, checks.token_mask(mask, scores), backend), process_group)


def _stats(means: Tensor, present: Tensor, process_group: Any) -> TrajectoryStats:
    low = torch.where(present, means, torch.inf).amin(0) if len(means) else means.new_full((), torch.inf)
    high = torch.where(present, means, -torch.inf).amax(0) if len(means) else means.new_full((), -torch.inf)
    total = torch.stack([torch.where(present, means, 0).sum(), present.sum().to(means.dtype)])
    if process_group is not None:
        import torch.distributed as dist

        dist.all_reduce(low, dist.ReduceOp.MIN, group=process_group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=process_group)
        dist.all_reduce(total, dist.ReduceOp.SUM, group=process_group)
    return TrajectoryStats(low, high, total[0] / total[1].clamp_min(1), total[1])


@torch.no_grad()
def trajectory_scale(
    scores: Tensor,
    mask: Tensor,
    *,
    scale_min: float = 0.9,
    scale_max: float | None = None,
    stats: TrajectoryStats | None = None,
    process_group: Any = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Tensor:
    """Factor on each trajectory's advantage, growing with its mean dependency (VPPO, Eq. 5).

    `u = (mean - min) / (max - min)` over the batch, `alpha = scale_min + u (scale_max - scale_min)`.

    Args:
        scores: `[B, T]` dependency of each token; not read where `mask` is 0.
        mask: `[B, T]` bool or 0/1, the response tokens. A row without any has alpha 1 and enters no statistic.
        scale_min: Factor of the least dependent trajectory, above 0.
        scale_max: Factor of the most dependent one; None ("dynamic") makes the mean of alpha over the statistics 1.
        stats: Statistics from elsewhere (another batch, a mini-batch); None takes those of `scores`.
        process_group: Take the statistics over all ranks of this group. Not together with `stats`.
        backend: As in `topk_mask`.
        check: As in `topk_mask`. Unchecked, a NaN makes the whole batch's alpha NaN.

    Returns:
        `[B]` alpha, float32 (float64 for float64 scores). 1 everywhere if the means spread by 1e-6 or less, or if there
        are fewer than two trajectories. Not differentiable.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or not finite when checked.
    """
    checks.matrix("scores", scores)
    checks.positive("scale_min", scale_min)
    if scale_max is not None:
        checks.positive("scale_max", scale_max)
    if stats is not None and process_group is not None:
        raise ValueError("stats: given together with process_group, takes one of the two")
    valid = checks.token_mask(mask, scores)
    if checks.wanted(check, scores):
        checks.all_finite("scores", scores, valid)
    means, present = _row_means(scores, valid, backend)
    if stats is None:
        kernels = backends.token_kernels(backend, scores)
        if kernels is not None and hasattr(kernels, "alpha_of") and process_group is None:
            return kernels.alpha_of(means, present, scale_min, scale_max, MIN_SPREAD)
        stats = _stats(means, present, process_group)
    low, high, mean, count = (torch.as_tensor(x, dtype=means.dtype, device=means.device) for x in stats)
    spread = high - low
    u = (means - low) / spread
    mean_u = ((mean - low) / spread).clamp_min(1e-6)  # given statistics may be of other rows, all at the minimum
    top = scale_min + (1 - scale_min) / mean_u if scale_max is None else scale_max
    alpha = scale_min + u * (top - scale_min)
    flat = (spread <= MIN_SPREAD) | (count < 2)  # a NaN spread compares False, so NaN scores stay visible
    return torch.where(flat | ~present, 1.0, alpha)


def shape_advantages(
    advantages: Tensor,
    dependency: Tensor,
    mask: Tensor,
    *,
    keep_ratio: float = 0.4,
    scale_min: float = 0.9,
    scale_max: float | None = None,
    has_image: Tensor | None = None,
    stats: TrajectoryStats | None = None,
    process_group: Any = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Shaped:
    """`vppo_advantages` with the two parts it is made of. Arguments as there."""
    with torch.no_grad():
        checks.matrix("dependency", dependency)
        valid = checks.token_mask(mask, dependency)
        per_token = expand_advantages(advantages, dependency)
        seen = valid
        if has_image is not None:
            checks.tensor("has_image", has_image)
            checks.shape("has_image", has_image, (dependency.shape[0],), "one entry per trajectory")
            checks.same_device("has_image", has_image, dependency.device, "dependency")
            seen = valid & (has_image != 0).unsqueeze(1)
        if checks.wanted(check, dependency):
            checks.all_finite("dependency", dependency, seen)
            checks.all_finite("advantages", per_token, valid)
        kernels = backends.token_kernels(backend, dependency, advantages)
        backend = "torch" if kernels is None else backend
        keep = topk_mask(dependency, seen, keep_ratio, backend=backend, check=False)
        if has_image is not None:
            keep |= valid & ~(has_image != 0).unsqueeze(1)
        alpha = trajectory_scale(
            dependency,
            seen,
            scale_min=scale_min,
            scale_max=scale_max,
            stats=stats,
            process_group=process_group,
            backend=backend,
            check=False,
        )
        if kernels is not None and hasattr(kernels, "shape"):
            shaped = kernels.shape(advantages, alpha, keep)
        else:
            shaped = torch.where(keep, per_token * alpha.unsqueeze(1).to(per_token.dtype), 0)
    return Shaped(shaped, keep, alpha)


def expand_advantages(advantages: Tensor, like: Tensor) -> Tensor:
    """`[B]` or `[B, T]` advantages as `[B, T]`."""
    checks.floating("advantages", advantages)
    checks.same_device("advantages", advantages, like.device, "the other tensors")
    if advantages.dim() == 1 and advantages.shape[0] == like.shape[0]:
        return advantages.unsqueeze(1).expand(like.shape)
    if advantages.shape != like.shape:
        raise ValueError(
            f"advantages: got shape {list(advantages.shape)}, takes [{like.shape[0]}] or {list(like.shape)}"
        )
    return advantages


def vppo_advantages(
    advantages: Tensor,
    dependency: Tensor,
    mask: Tensor,
    *,
    keep_ratio: float = 0.4,
    scale_min: float = 0.9,
    scale_max: float | None = None,
    has_image: Tensor | None = None,
    stats: TrajectoryStats | None = None,
    process_group: Any = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Tensor:
    """Per-token advantages that make a trainer of clipped losses run VPPO: `alpha * advantages * topk_mask`.

    Args:
        advantages: `[B]` or `[B, T]` floating, as the trainer computed them.
        dependency: `[B, T]` floating dependency of each token on the image, in nats; not read where `mask` is 0.
        mask: `[B, T]` bool or 0/1, the response tokens.
        keep_ratio: Fraction of each trajectory's tokens that keep their gradient, above 0 and at most 1.
        scale_min: Factor on the advantage of the least dependent trajectory.
        scale_max: Factor of the most dependent one; None makes the mean factor 1.
        has_image: `[B]` bool; a row without an image keeps all its tokens, has alpha 1 and enters no statistic.
        stats: Statistics from elsewhere, see `trajectory_scale`.
        process_group: Take the statistics over all ranks of this group.
        backend: As in `topk_mask`.
        check: As in `topk_mask`. Unchecked, a NaN dependency makes every advantage of the batch NaN.

    Returns:
        `[B, T]` in the dtype of `advantages`; 0 at filtered tokens and padding. Not differentiable.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or not finite when checked.
    """
    return shape_advantages(
        advantages,
        dependency,
        mask,
        keep_ratio=keep_ratio,
        scale_min=scale_min,
        scale_max=scale_max,
        has_image=has_image,
        stats=stats,
        process_group=process_group,
        backend=backend,
        check=check,
    ).advantages
