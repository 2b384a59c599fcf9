"""Trajectory-level advantage shaping, and the adapter that turns plain advantages into VPPO's (VPPO, Eq. 4 and 5).

The clipped losses of the PPO family are positively homogeneous in the advantage, so the token mask (0 or 1) and the
trajectory factor (above 0) fold into per-token advantages exactly: any trainer that accepts `[B, T]` advantages runs
VPPO unchanged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vppo_kernels import arguments, backends, vocab_parallel
from vppo_kernels.layout import Layout, layout_of
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
    """Advantages and kept tokens (bool), `[B, T]` or `[total]`, and the trajectory factor `[B]` folded into them."""

    advantages: Tensor
    keep: Tensor
    alpha: Tensor


def _row_means(scores: Tensor, valid: Tensor, layout: Layout, backend: str) -> tuple[Tensor, Tensor]:
    """Mean score of each row over its valid tokens, and which rows have any."""
    kernels = backends.token_kernels(backend, scores)
    if kernels is not None and hasattr(kernels, "row_means") and not layout.packed:
        return kernels.row_means(scores, valid)
    count = layout.sum(valid, torch.int64)
    total = layout.sum(torch.where(valid, scores, 0), torch.promote_types(scores.dtype, torch.float32))
    return total / count.clamp_min(1), count > 0


@torch.no_grad()
def trajectory_stats(
    scores: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    stats_group: Any = None,
    backend: str = "auto",
) -> TrajectoryStats:
    """Minimum, maximum, mean and count of the rows' mean scores, over all ranks of `stats_group`.

    Args:
        scores: `[B, T]` dependency of each token, or `[total]` with `cu_seqlens`; not read where `mask` is 0.
        mask: Bool or 0/1 like `scores`; rows without a valid token are left out.
        cu_seqlens: As in `topk_mask`; looked at on the CPU.
        stats_group: A `torch.distributed` group whose ranks hold parts of the batch; None for this process alone.
        backend: As in `topk_mask`; packed rows are averaged in plain torch.

    Returns:
        `TrajectoryStats` of scalar tensors on the device of `scores`.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range.
    """
    vocab_parallel.check_group("stats_group", stats_group)
    layout = layout_of("scores", scores, cu_seqlens, check=None)
    valid = layout.within(arguments.token_mask(mask, scores))
    return _stats(*_row_means(scores, valid, layout, backend), stats_group)


def _stats(means: Tensor, present: Tensor, stats_group: Any) -> TrajectoryStats:
    low = torch.where(present, means, torch.inf).amin(0) if len(means) else means.new_full((), torch.inf)
    high = torch.where(present, means, -torch.inf).amax(0) if len(means) else means.new_full((), -torch.inf)
    total = torch.stack([torch.where(present, means, 0).sum(), present.sum().to(means.dtype)])
    if stats_group is not None:
        dist.all_reduce(low, dist.ReduceOp.MIN, group=stats_group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=stats_group)
        dist.all_reduce(total, dist.ReduceOp.SUM, group=stats_group)
    return TrajectoryStats(low, high, total[0] / total[1].clamp_min(1), total[1])


def _check_scaling(scale_min: float, scale_max: float | None, stats: TrajectoryStats | None, stats_group: Any) -> None:
    arguments.scales(scale_min, scale_max)
    vocab_parallel.check_group("stats_group", stats_group)
    if stats is not None and not (isinstance(stats, tuple) and len(stats) == len(TrajectoryStats._fields)):
        raise TypeError(f"stats: got {stats!r:.80}, takes a TrajectoryStats")
    if stats is not None and stats_group is not None:
        raise ValueError("stats: given together with stats_group, takes one of the two")


@torch.no_grad()
def trajectory_scale(
    scores: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale_min: float = 0.9,
    scale_max: float | None = None,
    stats: TrajectoryStats | None = None,
    stats_group: Any = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Tensor:
    """Factor on each trajectory's advantage, growing with its mean dependency (VPPO, Eq. 5).

    `u = (mean - min) / (max - min)` over the batch, `alpha = scale_min + u (scale_max - scale_min)`.

    Args:
        scores: `[B, T]` dependency of each token, or `[total]` with `cu_seqlens`; not read where `mask` is 0.
        mask: Bool or 0/1 like `scores`, the response tokens. A row without any has alpha 1 and enters no statistic.
        cu_seqlens: As in `topk_mask`.
        scale_min: Factor of the least dependent trajectory, above 0; at most 1 where `scale_max` is None.
        scale_max: Factor of the most dependent one, at least `scale_min`; None ("dynamic") makes the mean of alpha over
            the statistics 1.
        stats: Statistics from elsewhere (another batch, a mini-batch); None takes those of `scores`.
        stats_group: Take the statistics over all ranks of this group. Not together with `stats`.
        backend: As in `topk_mask`.
        check: As in `topk_mask`. Unchecked, a NaN makes the whole batch's alpha NaN.

    Returns:
        `[B]` alpha, float32 (float64 for float64 scores). 1 everywhere if the means spread by 1e-6 or less, or if there
        are fewer than two trajectories. Not differentiable.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or not finite when checked.
    """
    layout = layout_of("scores", scores, cu_seqlens, check)
    _check_scaling(scale_min, scale_max, stats, stats_group)
    valid = layout.within(arguments.token_mask(mask, scores))
    if arguments.wanted(check, scores):
        arguments.all_finite("scores", scores, valid)
        arguments.summable("scores", scores, valid)
    return _scale(scores, valid, layout, scale_min, scale_max, stats, stats_group, backend)


def _scale(
    scores: Tensor,
    valid: Tensor,
    layout: Layout,
    scale_min: float,
    scale_max: float | None,
    stats: TrajectoryStats | None,
    stats_group: Any,
    backend: str,
) -> Tensor:
    """`trajectory_scale` of arguments that are checked."""
    means, present = _row_means(scores, valid, layout, backend)
    if stats is None:
        kernels = backends.token_kernels(backend, scores)
        if kernels is not None and hasattr(kernels, "alpha_of") and stats_group is None:
            return kernels.alpha_of(means, present, scale_min, scale_max, MIN_SPREAD)
        stats = _stats(means, present, stats_group)
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
    cu_seqlens: Tensor | None = None,
    keep_ratio: float = 0.4,
    scale_min: float = 0.9,
    scale_max: float | None = None,
    has_image: Tensor | None = None,
    stats: TrajectoryStats | None = None,
    stats_group: Any = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Shaped:
    """`vppo_advantages` with the two parts it is made of. Arguments as there."""
    with torch.no_grad():
        layout = layout_of("dependency", dependency, cu_seqlens, check)
        _check_scaling(scale_min, scale_max, stats, stats_group)
        valid = layout.within(arguments.token_mask(mask, dependency))
        per_token = expand_advantages(advantages, dependency, layout)
        seen = valid
        if has_image is not None:
            arguments.tensor("has_image", has_image)
            arguments.shape("has_image", has_image, (layout.count,), "one entry per trajectory")
            arguments.same_device("has_image", has_image, dependency.device, "dependency")
            seen = valid & layout.spread(has_image != 0)
        if arguments.wanted(check, dependency):
            arguments.all_finite("dependency", dependency, seen)
            arguments.summable("dependency", dependency, seen)
            arguments.all_finite("advantages", per_token, valid)
        kernels = backends.token_kernels(backend, dependency, advantages)
        backend = "torch" if kernels is None else backend
        keep = topk_mask(dependency, seen, keep_ratio, cu_seqlens=cu_seqlens, backend=backend, check=False)
        if has_image is not None:
            keep |= valid & ~seen
        alpha = _scale(dependency, seen, layout, scale_min, scale_max, stats, stats_group, backend)
        if kernels is not None and hasattr(kernels, "shape") and not layout.packed:
            shaped = kernels.shape(advantages, alpha, keep)
        else:
            shaped = torch.where(keep, per_token * layout.spread(alpha).to(per_token.dtype), 0)
    return Shaped(shaped, keep, alpha)


def expand_advantages(advantages: Tensor, like: Tensor, layout: Layout) -> Tensor:
    """Advantages of trajectories, `[B]`, or of tokens as those of tokens."""
    arguments.floating("advantages", advantages)
    arguments.same_device("advantages", advantages, like.device, "the other tensors")
    if advantages.dim() == 1 and advantages.shape[0] == layout.count:
        return layout.spread(advantages)
    if advantages.shape != like.shape:
        raise ValueError(
            f"advantages: got shape {list(advantages.shape)}, takes [{layout.count}] or {list(like.shape)}"
        )
    return advantages


def vppo_advantages(
    advantages: Tensor,
    dependency: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    keep_ratio: float = 0.4,
    scale_min: float = 0.9,
    scale_max: float | None = None,
    has_image: Tensor | None = None,
    stats: TrajectoryStats | None = None,
    stats_group: Any = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Tensor:
    """Per-token advantages that make a trainer of clipped losses run VPPO: `alpha * advantages * topk_mask`.

    Args:
        advantages: `[B]`, or like `dependency`, floating, as the trainer computed them; read as `[B]` where there are
            as many packed tokens as trajectories.
        dependency: `[B, T]` floating dependency of each token on the image, in nats, or `[total]` with `cu_seqlens`;
            not read where `mask` is 0.
        mask: Bool or 0/1 like `dependency`, the response tokens.
        cu_seqlens: As in `topk_mask`, for packed trajectories.
        keep_ratio: Fraction of each trajectory's tokens that keep their gradient, above 0 and at most 1.
        scale_min: Factor on the advantage of the least dependent trajectory; at most 1 where `scale_max` is None.
        scale_max: Factor of the most dependent one, at least `scale_min`; None makes the mean factor 1.
        has_image: `[B]` bool; a row without an image keeps all its tokens, has alpha 1 and enters no statistic.
        stats: Statistics from elsewhere, see `trajectory_scale`.
        stats_group: Take the statistics over all ranks of this group. Not together with `stats`.
        backend: As in `topk_mask`; of packed trajectories only the mask is a kernel's, the rest plain torch.
        check: As in `topk_mask`. Unchecked, a NaN dependency makes every advantage of the batch NaN.

    Returns:
        Like `dependency`, in the dtype of `advantages`; 0 at filtered tokens and padding. Not differentiable.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or not finite when checked.
    """
    return shape_advantages(
        advantages,
        dependency,
        mask,
        cu_seqlens=cu_seqlens,
        keep_ratio=keep_ratio,
        scale_min=scale_min,
        scale_max=scale_max,
        has_image=has_image,
        stats=stats,
        stats_group=stats_group,
        backend=backend,
        check=check,
    ).advantages
