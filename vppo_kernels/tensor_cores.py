"""Products of 16-bit operands on a GPU: its tensor cores sum them in float32, and cut off what they add.

A Hopper tensor core adds 16 products at a time to the sum so far, keeps 25 binary places of them and drops the rest, so
the error grows with the length of the sum times its size. Sums of `SLAB` products, added in float32 that rounds to
nearest, are short enough for the bounds of float32 arithmetic; `tests/support/tensor_core.cpp` is the proof.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from vppo_kernels import arguments

SLAB = 896  # of the inner dimension: four slabs at the width of a 7B model, six at that of a 32B one
PART = 1024  # rows of a product that is made to be added
PRECISIONS = ("default", "exact")


class _Accepted(NamedTuple):
    """What torch takes of 16-bit operands here: a product in float32, and one that is added to a float32 matrix."""

    product: bool
    sum: bool


def multiply(*operands: Tensor) -> bool:
    """Whether tensor cores multiply these: 16-bit operands, equal ones, on a GPU that returns their sum in float32."""
    dtype = operands[0].dtype
    if not _on_gpu(operands[0]) or dtype.itemsize != 2 or any(x.dtype != dtype for x in operands):
        return False
    return _accepted(operands[0]).product


def warn_of_slow_product(hidden: Tensor, weight: Tensor) -> None:
    """Say once that a GPU multiplies in float32 what the caller may want multiplied in 16 bits."""
    if _on_gpu(weight) and weight.dtype == torch.float32 and hidden.dtype.itemsize == 2:
        name = str(hidden.dtype).removeprefix("torch.")
        _say_once(
            f"weight: float32 beside {name} hidden states is multiplied in float32, without tensor cores, which is "
            f"many times slower; load the model in {name}, or pass weight.to(torch.{name})"
        )


def product_(out: Tensor, a: Tensor, b: Tensor, exact: bool = False) -> None:
    """`out = a @ b` of 16-bit operands in float32; with `exact` in slabs of the inner dimension."""
    size = SLAB if exact else a.shape[1]
    _mm(a[:, :size], b[:size], out)
    for start in range(size, a.shape[1], size):
        add_product_(out, a[:, start : start + size], b[start : start + size])


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of 16-bit operands, in float32."""
    out = torch.empty(len(a), b.shape[1], device=a.device, dtype=torch.float32)
    _mm(a, b, out)
    return out


def adds_in_place(operand: Tensor) -> bool:
    """Whether `add_product_` needs no memory beside; else it needs that of `PART` rows of the result."""
    return _accepted(operand).sum


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` of 16-bit operands, in float32."""
    if adds_in_place(a):
        _addmm_(total, a, b)
    else:
        for start in range(0, len(a), PART):
            total[start : start + PART].add_(product(a[start : start + PART], b))


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _accepted(x: Tensor) -> _Accepted:
    half_sums = x.dtype == torch.float16 and getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    return _try(x.device, x.dtype, half_sums)


@cache
def _try(device: torch.device, dtype: torch.dtype, half_sums: bool) -> _Accepted:
    """Multiply a small matrix: no list of versions and chips would be as right."""
    a, out = torch.ones(16, 16, device=device, dtype=dtype), torch.empty(16, 16, device=device, dtype=torch.float32)
    try:
        _mm(a, a, out)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        name = str(dtype).removeprefix("torch.")
        reason = next(iter(str(error).splitlines()), "")
        _say_once(
            f"{name} operands are multiplied in float32, without tensor cores, which is many times slower: torch makes "
            f"no float32 product of them here ({reason})"
            + ("; it does without torch.backends.cuda.matmul.allow_fp16_accumulation" if half_sums else "")
        )
        return _Accepted(product=False, sum=False)
    try:
        _addmm_(out, a, a)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # older versions add to a matrix of the operands' dtype alone
        return _Accepted(product=True, sum=False)
    return _Accepted(product=True, sum=True)


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


# All that runs on tensor cores goes through these two.


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def _addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)


def check_precision(precision: str) -> bool:
    """Whether an operation's `precision` asks for sums in slabs."""
    arguments.one_of("precision", precision, PRECISIONS)
    return precision == "exact"
