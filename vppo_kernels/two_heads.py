"""Logits of two views under two heads, each of its own width and dtype: a student's hidden states and a teacher's."""

from __future__ import annotations

from torch import Tensor

from vppo_kernels.linear_head import LinearHead
from vppo_kernels.logits import LogitTransform
from vppo_kernels.tile_shape import Footprint
from vppo_kernels.walk import Banded


def _of_both(p: Footprint, q: Footprint) -> Footprint:
    sums = Footprint(*(a + b for a, b in zip(p, q, strict=True)))
    return sums._replace(free=min(p.free, q.free))


class TwoHeads:
    """A `Source` (see `logits.py`) of two views with a head each.

    A head without any gradient to collect makes logits and takes back nothing: no product is done for it.

    Args:
        p, q: One view each, of the same rows, columns, dtype of logits and process group.
    """

    views = products = 2

    def __init__(self, p: LinearHead, q: LinearHead) -> None:
        self.heads = (p, q)
        self.rows, self.device, self.dtype, self.group = p.rows, p.device, p.dtype, p.group
        self.first, self.columns, self.max_columns = p.first, p.columns, p.max_columns
        self.transforms: tuple[LogitTransform, ...] = (p.transform, q.transform)
        self.shares_columns = p.shares_columns or q.shares_columns

    @property
    def footprint(self) -> Footprint:
        return _of_both(*(head.footprint for head in self.heads))

    @property
    def banded(self) -> Banded | None:
        p, q = (head.banded for head in self.heads)
        if p is None or q is None:
            return None
        return Banded(_of_both(p.footprint, q.footprint), p.fixed + q.fixed, p.heads + q.heads, p.copies or q.copies)

    def logits(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        for view, head in enumerate(self.heads):
            head.logits(rows, columns, out[view : view + 1])
        return out

    def begin(self, rows: slice, stacked: bool = False) -> None:
        for head in self.heads:
            head.begin(rows, stacked)

    def place(self, rows: slice, columns: slice, tile: Tensor) -> Tensor:
        return tile  # of which each head takes its own view

    def open(self, rows: slice) -> None:
        for head in self.heads:
            head.open(rows)

    def accumulate(self, rows: slice, columns: slice, grad: Tensor, of_columns: bool = True) -> None:
        for view, head in enumerate(self.heads):
            if head.collects:
                head.accumulate(rows, columns, grad[view : view + 1], of_columns)

    def close(self) -> None:
        for head in self.heads:
            head.close()
