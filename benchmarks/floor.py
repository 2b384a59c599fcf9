"""The floor: the matrix products that no exact method can leave out, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COLUMNS = 32_768  # vocabulary entries per product: wide enough to run at full rate


def head_products(
    hidden: Tensor, weight: Tensor, backward: bool, differentiated: Tensor | None = None
) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
    """The products of a head over all rows at once, tile by tile, into memory that is allocated here.

    Args:
        hidden: `[rows, D]`, all views under each other.
        weight: `[V, D]`.
        backward: Add the gradients' products, from a gradient of the logits that is simply there; recomputing the
            logits is not the floor's.
        differentiated: `[active, D]`, the rows that the gradients' products are over; None for all.

    Returns:
        A call that returns buffers of the gradients, `[active, D]` float32 and `[V, D]`; None without `backward`.
    """
    differentiated = hidden if differentiated is None else differentiated
    rows, active, columns = len(hidden), len(differentiated), min(COLUMNS, len(weight))
    narrow = weight.is_cuda and weight.dtype != torch.float32
    logits = hidden.new_empty(rows * columns, dtype=torch.float32)
    grad_hidden = grad_weight = None
    if backward:
        # not zeros, on which a GPU draws less power and clocks higher
        grad_logits = 1e-3 * torch.randn(active * columns, device=hidden.device, dtype=hidden.dtype)
        grad_hidden = torch.empty_like(differentiated, dtype=torch.float32)
        grad_weight = torch.empty_like(weight)

    def products() -> tuple[Tensor | None, Tensor | None]:
        for start in range(0, len(weight), columns):
            tile = weight[start : start + columns]
            out = logits[: rows * len(tile)].view(rows, -1)
            if narrow:
                torch.mm(hidden, tile.T, out_dtype=torch.float32, out=out)
            else:
                torch.mm(hidden, tile.T, out=out)
            if grad_hidden is None or grad_weight is None:
                continue
            grad = grad_logits[: active * len(tile)].view(active, -1)
            if start == 0:
                grad_hidden.zero_()
            if narrow:
                torch.addmm(grad_hidden, grad, tile, out_dtype=torch.float32, out=grad_hidden)
            else:
                torch.addmm(grad_hidden, grad, tile, out=grad_hidden)
            torch.mm(grad.T, differentiated, out=grad_weight[start : start + columns])
        return grad_hidden, grad_weight

    return products
