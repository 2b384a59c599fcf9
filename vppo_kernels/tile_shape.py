"""How large a tile of logits is: as large as the workspace and the cache allow, and of a shape that idles nothing.

On a GPU a product runs in rounds: one block of 128 x 256 results on each multiprocessor, then the next. A tile whose
last round is nearly empty, or a last tile of a few rows that walks the whole vocabulary, costs as much as a full one.
So shapes are compared by the rounds that all of their tiles take together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

MIB = 1 << 20
CPU_ROWS = 512
FEW_ROWS, GPU_ROWS = 1024, 8192  # of all views, stacked: the smallest and the largest row tiles that are tried
COLUMN_MULTIPLE = 128  # tiles are multiples of this many columns, which is what matrix products like
BLOCK_ROWS, BLOCK_COLUMNS = 128, 256  # of a product's results on one multiprocessor
FOLD_COLUMNS = 512  # what a fold takes at a time, or half of it
LAUNCH = 0.05  # of a round: what a tile costs besides its product, and again where the last step of its fold is short
READ = 2.0**-16  # of a round: what each row and each column of a tile costs that is read while others are multiplied
PROGRAM, MOST_SPLITS = 0.2, 256  # of a block: what a program costs that takes several; parts of the vocabulary
HEIGHTS = 16  # of row tiles that are tried


class Chip(NamedTuple):
    """What of a GPU decides: bytes of its last cache, and multiprocessors."""

    cache: int
    multiprocessors: int


def chip_of(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.L2_cache_size, properties.multi_processor_count)


class Footprint(NamedTuple):
    """Bytes that a source holds itself while it makes a tile of logits, or takes back its gradient.

    Attributes:
        row: For each row of the tile, all views together.
        row_sum: For each row whose gradient is being summed over the vocabulary.
        column: For each column of the tile.
        column_sum: For each column, in addition where a gradient is summed over several row tiles.
        entry: For each entry of the tile, all views together: its gradient in 16 bits.
        free: Not bytes, but how many rows' sums cost none: they lie where their gradients will.
    """

    row: int
    row_sum: int
    column: int
    column_sum: int
    entry: int = 0
    free: int = 0


class Tiled(Protocol):
    """What a tile is cut from: as much of a `Source` as its shape depends on."""

    views: int
    products: int
    rows: int
    columns: int
    max_columns: int
    device: torch.device
    dtype: torch.dtype

    @property
    def footprint(self) -> Footprint: ...


class Held(Protocol):
    """Tiles of one view that tile operations hold at a time: see `TileOps`."""

    SCRATCH: int
    PEAK: int


@dataclass(frozen=True)
class Tiling:
    """Rows and vocabulary columns of a tile.

    Attributes:
        band: Rows of several tiles, whose gradients lie side by side; 0 for those of one.
    """

    rows: int
    columns: int
    band: int = 0

    def row_tiles(self, total: int) -> Iterator[slice]:
        return self.tiles_of(slice(0, total))

    def tiles_of(self, rows: slice) -> Iterator[slice]:
        return _slices(rows, self.rows)

    def bands(self, rows: slice) -> Iterator[slice]:
        return _slices(rows, self.band or self.rows)

    def column_tiles(self, total: int) -> Iterator[slice]:
        return _slices(slice(0, total), self.columns)


def _slices(span: slice, size: int) -> Iterator[slice]:
    for start in range(span.start, span.stop, size):
        yield slice(start, min(start + size, span.stop))


def choose_tiling(
    source: Tiled,
    ops: Held,
    workspace: int,
    keep_tiles: bool = False,
    sum_rows: bool = False,
    chip: Chip | None = None,
    more_row: int = 0,
) -> Tiling:
    """The shape of a source's tiles.

    Args:
        source: What the tiles are cut from.
        ops: Its `SCRATCH` and `PEAK` say how many tiles of one view it holds at a time.
        workspace: Bound in bytes.
        keep_tiles: All column tiles of a row block stay in memory until the block is done.
        sum_rows: The rows of a tile are summed over the vocabulary before the next rows are.
        chip: Of a GPU that is not here; None for the source's own device.
        more_row: Bytes for each row of the tile, beside those of the source's footprint.
    """
    footprint = source.footprint
    footprint = footprint._replace(row=footprint.row + more_row)
    if sum_rows:
        footprint = footprint._replace(row=footprint.row + footprint.row_sum)
    if source.device.type == "cpu":
        return _on_cpu(source, ops, footprint, workspace, keep_tiles)
    return _on_gpu(source, ops, footprint, workspace, keep_tiles, chip or chip_of(source.device))


def _on_cpu(source: Tiled, ops: Held, footprint: Footprint, workspace: int, keep_tiles: bool) -> Tiling:
    """As many rows as keep a product busy, then as many columns as the cache holds."""
    size = source.dtype.itemsize
    budget = workspace // (4 if keep_tiles else 2)
    per_entry = ops.PEAK * size + footprint.entry
    rows = min(max(source.rows, 1), CPU_ROWS)
    rows = min(rows, budget // 2 // max(footprint.row, COLUMN_MULTIPLE * per_entry))
    if keep_tiles:
        rows = min(rows, workspace // 2 // max(source.max_columns * source.views * size, 1))
    rows = max(rows, 1)
    # a wide head's products are a tenth slower into 16 MiB of logits than into 4; 2 MiB leave more to what a tile costs
    cached = 4 * MIB // (rows * source.views * size)
    columns = min(cached, budget // (rows * per_entry + footprint.column + footprint.column_sum))
    if columns > COLUMN_MULTIPLE:
        columns = columns // COLUMN_MULTIPLE * COLUMN_MULTIPLE
    return Tiling(rows, max(1, min(columns, source.max_columns)))


def _on_gpu(
    source: Tiled, ops: Held, footprint: Footprint, workspace: int, keep_tiles: bool, chip: Chip
) -> Tiling:  # fmt: skip
    """Row tiles of one size, and the columns with which all tiles take the fewest rounds."""
    size = source.dtype.itemsize
    budget = workspace * 7 // 8  # the rest is for statistics, and for what is handed in
    per_entry = ops.PEAK * size + footprint.entry
    total = max(source.rows, 1)
    most = min(total, max(GPU_ROWS // source.views, 1))
    most = min(most, budget // 2 // max(footprint.row, COLUMN_MULTIPLE * per_entry))
    if keep_tiles:  # a quarter: what a row tile's own buffers and the operations leave
        budget //= 2
        most = min(most, budget // max(source.max_columns * source.views * size, 1))
    most = max(most, 1)
    few = min(most, FEW_ROWS // source.views)
    counts = {-(-total // (few + (most - few) * step // HEIGHTS)) for step in range(HEIGHTS + 1)}
    best: tuple[bool, float, Tiling] | None = None
    for count in sorted(counts):
        rows = -(-total // count)
        small_rest = 2 * (total - (count - 1) * rows) < rows
        per_column = rows * (source.views + ops.SCRATCH) * size
        cached = 2 * chip.cache // 3 // per_column
        column = footprint.column + (footprint.column_sum if count > 1 else 0)
        fits = max(budget - rows * footprint.row, 0) // (rows * per_entry + column)
        for columns in _widths(max(1, min(cached, fits, source.max_columns)), source.max_columns):
            tiling = Tiling(rows, columns)
            cost = rounds(tiling, source, chip.multiprocessors)
            if best is None or (small_rest, cost) < best[:2]:
                best = small_rest, cost, tiling
    assert best is not None
    return best[2]


def _widths(limit: int, all_columns: int) -> Iterator[int]:
    """Widths of a tile up to a limit, the largest first, in whole blocks of a product where there is room for one."""
    if limit >= all_columns:
        yield all_columns
    for multiple in (BLOCK_COLUMNS, COLUMN_MULTIPLE, 1):
        if limit >= multiple:
            yield from range(limit // multiple * multiple, 0, -multiple)
            return


def rounds(tiling: Tiling, source: Tiled, multiprocessors: int) -> float:
    """What all tiles of a source cost, in rounds of one block per multiprocessor."""
    height, width = min(tiling.rows, max(source.rows, 1)), min(tiling.columns, max(source.max_columns, 1))
    launch = LAUNCH if width % FOLD_COLUMNS == 0 else 2 * LAUNCH
    stacked = source.views // source.products  # views whose rows are multiplied together
    heights = _parts(max(source.rows, 1), height)
    widths = _parts(max(source.max_columns, 1), width)
    return sum(
        many_rows
        * many_columns
        * (
            source.products * math.ceil(blocks(stacked * rows, columns) / multiprocessors)
            + launch
            + READ * (source.views * rows + columns)
        )
        for rows, many_rows in heights
        for columns, many_columns in widths
    )


def blocks(rows: int, columns: int) -> int:
    """Blocks of results of a product."""
    return -(-rows // BLOCK_ROWS) * -(-columns // BLOCK_COLUMNS)


def splits_of(tall: int, tiles: int, multiprocessors: int) -> int:
    """Into how many parts the vocabulary goes where a program takes blocks of rows through a part of it.

    Args:
        tall: Blocks of rows.
        tiles: Blocks of columns.
        multiprocessors: How many programs run at a time.
    """

    def cost(splits: int) -> float:
        return -(-tall * splits // multiprocessors) * (-(-tiles // splits) + PROGRAM)

    return min(range(1, min(tiles, MOST_SPLITS) + 1), key=cost)


def fused_rows(rows: int, row_bytes: int, each: int, tiles: int, places: int, most: int) -> int:
    """Rows of each view that a fused sweep takes at a time, so that all of its sweeps take the fewest steps.

    Args:
        rows: Of each view, in all.
        row_bytes: Of the hidden states of a row in all views.
        each: Rows that a program takes.
        tiles: Blocks of columns.
        places: How many programs run at a time.
        most: Bytes of the hidden states that a sweep may take, unless a single program takes more.
    """

    def cost(programs: int) -> float:
        splits = splits_of(programs, tiles, places)
        sweeps = -(-rows // (programs * each))
        return sweeps * -(-programs * splits // places) * (-(-tiles // splits) + PROGRAM)

    fit = max(min(most // (each * row_bytes), -(-rows // each)), 1)
    return each * min(range(1, fit + 1), key=cost)


def _parts(total: int, size: int) -> list[tuple[int, int]]:
    """Sizes of parts, and how many there are of each."""
    whole, rest = divmod(total, size)
    return [(size, whole)] + ([(rest, 1)] if rest else [])
