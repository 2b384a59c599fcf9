"""The order of rows in which a matrix instruction leaves both logits of a pair in one thread.

It leaves rows i and i + 8 of its result there, so rows of both views alternate in eights.
"""

from __future__ import annotations

from torch import Tensor

EIGHT = 8  # rows of one view that follow each other: how far apart the two rows lie that one thread holds


def in_turns(stacked: Tensor) -> Tensor:
    """Rows of both views, which lie below each other, in turns of eight; the last eight of each may be unfinished."""
    count, depth = len(stacked) // 2, stacked.shape[1]
    whole, rest = divmod(count, EIGHT)
    out = stacked.new_zeros(-(-count // EIGHT), 2, EIGHT, depth)
    for view, rows in enumerate(stacked.split(count)):
        out[:whole, view] = rows[: whole * EIGHT].view(whole, EIGHT, depth)
        out[whole:, view, :rest] = rows[whole * EIGHT :]
    return out.view(-1, depth)
