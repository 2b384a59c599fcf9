"""Trajectory-level advantage shaping, and the adapter that turns plain advantages into VPPO's (VPPO, Eq. 4 and 5).

The clipped losses of the PPO family are positively homogeneous in the advantage, so the token mask (0 or 1) and the
trajectory factor (above 0) can be multiplied into per-token advantages, exactly: any trainer that accepts `[B, T]`
advantages runs VPPO unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vppo_kernels import arguments, backends, vocab_parallel
from vppo_kernels.backends.protocols import TokenOps, TrajectoryStats
from vppo_kernels.backends.torch_tokens import stats_of
from vppo_kernels.layout import Layout, layout_of


class Shaped(NamedTuple):
    """Shaped advantages and kept tokens (bool), `[B, T]` or `[total]`, and the trajectory factors, `[B]`."""

    advantages: Tensor
    keep: Tensor
    alpha: Tensor


@dataclass(frozen=True)
class Gate:
    """Which tokens keep their gradient; `topk_mask` says what the two mean.

    Raises:
        ValueError: A value is out of its range.
    """

    keep_ratio: float
    keep_threshold: float | None = None

    def __post_init__(self) -> None:
        arguments.fraction("keep_ratio", self.keep_ratio)
        arguments.threshold("keep_threshold", self.keep_threshold)


@dataclass(frozen=True)
class ScaleOptions:
    """The knobs of the trajectory factor; `trajectory_scale` says what they mean.

    Raises:
        TypeError, ValueError: A value is of the wrong type or out of its range.
    """

    scale_min: float
    scale_max: float | None
    stats: TrajectoryStats | None
    stats_group: Any

    def __post_init__(self) -> None:
        arguments.scales(self.scale_min, self.scale_max)
        vocab_parallel.check_group("stats_group", self.stats_group)
        stats = self.stats
        if stats is not None and not (isinstance(stats, tuple) and len(stats) == len(TrajectoryStats._fields)):
            raise TypeError(f"stats: got {stats!r:.80}, takes a TrajectoryStats")
        if stats is not None and self.stats_group is not None:
            raise ValueError("stats: given together with stats_group, takes one of the two")

    def scale(self, ops: TokenOps, scores: Tensor, valid: Tensor, layout: Layout) -> Tensor:
        """The factor of each trajectory, `[B]`, from scores that are checked."""
        means, present = ops.row_means(scores, valid, layout)
        stats = self.stats if self.stats_group is None else stats_of(means, present, self.stats_group)
        return ops.trajectory_scale(means, present, stats, self.scale_min, self.scale_max)


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
        cu_seqlens: As in `topk_mask`; checked on the CPU.
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
    means, present = backends.token_ops(backend, scores).row_means(scores, valid, layout)
    return stats_of(means, present, stats_group)


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
    options = ScaleOptions(scale_min, scale_max, stats, stats_group)
    valid = layout.within(arguments.token_mask(mask, scores))
    if arguments.wanted(check, scores):
        arguments.all_finite("scores", scores, valid)
        arguments.summable("scores", scores, valid)
    return options.scale(backends.token_ops(backend, scores), scores, valid, layout)


def shape_advantages(
    advantages: Tensor,
    dependency: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    keep_ratio: float = 0.4,
    keep_threshold: float | None = None,
    scale_min: float = 0.9,
    scale_max: float | None = None,
    has_image: Tensor | None = None,
    stats: TrajectoryStats | None = None,
    stats_group: Any = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Shaped:
    """As `vppo_advantages`, and the mask and the factors that the advantages were multiplied by."""
    layout = layout_of("dependency", dependency, cu_seqlens, check)
    options = ScaleOptions(scale_min, scale_max, stats, stats_group)
    valid = layout.within(arguments.token_mask(mask, dependency))
    ops = backends.token_ops(backend, dependency, advantages)
    check_values = arguments.wanted(check, dependency)
    gate = Gate(keep_ratio, keep_threshold)
    return apply_shaping(advantages, dependency, valid, has_image, gate, options, layout, ops, check_values)


@torch.no_grad()
def apply_shaping(
    advantages: Tensor,
    dependency: Tensor,
    valid: Tensor,
    has_image: Tensor | None,
    gate: Gate,
    options: ScaleOptions,
    layout: Layout,
    ops: TokenOps,
    check_values: bool,
) -> Shaped:
    """`shape_advantages` with all arguments checked but `advantages` and `has_image`."""
    per_token = expand_advantages(advantages, dependency, layout)
    seen = valid
    if has_image is not None:
        arguments.tensor("has_image", has_image)
        arguments.shape("has_image", has_image, (layout.count,), "one entry per trajectory")
        arguments.same_device("has_image", has_image, dependency.device, "dependency")
        seen = valid & layout.spread(has_image != 0)
    if check_values:
        arguments.all_finite("dependency", dependency, seen)
        arguments.summable("dependency", dependency, seen)
        arguments.all_finite("advantages", per_token, valid)
    keep = ops.topk(dependency, seen, gate.keep_ratio, gate.keep_threshold, layout)
    if has_image is not None:
        keep |= valid & ~seen
    alpha = options.scale(ops, dependency, seen, layout)
    return Shaped(ops.shape(advantages, alpha, keep, layout), keep, alpha)


def expand_advantages(advantages: Tensor, like: Tensor, layout: Layout) -> Tensor:
    """Advantages of trajectories, `[B]`, or of tokens as those of tokens."""
    arguments.floating("advantages", advantages)
    arguments.same_device("advantages", advantages, like.device, "the other tensors")
    if advantages.shape != like.shape and tuple(advantages.shape) != (layout.count,):
        raise ValueError(
            f"advantages: got shape {list(advantages.shape)}, takes [{layout.count}] or {list(like.shape)}"
        )
    return layout.expand(advantages)


def vppo_advantages(
    advantages: Tensor,
    dependency: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    keep_ratio: float = 0.4,
    keep_threshold: float | None = None,
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
        keep_threshold: Dependency that those have to exceed, in nats, finite and at least 0; None for no such bound. A
            trajectory that nowhere exceeds it carries no gradient.
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
        keep_threshold=keep_threshold,
        scale_min=scale_min,
        scale_max=scale_max,
        has_image=has_image,
        stats=stats,
        stats_group=stats_group,
        backend=backend,
        check=check,
    ).advantages
