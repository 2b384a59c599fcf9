"""How the kernels of tokens are started: how much of a row a program takes, and on which device it runs."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

# Rows of a program and columns that it takes at a time. The interpreter pays by the operation, not by the element.
ROWS, BLOCK = (64, 1024) if triton.knobs.runtime.interpret else (1, 1024)
WARPS = 4


def grid_of(rows: int, columns: int = 1) -> tuple[int, int]:
    """Programs that cover so many rows and columns."""
    return triton.cdiv(rows, ROWS), triton.cdiv(columns, BLOCK)


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument: by itself Triton takes the current one.

    Products and sums are fused whatever Triton's default is: that is what the accuracy was proven with.
    """
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, enable_fp_fusion=True, **options)
