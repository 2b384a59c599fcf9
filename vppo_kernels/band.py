"""A band of rows on tensor cores: hidden states picked once, 16-bit gradients of all its tiles side by side.

So the gradients of hidden states and weight are one product each for the whole band, and not one for every tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


class Band:
    """Rows of one or two views.

    Args:
        hidden: One `[rows, D]` tensor per view, all of one 16-bit dtype.
        active: Indices of the rows that take part; None for all.
    """

    def __init__(self, hidden: list[Tensor], active: Tensor | None) -> None:
        self._hidden, self._active = hidden, active
        # products take rows that follow each other
        self.picks = active is not None or not all(h.is_contiguous() for h in hidden)
        self.rows = slice(0, 0)
        self._copy: Tensor | None = None
        self._buffer: Tensor | None = None
        self.gradient: Tensor | None = None

    def begin(self, rows: slice, stacked: bool) -> None:
        """Of these rows the next tiles are; `stacked`: copy those of two views below each other."""
        if rows == self.rows:
            return
        self.rows, self._copy, self.gradient = rows, None, None
        if self.picks or (stacked and len(self._hidden) > 1):
            first, count = self._hidden[0], rows.stop - rows.start
            self._copy = first.new_empty(len(self._hidden), count, first.shape[1])
            for hidden, place in zip(self._hidden, self._copy, strict=True):
                if self._active is None:
                    place.copy_(hidden[rows])
                else:
                    torch.index_select(hidden, 0, self._active[rows], out=place)

    def end(self) -> None:
        """Let go of all memory."""
        self.rows, self._copy, self._buffer, self.gradient = slice(0, 0), None, None, None

    def holds(self, rows: slice) -> bool:
        return self.rows.start <= rows.start and rows.stop <= self.rows.stop

    def hidden(self, rows: slice) -> list[Tensor]:
        """`[rows, D]` of each view, or one matrix of all where they lie below each other."""
        if self._copy is None:
            return [hidden[rows] for hidden in self._hidden]
        if rows == self.rows:
            return [self._copy.flatten(0, 1)]
        start = self.rows.start
        return list(self._copy[:, rows.start - start : rows.stop - start])

    def place(self, rows: slice, width: int) -> Tensor:
        """Where the gradient of a tile of so many columns goes, `[views, rows, width]`."""
        start = self.rows.start
        if rows.start == start:  # a new tile of columns
            shape = len(self._hidden), self.rows.stop - start, width
            size = math.prod(shape)
            if self._buffer is None or self._buffer.numel() < size:  # the first tile is the largest
                self._buffer = self._hidden[0].new_empty(size)
            self.gradient = self._buffer[:size].view(shape)
        assert self.gradient is not None
        return self.gradient[:, rows.start - start : rows.stop - start]

    def factors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The weight's gradient is the sum of `a.T @ b` of these: one pair of copied rows, else one of each view."""
        assert self.gradient is not None
        if self._copy is not None:
            yield self.gradient.flatten(0, 1), self._copy.flatten(0, 1)
        else:
            for view, hidden in enumerate(self._hidden):
                yield self.gradient[view], hidden[self.rows]
