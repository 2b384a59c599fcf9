"""The token operations in plain torch: any device, any dtype, packed or not, and code that `torch.compile` traces."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vppo_kernels.backends.protocols import TrajectoryStats
from vppo_kernels.backends.torch_loss import clipped_loss
from vppo_kernels.layout import Layout, Packed

__all__ = ["clipped_loss", "keep_counts", "row_means", "shape", "stats_of", "topk", "topk_", "trajectory_scale"]

MIN_SPREAD = 1e-6  # of the trajectories' means: closer ones are taken for equal, and nothing is scaled


def keep_counts(lengths: Tensor, keep_ratio: float) -> Tensor:
    """`ceil(keep_ratio * n)` of each length, as int64 on its device."""
    # 0.07 * 100 is 7.000000000000001 in binary: step below the rounding before the ceiling
    return torch.ceil(lengths.double() * keep_ratio * (1 - 2**-40)).long()


def topk(scores: Tensor, valid: Tensor, keep_ratio: float, keep_threshold: float | None, layout: Layout) -> Tensor:
    """See `TokenOps`."""
    if keep_threshold is not None:  # a NaN exceeds it, as it ranks above every number
        wide = scores.float() if scores.dtype.itemsize < 4 else scores
        return topk(scores, valid, keep_ratio, None, layout) & ~(wide <= keep_threshold)
    padding_last = torch.where(valid, scores.clamp_min(torch.finfo(scores.dtype).min), -math.inf)
    if isinstance(layout, Packed):
        return _topk_packed(padding_last, valid, keep_ratio, layout)
    order = padding_last.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))
    return (rank < keep_counts(valid.sum(1), keep_ratio).unsqueeze(1)) & valid


def _topk_packed(padding_last: Tensor, valid: Tensor, keep_ratio: float, layout: Packed) -> Tensor:
    order = padding_last.sort(descending=True, stable=True).indices
    order = order[layout.row[order].sort(stable=True).indices]  # by row, then by score, then by place
    # where each token's row begins in this order; tokens of no row come last
    first = layout.spread(layout.offsets[:-1] - layout.offsets[0])
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first[order]
    return (rank < layout.spread(keep_counts(layout.sum(valid, torch.int64), keep_ratio))) & valid


def topk_(scores: Tensor, valid: Tensor, keep_ratio: float, keep_threshold: float | None, layout: Layout) -> Tensor:
    """See `TokenOps`."""
    return scores.copy_(topk(scores, valid, keep_ratio, keep_threshold, layout))


def row_means(scores: Tensor, valid: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """See `TokenOps`."""
    count = layout.sum(valid, torch.int64)
    total = layout.sum(torch.where(valid, scores, 0), torch.promote_types(scores.dtype, torch.float32))
    return total / count.clamp_min(1), count > 0


def stats_of(means: Tensor, present: Tensor, group: Any = None) -> TrajectoryStats:
    """Statistics of the means of the trajectories that have any token, over all ranks of a process group."""
    low = torch.where(present, means, torch.inf).amin(0) if len(means) else means.new_full((), torch.inf)
    high = torch.where(present, means, -torch.inf).amax(0) if len(means) else means.new_full((), -torch.inf)
    total = torch.stack([torch.where(present, means, 0).sum(), present.sum().to(means.dtype)])
    if group is not None:
        dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
        dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    return TrajectoryStats(low, high, total[0] / total[1].clamp_min(1), total[1])


def trajectory_scale(
    means: Tensor, present: Tensor, stats: TrajectoryStats | None, scale_min: float, scale_max: float | None
) -> Tensor:
    """See `TokenOps`."""
    stats = stats_of(means, present) if stats is None else stats
    low, high, mean, count = (torch.as_tensor(x, dtype=means.dtype, device=means.device) for x in stats)
    spread = high - low
    u = (means - low) / spread
    mean_u = ((mean - low) / spread).clamp_min(1e-6)  # given statistics may be of other rows, all at the minimum
    top = scale_min + (1 - scale_min) / mean_u if scale_max is None else scale_max
    alpha = scale_min + u * (top - scale_min)
    flat = (spread <= MIN_SPREAD) | (count < 2)  # a NaN spread compares False, so NaN scores stay visible
    return torch.where(flat | ~present, 1.0, alpha)


def shape(advantages: Tensor, alpha: Tensor, keep: Tensor, layout: Layout) -> Tensor:
    """See `TokenOps`."""
    per_token = layout.expand(advantages)
    return torch.where(keep, per_token * layout.spread(alpha).to(per_token.dtype), 0)
