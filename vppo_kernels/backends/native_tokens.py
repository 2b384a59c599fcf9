"""The token operations with the top-k mask of the native library; the others are plain torch, whose time is nothing.

The library takes single precision; scores of 16 bits are converted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vppo_kernels.backends.torch_tokens import clipped_loss, row_means, shape, trajectory_scale
from vppo_kernels.layout import Layout, Packed
from vppo_kernels.native_library import library

__all__ = ["clipped_loss", "row_means", "shape", "topk", "topk_", "trajectory_scale"]


def topk(scores: Tensor, valid: Tensor, keep_ratio: float, keep_threshold: float | None, layout: Layout) -> Tensor:
    """See `TokenOps`."""
    # unchecked offsets may leave tokens between rows, which are not written
    blank = torch.zeros_like if layout.packed else torch.empty_like
    scores = scores.resolve_neg().contiguous()
    keep = blank(scores, dtype=torch.bool)
    _write_mask(scores, valid, keep_ratio, keep_threshold, layout, keep)
    return keep


def topk_(scores: Tensor, valid: Tensor, keep_ratio: float, keep_threshold: float | None, layout: Layout) -> Tensor:
    """See `TokenOps`."""
    if layout.packed or scores.dtype != torch.float32 or scores.is_neg() or not scores.is_contiguous():
        return scores.copy_(topk(scores, valid, keep_ratio, keep_threshold, layout))
    _write_mask(scores, valid, keep_ratio, keep_threshold, layout, scores)
    return scores


def _write_mask(
    scores: Tensor, valid: Tensor, keep_ratio: float, keep_threshold: float | None, layout: Layout, out: Tensor
) -> None:
    """The mask goes to `out`, which may be `scores`; both contiguous."""
    offsets = layout.offsets if isinstance(layout, Packed) else None
    operations = library(scores.device.type)
    detached = scores.detach().float()
    operations.topk_mask(detached, valid.contiguous(), keep_ratio, keep_threshold, offsets, out.detach())
