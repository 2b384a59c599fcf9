"""Argument checks: every message names the argument, what it got and what it takes."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
        raise ValueError(f"{name}: got {value!r}, takes a finite number above 0")


def denominator(value: Any, check_values: bool) -> None:
    """What a loss is divided by: a number above 0, or a tensor of one; on a GPU its value is not checked."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"denominator: got a tensor of shape {list(value.shape)}, takes one of a single number")
        if check_values and value.device.type == "cpu" and not 0 < value.item() < math.inf:
            raise ValueError(f"denominator: got {value.item()!r}, takes a finite number above 0")
    elif value is not None:
        positive("denominator", value)


def non_negative(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 <= value < math.inf):
        raise ValueError(f"{name}: got {value!r}, takes a finite number of at least 0")


def finite(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and abs(value) < math.inf):  # torch.compile cannot trace isfinite
        raise ValueError(f"{name}: got {value!r}, takes a finite number")


def fraction(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 < value <= 1):
        raise ValueError(f"{name}: got {value!r}, takes a number above 0 and at most 1")


def threshold(name: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, int | float) and 0 <= value <= torch.finfo(torch.float32).max):
        raise ValueError(f"{name}: got {value!r}, takes None or a finite number of at least 0")


def scales(scale_min: float, scale_max: float | None) -> None:
    """Factors of the least and of the most dependent trajectory; a `scale_max` of None makes the mean factor 1."""
    positive("scale_min", scale_min)
    if scale_max is None:
        if scale_min > 1:  # the factors' mean of 1 would lie below the smallest
            raise ValueError(f"scale_min: got {scale_min!r}, takes a number of at most 1 unless scale_max is given")
        return
    positive("scale_max", scale_max)
    if scale_max < scale_min:
        raise ValueError(f"scale_max: got {scale_max!r}, takes None or a number of at least scale_min ({scale_min!r})")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, takes one of {list(choices)}")


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a torch.Tensor")


