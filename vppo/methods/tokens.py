"""Statistics over response tokens alone: what padding holds is never read, NaN included."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vppo_kernels import arguments


def checked(mask: Tensor, **values: Tensor | None) -> tuple[Tensor, ...]:
    """The mask as bool, and the values in float32 (float64 stays) with 0 at padding.

    Args:
        mask: `[B, T]` bool or 0/1.
        values: `[B, T]` floating, by the names that a message would use.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape or device, or, on a CPU, not finite at a response
            token.
    """
    found: list[Tensor] = []
    for name, value in values.items():
        arguments.matrix(name, value)
        assert value is not None
        if not value.shape[1]:
            raise ValueError(f"{name}: got shape {list(value.shape)}, takes [B, T], T at least 1")
        valid = arguments.token_mask(mask, value)
        if arguments.wanted(None, value):
            arguments.all_finite(name, value, valid)
        wide = value if value.dtype == torch.float64 else value.float()
        found.append(torch.where(valid, wide, 0))
    return (valid, *found)


def unit_range(values: Tensor, valid: Tensor) -> Tensor:
    """Each row's valid values moved to 0..1, its smallest to 0 and its largest to 1; 0 where all are equal."""
    low = values.masked_fill(~valid, math.inf).amin(1, keepdim=True)
    high = values.masked_fill(~valid, -math.inf).amax(1, keepdim=True)
    differ = valid & (high > low)
    return torch.where(differ, (values - low) / (high - low), 0)


def inside(name: str, value: float) -> None:
    """Raise unless a number lies strictly between 0 and 1."""
    if not (isinstance(value, int | float) and 0 < value < 1):
        raise ValueError(f"{name}: got {value!r}, takes a number above 0 and below 1")


def share(name: str, value: float) -> None:
    """Raise unless a number lies in 0..1."""
    if not (isinstance(value, int | float) and 0 <= value <= 1):
        raise ValueError(f"{name}: got {value!r}, takes a number from 0 to 1")
