"""How trajectories lie in memory: as the rows of `[B, T]`, or packed, one after the other in `[total]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vppo_kernels import arguments


class Padded:
    """Trajectory i is row i of `[B, T]`."""

    packed = False

    def __init__(self, like: Tensor) -> None:
        self.shape, self.count = like.shape, like.shape[0]
        self.width: int | Tensor = max(like.shape[1], 1)

    def within(self, mask: Tensor) -> Tensor:
        """The mask without tokens that belong to no trajectory."""
        return mask

    def sum(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum over each trajectory, `[B]`."""
        return values.sum(1, dtype=dtype)

    def spread(self, values: Tensor) -> Tensor:
        """Values of trajectories, `[B]`, repeated at each of their tokens."""
        return values.unsqueeze(1).expand(self.shape)

    def expand(self, values: Tensor) -> Tensor:
        """Values of trajectories, `[B]`, or of tokens as those of tokens."""
        return self.spread(values) if values.dim() == 1 else values

    def as_rows(self, values: Tensor) -> Tensor:
        """Values of tokens as the matrix that kernels take."""
        return values


class Packed:
    """Trajectory i lies from `offsets[i]` to `offsets[i + 1]` of `[total]`; the rest belongs to none."""

    packed = True

    def __init__(self, like: Tensor, cu_seqlens: Tensor) -> None:
        self.shape, self.count = like.shape, cu_seqlens.shape[0] - 1
        total = like.shape[0]
        # offsets that nobody has checked are forced into order and into range
        self.offsets = cu_seqlens.long().clamp(0, total).cummax(0).values
        places = torch.arange(total, device=like.device)
        row = torch.bucketize(places, self.offsets[1:], right=True)
        self.row = torch.where(places >= self.offsets[0], row, self.count)  # of each token; `count` for none

    @property
    def width(self) -> int | Tensor:
        """Length of the longest trajectory: the T of these trajectories when they are padded."""
        return self.offsets.diff().amax().clamp_min(1) if self.count else 1

    def within(self, mask: Tensor) -> Tensor:
        return mask & (self.row < self.count)

    def sum(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        sums = torch.segment_reduce(values.double(), "sum", offsets=self.offsets, unsafe=True)
        return sums.to(dtype)

    def spread(self, values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(1)])[self.row]

    def expand(self, values: Tensor) -> Tensor:
        return self.spread(values) if values.shape[0] == self.count else values

    def as_rows(self, values: Tensor) -> Tensor:
        return values.unsqueeze(0)


Layout = Padded | Packed


def layout_of(name: str, value: Any, cu_seqlens: Any, check: bool | None) -> Layout:
    """The layout of trajectories in `value`; its type and shape, and `cu_seqlens`, are checked.

    Raises:
        TypeError, ValueError: `value` or `cu_seqlens` is of the wrong type, shape or device, or offsets are out of
            order where values are checked.
    """
    if cu_seqlens is None:
        arguments.matrix(name, value)
        return Padded(value)
    arguments.floating(name, value)
    if value.dim() != 1:
        raise ValueError(f"{name}: got shape {list(value.shape)}, takes [total] with cu_seqlens")
    arguments.offsets("cu_seqlens", cu_seqlens, value, name, arguments.wanted(check, value))
    return Packed(value, cu_seqlens)