def floating(name: str, value: Any) -> None:
    tensor(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {value.dtype}, takes float32, bfloat16, float16 or float64")


def shape(name: str, value: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: got shape {list(value.shape)}, takes {list(expected)} ({why})")


def reverse_mode(*values: Tensor | None) -> None:
    """Raise where an input carries a forward-mode tangent, which these operations would drop in silence."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in values):
        raise NotImplementedError(
            "forward-mode differentiation (torch.func.jvp) is not there for this operation, takes reverse mode only"
        )


def same_device(name: str, value: Tensor, device: torch.device, other: str) -> None:
    if value.device != device:
        raise ValueError(f"{name}: got device {value.device}, takes {device} (that of {other})")


def head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    name: str = "hidden",
    empty: bool = False,
    of: str = "",
) -> None:
    """Hidden states `[..., D]` with a head's weight `[V, D]` and bias `[V]`; with `empty` V may be 0, a rank's part.

    `of` is what follows the names of weight and bias: "_other" of a second head.
    """
    own = f"weight{of}"
    floating(name, hidden)
    floating(own, weight)
    if weight.dim() != 2 or weight.shape[1] == 0 or (weight.shape[0] == 0 and not empty):
        raise ValueError(f"{own}: got shape {list(weight.shape)}, takes [V, D], both at least 1")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: got shape {list(hidden.shape)}, takes [..., {weight.shape[1]}] ({own} is {list(weight.shape)})"
        )
    same_device(name, hidden, weight.device, own)
    if bias is not None:
        floating(f"bias{of}", bias)
        shape(f"bias{of}", bias, (weight.shape[0],), f"one entry per row of {own}")
        same_device(f"bias{of}", bias, weight.device, own)


def vocabulary(vocab_size: Any, total: int, of: str) -> None:
    if vocab_size is None:
        return
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or not 1 <= vocab_size <= total:
        raise ValueError(f"vocab_size: got {vocab_size!r}, takes None or an integer from 1 to {total} ({of})")


def indices(name: str, value: Tensor, leading: torch.Size, size: int, device: torch.device, check: bool) -> None:
    """Target indices. On a CPU their range is checked too, elsewhere only with `check`, as that would synchronise."""
    tensor(name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: got dtype {value.dtype}, takes int64 or int32")
    shape(name, value, tuple(leading), "the leading dimensions of the hidden states or logits")
    same_device(name, value, device, "weight or logits")
    if torch.compiler.is_compiling():
        return  # while tracing there are no values to check
    if (check or device.type == "cpu") and value.numel():
        outside = ((value < 0) | (value >= size)).flatten()
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(f"{name}: got {int(value.flatten()[row])} at row {row}, takes 0..{size - 1}")


def all_finite(name: str, value: Tensor, mask: Tensor | None = None) -> None:
    """Raise on NaN or inf among the entries that `mask`, over the leading dimensions, calls valid (synchronises)."""
    _none_of(~torch.isfinite(value), name, value, mask, "finite values")


def logits(name: str, value: Tensor) -> None:
    """Raise on NaN and +inf in logits or a bias, where -inf is a masked word (synchronises)."""
    bad = ~(torch.isfinite(value) | (value == -torch.inf))
    _none_of(bad, name, value, None, "finite values, and -inf for a masked word")


def _none_of(bad: Tensor, name: str, value: Tensor, mask: Tensor | None, takes: str) -> None:
    if mask is not None:
        bad &= mask.view(*mask.shape, *(1,) * (bad.dim() - mask.dim()))
    if bad.any():
        index = bad.nonzero()[0].tolist()
        worst = "NaN" if bool(torch.isnan(value[tuple(index)])) else "inf"
        raise ValueError(f"{name}: got {worst} at row {index[0]} (index {index}), takes {takes}")


def summable(name: str, value: Tensor, mask: Tensor) -> None:
    """Raise on finite values so large that a row's sum, or the difference of two, overflows float32 (synchronises)."""
    if value.dtype == torch.float64 or not value.numel():
        return
    most = torch.finfo(torch.float32).max / 4 / value.shape[-1]
    bad = (value.abs() > most) & mask
    if bad.any():
        index = bad.nonzero()[0].tolist()
        got = float(value[tuple(index)])
        raise ValueError(
            f"{name}: got {got!r} at row {index[0]} (index {index}), takes values up to {most:.3g} in size"
        )


def finite_head(weight: Tensor, bias: Tensor | None, vocab_size: int | None, of: str = "") -> None:
    """Raise on NaN or inf in the vocabulary's part of a head; a bias of -inf masks its word. `of` as in `head`."""
    all_finite(f"weight{of}", weight[:vocab_size])
    if bias is not None:
        logits(f"bias{of}", bias[:vocab_size])


def wanted(check: bool | None, value: Tensor) -> bool:
    """Whether to check values: as asked; where `check` is None, only on a CPU, where it costs no synchronisation.

    Never while `torch.compile` traces: there are no values to check.
    """
    if torch.compiler.is_compiling():
        return False
    return value.device.type == "cpu" if check is None else check


def token_mask(mask: Any, like: Tensor, name: str = "mask") -> Tensor:
    """`mask` as a boolean tensor of the shape of `like`."""
    tensor(name, mask)
    shape(name, mask, tuple(like.shape), "one entry per token")
    same_device(name, mask, like.device, "the scores")
    return mask if mask.dtype == torch.bool else mask != 0


def offsets(name: str, value: Any, like: Tensor, of: str, check: bool) -> None:
    """Where packed rows begin and end in `like`, `[total]`; their values are checked only with `check`."""
    tensor(name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: got dtype {value.dtype}, takes int64 or int32")
    if value.dim() != 1 or not len(value):
        raise ValueError(f"{name}: got shape {list(value.shape)}, takes [B + 1]")
    same_device(name, value, like.device, of)
    if check:
        numbers = value.tolist()
        if numbers[0] != 0 or numbers[-1] != len(like) or numbers != sorted(numbers):
            raise ValueError(f"{name}: got {numbers}, takes offsets that rise from 0 to {len(like)} (the {of})")


def matrix(name: str, value: Any) -> None:
    floating(name, value)
    if value.dim() != 2:
        raise ValueError(f"{name}: got shape {list(value.shape)}, takes [B, T]")


def disagreement(what: str, row: int, got: float, expected: float, bound: float) -> NoReturn:
    raise RuntimeError(
        f"check: {what} of row {row} is {got!r}, the float64 reference gives {expected!r} "
        f"(difference {abs(got - expected):.3e}, bound {bound:.3e})"
    )
