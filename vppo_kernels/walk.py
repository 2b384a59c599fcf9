"""How a backward goes through rows and columns on a GPU, where 16-bit gradients of a band of rows lie side by side.

Three products share memory and chip: of the logits, of the hidden states' gradients and of the weight's. Ways to go are
compared by the rounds (see `tile_shape.py`) that all of them take together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from vppo_kernels.tile_shape import (
    BLOCK_COLUMNS,
    COLUMN_MULTIPLE,
    FEW_ROWS,
    HEIGHTS,
    LAUNCH,
    READ,
    Chip,
    Footprint,
    Held,
    Tiled,
    Tiling,
    blocks,
    chip_of,
)

MOST_COLUMNS = 16_384  # of a tile
ADD = 0.1  # of a round: what a block costs besides that is read, added to and written again


class Work(NamedTuple):
    """What a backward multiplies for one head.

    Attributes:
        views: How many have this head.
        width: Of its hidden states.
        hidden: Of how many views the hidden states have a gradient.
        weight: Whether the weight has one.
    """

    views: int
    width: int
    hidden: int
    weight: bool


class Banded(NamedTuple):
    """What a source holds and multiplies where the gradients of several row tiles, a band, lie side by side.

    Attributes:
        footprint: The same, `row` for each row of a band that is copied.
        fixed: Bytes besides.
        heads: Its products.
        copies: Whether it cannot do without these copies; else they save products of one view each.
    """

    footprint: Footprint
    fixed: int
    heads: tuple[Work, ...]
    copies: bool


class TiledBackward(Tiled, Protocol):
    """The same of a backward."""

    shares_columns: bool

    @property
    def banded(self) -> Banded | None: ...


class Walk(NamedTuple):
    """How a backward goes through rows and columns, see `tiling.walk_back`.

    Attributes:
        together: The first rows, whose gradients are summed while the walk goes column by column.
        by_columns: Tiles of that walk.
        by_rows: Tiles of the one through the other rows.
        stacked: Whether the walk by columns copies the rows of both views of a band below each other.
    """

    together: int
    by_columns: Tiling
    by_rows: Tiling
    stacked: bool = False


def choose_walk(source: TiledBackward, ops: Held, workspace: int, chip: Chip | None = None) -> Walk:
    """How a backward goes through a source whose gradients lie side by side; arguments as those of `choose_tiling`.

    Where the weight has a gradient, sums of rows wait until all columns are done: in the gradients' own memory, or in a
    quarter or a half of the workspace. The rows of which nothing waits have their tiles made once more. What takes the
    fewest rounds is chosen.
    """
    chip, banded, rows = chip or chip_of(source.device), source.banded, source.rows
    assert banded is not None
    # where a part of a product takes most of a small workspace, tiles of a few rows would never end
    footprint, budget = banded.footprint, max(workspace * 7 // 8 - banded.fixed, workspace // 2)
    row_sum, free = footprint.row_sum, min(rows, footprint.free)
    uncopied = footprint if banded.copies else footprint._replace(row=0)
    of_rows = uncopied._replace(row=uncopied.row + row_sum)
    separate = _Pass(source, ops, banded.heads, chip.multiprocessors, 2 * chip.cache // 3, False, banded.copies)

    def by_rows(left: int) -> tuple[float, Tiling]:
        return separate.best(of_rows, budget, left, left)

    if row_sum and not source.shares_columns:
        _, tiling = by_rows(rows)
        return Walk(0, tiling, tiling)
    waiting = {free, *(min(rows, budget // share // row_sum) for share in (4, 2))} if row_sum else {rows}
    found = []
    for together in sorted(waiting):
        left = budget - (together * row_sum if together > free else 0)
        again, rest = by_rows(rows - together) if together < rows else (0.0, None)
        for stacked in {banded.copies, banded.copies or (source.shares_columns and source.views > 1)}:
            by_columns = separate._replace(shares=source.shares_columns, stacked=stacked)
            cost, tiling = by_columns.best(footprint if stacked else uncopied, left, rows, together)
            found.append((cost + again, Walk(together, tiling, rest or tiling, stacked)))
    return min(found, key=lambda choice: choice[0])[1]


class _Pass(NamedTuple):
    """A walk over rows and all columns.

    Attributes:
        source, ops: As above.
        heads: What is multiplied.
        multiprocessors, cache: Of the chip: how many, and the bytes that a tile may take.
        shares: Whether the weight has a gradient.
        stacked: Whether the rows of a band are copied.
    """

    source: TiledBackward
    ops: Held
    heads: tuple[Work, ...]
    multiprocessors: int
    cache: int
    shares: bool
    stacked: bool

    def best(self, footprint: Footprint, budget: int, rows: int, summed: int) -> tuple[float, Tiling]:
        """The tiles with which so many rows, at least 1, take the fewest rounds, and these.

        Args:
            footprint, budget: In bytes.
            rows, summed: Of so many rows the gradients of so many are summed.
        """
        views, size = self.source.views, self.source.dtype.itemsize
        per_entry = (self.ops.PEAK - 2 + views) * size
        best, most_bands = (math.inf, Tiling(1, 1)), rows
        for band in _bands(rows, FEW_ROWS // views):
            count = -(-rows // band)
            if count > most_bands:
                break
            left = budget - band * footprint.row
            column = footprint.column + band * footprint.entry + (footprint.column_sum if self.adds(count) else 0)
            limit = left // (column + per_entry)
            if limit < 1 and band > 1:
                continue
            most_bands = min(most_bands, 2 * count)  # more bands only copy and add more
            for columns in _band_widths(limit, self.source.max_columns):
                fits = (left - columns * column) // (columns * per_entry)
                cached = self.cache // (columns * (views + self.ops.SCRATCH) * size)
                fewest = -(-band // max(min(band, fits, cached), 1))
                for tiles in (fewest, fewest + 1):
                    tiling = Tiling(-(-band // tiles), columns, band)
                    best = min(best, (self.cost(tiling, rows, summed), tiling), key=lambda found: found[0])
        return best

    def adds(self, bands: int) -> bool:
        """Whether the weight's gradient of a tile of columns is a sum of several products."""
        return self.shares and (bands > 1 or any(not self.stacked and head.views > 1 for head in self.heads))

    def cost(self, tiling: Tiling, rows: int, summed: int) -> float:
        """In rounds of a block of 128 x 256 results on each multiprocessor, as deep as the first head is wide."""
        bands, tiles = -(-rows // tiling.band), -(-tiling.band // tiling.rows)
        width, whole, adds, total = tiling.columns, self.heads[0].width, self.adds(bands), 0.0
        for head in self.heads:
            together = head.views if self.stacked and tiles == 1 else 1
            logits = self._taken(together * tiling.rows, width, head.width) + LAUNCH
            read = READ * (head.views * tiling.rows + width)
            hidden = self._taken(tiling.band, head.width, width + ADD * whole) + LAUNCH
            total += bands * tiles * (head.views // together * logits + read)
            total += head.hidden * summed / rows * bands * hidden
            if self.shares and head.weight:
                parts = 1 if self.stacked else head.views
                depth = head.views * tiling.band / parts + (ADD * whole if adds else 0.0)
                total += bands * parts * (self._taken(width, head.width, depth) + LAUNCH)
        return (total + bands * tiles * LAUNCH) * self.source.max_columns / width

    def _taken(self, height: int, width: int, depth: float) -> float:
        return math.ceil(blocks(height, width) / self.multiprocessors) * depth / self.heads[0].width


def _bands(rows: int, few: int) -> Iterator[int]:
    """Sizes of equal bands: the largest first, and from `few` on only halves."""
    count = 1
    while True:
        band = -(-rows // count)
        yield band
        if band == 1:
            return
        count = count + 1 if band > few else 2 * count


def _band_widths(limit: int, all_columns: int) -> Iterator[int]:
    """Widths of tiles that lie side by side, in whole blocks where there is room for one."""
    limit = max(1, min(limit, all_columns, MOST_COLUMNS))
    if limit == all_columns:
        yield all_columns
    for multiple in (BLOCK_COLUMNS, COLUMN_MULTIPLE, 1):
        if limit >= multiple:
            width = limit // multiple * multiple
            while width > 0:
                yield width
                width -= max(width // HEIGHTS // multiple, 1) * multiple
            return
