"""Shapes of tiles on GPUs that are not here: no round of a product idles, no last tile is a small rest."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vppo_kernels.tile_shape import (
    BLOCK_COLUMNS,
    MIB,
    Footprint,
    Tiling,
    blocks,
    choose_tiling,
)
from vppo_kernels.walk import Banded, Work, choose_walk

VOCAB = 152_064
CHIPS = {"A100": (40, 108), "H100": (50, 132), "H200": (50, 132), "B200": (126, 148)}  # MiB of L2, multiprocessors
ROWS = [410, 1024, 1638, 4096, 4100, 6554, 13_107, 16_384, 32_768, 1_000_003]
CUDA = torch.device("cuda")
OPS: Any = SimpleNamespace(SCRATCH=0, PEAK=2)


@dataclass
class Head:
    """What `choose_tiling` asks of bfloat16 hidden states under a bfloat16 head."""

    views: int
    rows: int
    width: int
    backward: bool
    columns: int = VOCAB
    max_columns: int = VOCAB
    device: torch.device = CUDA
    dtype: torch.dtype = torch.float32
    products: int = 1
    shares_columns: bool = True
    given: int = 0  # rows, of which these are some; 0 for all of them

    @property
    def banded(self) -> Banded:
        """Of a backward with gradients of all views' hidden states and perhaps of the weight."""
        each, given = self.views * self.width, self.given or self.rows
        footprint = Footprint(2 * each, 4 * each, 0, 4 * self.width * self.shares_columns, 2 * self.views, given // 2)
        return Banded(footprint, 0, (Work(self.views, self.width, self.views, self.shares_columns),), given > self.rows)

    @property
    def footprint(self) -> Footprint:
        summed = (4 * self.views + 2) * self.width
        return Footprint(2 * self.views * self.width, summed, 0, 4 * self.width if self.backward else 0)


@pytest.fixture(params=CHIPS)
def multiprocessors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    cache, count = CHIPS[request.param]
    properties = SimpleNamespace(L2_cache_size=cache * MIB, multi_processor_count=count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return count


def tiles(tiling: Tiling, head: Head) -> list[tuple[int, int]]:
    """(rows, columns) of every product."""
    rows = [head.views // head.products * (part.stop - part.start) for part in tiling.row_tiles(head.rows)]
    columns = [part.stop - part.start for part in tiling.column_tiles(head.columns)]
    return [(r, c) for r in rows for c in columns for _ in range(head.products)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("width", [2048, 3584, 5120])
@pytest.mark.parametrize(("views", "products"), [(1, 1), (2, 1), (2, 2)])
def test_rounds_are_whole_and_tiles_alike(
    multiprocessors: int, views: int, products: int, width: int, backward: bool
) -> None:
    """Of two heads, each has a product of its own, of half of the rows."""
    for rows in ROWS:
        head = Head(views, rows, width, backward, products=products)
        tiling = choose_tiling(head, OPS, 256 * MIB, sum_rows=backward and rows > 1000)
        taken = [blocks(*tile) for tile in tiles(tiling, head)]
        rounds = sum(-(-count // multiprocessors) for count in taken)
        assert sum(taken) / (rounds * multiprocessors) >= 0.9, (rows, tiling)
        *_, last = tiling.row_tiles(rows)
        assert last.stop - last.start >= tiling.rows / 2, (rows, tiling)
        assert tiling.columns % BLOCK_COLUMNS == 0, (rows, tiling)


@pytest.mark.usefixtures("multiprocessors")
def test_a_tile_stays_in_the_cache_and_in_the_workspace() -> None:
    cache = torch.cuda.get_device_properties(torch.device("cuda")).L2_cache_size
    for rows in ROWS:
        for limit in (16 * MIB, 256 * MIB):
            head = Head(2, rows, 5120, True)
            tiling = choose_tiling(head, OPS, limit)
            row, _, column, column_sum, *_ = head.footprint
            sums = column_sum if tiling.rows < rows else 0
            entries = tiling.rows * tiling.columns * OPS.PEAK * 4
            assert 2 * 4 * tiling.rows * tiling.columns <= cache
            assert tiling.rows * row + tiling.columns * (column + sums) + entries <= limit


@pytest.mark.usefixtures("multiprocessors")
@pytest.mark.parametrize("columns", [1, 100, 300, 5000])
def test_small_vocabularies_and_small_workspaces(columns: int) -> None:
    for rows in (1, 3, 5000):
        for limit in (MIB, 256 * MIB):
            head = Head(2, rows, 5120, False, columns, columns)
            tiling = choose_tiling(head, OPS, limit)
            assert 1 <= tiling.rows <= rows and 1 <= tiling.columns <= columns
    kept = choose_tiling(Head(2, 5000, 5120, False), OPS, 256 * MIB, keep_tiles=True)
    assert kept.rows * VOCAB * 2 * 4 <= 128 * MIB


@pytest.mark.parametrize("width", [2048, 3584, 5120])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("shares_columns", [True, False], ids=["weight too", "hidden"])
def test_walks_are_whole_rounds_within_the_workspace(
    multiprocessors: int, views: int, width: int, share: float, shares_columns: bool
) -> None:
    """Bands and their tiles are alike, all buffers fit, and products fill the chip: those of logits and weight, whose
    shapes are free."""
    cache = torch.cuda.get_device_properties(CUDA).L2_cache_size
    for given in (1024, 4096, 16_384, 32_768, 1_000_003):
        rows = round(share * given)
        head = Head(views, rows, width, True, shares_columns=shares_columns, given=given)
        walk, (row, row_sum, _, column_sum, entry, free) = choose_walk(head, OPS, 256 * MIB), head.banded.footprint
        passes = [(slice(0, rows), walk.by_columns)] * (shares_columns or walk.together == rows)
        passes += [(slice(walk.together, rows), walk.by_rows)] * (walk.together < rows)
        for span, tiling in passes:
            bands = list(tiling.bands(span))
            assert 2 * (bands[-1].stop - bands[-1].start) >= min(tiling.band, span.stop - span.start), (given, walk)
            tiles = [list(tiling.tiles_of(band)) for band in bands]
            assert all(2 * (of_band[-1].stop - of_band[-1].start) >= tiling.rows for of_band in tiles[:1])
            again = span.start > 0 or not shares_columns
            copied = walk.stacked if not again else head.banded.copies
            together = views if copied and len(tiles[0]) == 1 else 1
            products = [
                (together * (part.stop - part.start), tiling.columns, width)
                for of_band in tiles for part in of_band for _ in range(views // together)
            ]  # fmt: skip
            if shares_columns and not again:
                products += [(tiling.columns, width, views * (band.stop - band.start)) for band in bands]
            work = rounds = 0
            for height, wide, depth in products:
                count = blocks(height, wide)
                work += depth * count
                rounds += depth * (-(-count // multiprocessors) * multiprocessors if count > multiprocessors else count)
            assert work / rounds >= (0.9 if given < 20_000 else 0.75), (given, walk)  # there the workspace decides
            held = views * 4 * tiling.rows * tiling.columns
            assert held <= cache, (given, walk)
            held += tiling.band * (tiling.columns * entry + (row if copied else 0) + (row_sum if again else 0))
            if shares_columns and not again:
                held += 0 if walk.together <= free else walk.together * row_sum
                held += column_sum * tiling.columns if len(bands) > 1 or (views > 1 and not copied) else 0
            assert held <= 256 * MIB, (given, walk)
        if share < 0.5 and shares_columns:
            assert walk.together == rows  # all sums lie in their gradients' memory: no tile is made twice


@pytest.mark.usefixtures("multiprocessors")
def test_walks_in_little_room() -> None:
    for rows in (1, 3, 5000):
        for limit in (MIB, 4 * MIB):
            for given in (rows, 3 * rows):
                walk = choose_walk(Head(2, rows, 5120, True, given=given), OPS, limit)
                for tiling in (walk.by_columns, walk.by_rows):
                    assert 1 <= tiling.rows <= tiling.band <= rows and 1 <= tiling.columns <= VOCAB
