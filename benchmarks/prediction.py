"""Milliseconds on a GPU that is not here: from tiles, rounds, bytes and instructions, before anything is timed on one.

A model, right to some 15 % at best, that judges a change before there is a GPU: which of two shapes is better, and what
is left above the bare products. Rates are datasheets' less what real kernels reach, not measured here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.inputs import PRESETS, Shape
from vppo_kernels.tile_shape import (
    MIB,
    Chip,
    Footprint,
    Tiling,
    blocks,
    choose_tiling,
    fused_rows,
    splits_of,
)
from vppo_kernels.walk import Banded, Work, choose_walk

WORKSPACE = 256 * MIB
CUDA = torch.device("cuda")
BLOCK_STEP = 64  # of the inner dimension, in one step of a block's product
EFFICIENCY = 0.92  # of a block of 128 x 256 results, beside its loads
START = 5e-6  # seconds from the launch of a product to its full rate, and to its last store
GAP = 1.5e-6  # seconds between two kernels
ISSUE = 0.65  # of the cycles in which a scheduler issues an instruction of a fold
# instructions for each pair of logits or each logit, from the machine code for sm_90; see tests/vppo_kernels
FOLD_PAIR, FOLD, GRADIENT = 38.7, 11.3, 25.0
COPY = 4.0  # and for each number that is only copied or rounded
# the fused sweep: the same of its tile, which nothing overlaps, and its products' share of the peak: published rates of
# Triton's own, whose blocks each read the cache for themselves
FUSED_PAIR, FUSED, FUSED_EFFICIENCY = 42.6, 13.2, 0.70
# the native one, on Hopper: the same of a warpgroup's tile, stages that a warpgroup is ahead of the other (of four, as
# others are being copied), and seconds of a block before its first product and after its last
NATIVE_PAIR, NATIVE, STAGES, BLOCK_START = 34.0, 8.0, 2, 3e-6
PLACES = {1: 132, 2: 66, 4: 32}  # clusters that run at a time, of so many blocks: parts of a chip hold 16 or 18 blocks


class Gpu(NamedTuple):
    """Rates of a GPU: operations per clock and multiprocessor in 16 bits, clock in Hz, bytes per second."""

    chip: Chip
    operations: int
    clock: float
    memory: float
    cache: float


def _here() -> Gpu:
    from vppo_kernels.tile_shape import chip_of

    chip = chip_of(torch.device("cuda"))
    return GPUS["h100"]()._replace(chip=chip)


GPUS: dict[str, Callable[[], Gpu]] = {
    "a100": lambda: Gpu(Chip(40 * MIB, 108), 2048, 1.30e9, 1.75e12, 4.0e12),
    "h100": lambda: Gpu(Chip(50 * MIB, 132), 8192 // 2, 1.65e9, 3.0e12, 5.5e12),
    "h200": lambda: Gpu(Chip(50 * MIB, 132), 8192 // 2, 1.65e9, 4.3e12, 5.5e12),
    "b200": lambda: Gpu(Chip(126 * MIB, 148), 8192, 1.75e9, 7.2e12, 10e12),
    "here": _here,
}
HOPPER = ("h100", "h200")  # which have a native fused sweep


@dataclass
class _Head:
    """What `choose_tiling` and `choose_walk` ask of 16-bit hidden states under a 16-bit head.

    Attributes:
        rows: That take part, of `given`.
    """

    views: int
    rows: int
    columns: int
    max_columns: int
    width: int
    given: int = 0
    device: torch.device = CUDA
    dtype: torch.dtype = torch.float32
    products: int = 1
    shares_columns: bool = True

    @property
    def footprint(self) -> Footprint:
        return Footprint(2 * self.views * self.width, 0, 0, 0)

    @property
    def banded(self) -> Banded:
        each = self.views * self.width
        sums = Footprint(2 * each, 4 * each, 0, 4 * self.width, 2 * self.views, self.given // 2)
        return Banded(sums, 0, (Work(self.views, self.width, self.views, True),), self.rows < self.given)


class _InPlace:
    """Triton's tile operations: kernels that need no memory of their own."""

    SCRATCH, PEAK = 0, 2


class Prediction(NamedTuple):
    """Seconds: of the bare products, of the sum of all kernels, and of its two parts."""

    floor: float
    total: float
    products: float
    rest: float

    @property
    def multiple(self) -> float:
        """Of the bare products."""
        return self.total / self.floor


def forward_tiling(gpu: Gpu, views: int, rows: int, shape: Shape) -> Tiling:
    """The tiles that a sweep over so many rows of each view is cut into."""
    head = _Head(views, rows, shape.vocab, shape.vocab, shape.width)
    return choose_tiling(head, _InPlace(), WORKSPACE, chip=gpu.chip)


def product(gpu: Gpu, rows: int, columns: int, depth: int, out_bytes: int = 4, adds: bool = False) -> float:
    """Seconds of a product of 16-bit operands."""
    rounds = math.ceil(blocks(rows, columns) / gpu.chip.multiprocessors)
    step = 128 * 256 * BLOCK_STEP * 2 / (gpu.operations * gpu.clock * EFFICIENCY)
    moved = rows * columns * out_bytes * (2 if adds else 1) + 2 * depth * (rows + columns)
    return max(rounds * math.ceil(depth / BLOCK_STEP) * step, moved / gpu.memory) + START


def elementwise(gpu: Gpu, entries: int, instructions: float, moved: int) -> float:
    """Seconds of a kernel over so many entries, of which it moves so many bytes."""
    issue = entries * instructions / 32 / (4 * gpu.chip.multiprocessors * gpu.clock * ISSUE)
    return max(issue, moved / (gpu.cache if moved < 2 * gpu.chip.cache // 3 else gpu.memory)) + GAP


def forward(gpu: Gpu, views: int, rows: int, shape: Shape) -> Prediction:
    """A sweep without gradient: one product and one fold of every tile."""
    tiling, made, folded = forward_tiling(gpu, views, rows, shape), 0.0, 0.0
    for part in tiling.row_tiles(rows):
        for columns in tiling.column_tiles(shape.vocab):
            height, width = part.stop - part.start, columns.stop - columns.start
            made += product(gpu, views * height, width, shape.width)
            instructions = FOLD_PAIR if views == 2 else FOLD
            folded += elementwise(gpu, height * width, instructions, 4 * views * height * width) + GAP
    return Prediction(floor(gpu, views * rows, shape, 1), made + folded, made, folded)


def fused(gpu: Gpu, views: int, rows: int, shape: Shape) -> Prediction:
    """The same in one kernel, whose programs multiply a block and fold it by turns."""
    made = folded = 0.0
    for part in forward_tiling(gpu, views, rows, shape).row_tiles(rows):
        tall, tiles = -(-views * (part.stop - part.start) // 128), -(-shape.vocab // 256)
        splits = splits_of(tall, tiles, gpu.chip.multiprocessors)
        rounds = -(-tall * splits // gpu.chip.multiprocessors) * -(-tiles // splits)
        steps = rounds * math.ceil(shape.width / BLOCK_STEP)
        made += steps * 128 * 256 * BLOCK_STEP * 2 / (gpu.operations * gpu.clock * FUSED_EFFICIENCY) + START
        instructions = rounds * 128 * 256 // views * (FUSED_PAIR if views == 2 else FUSED)
        folded += instructions / 32 / (4 * gpu.clock * ISSUE) + GAP
    return Prediction(floor(gpu, views * rows, shape, 1), made + folded, made, folded)


def native_fused(gpu: Gpu, views: int, rows: int, shape: Shape, cluster: int = 4) -> Prediction:
    """The same for Hopper, whose warpgroups fold in turn, and whose blocks share the weight in clusters.

    A stage's products take what its copies take from the cache, where that is longer. While one warpgroup folds, the
    other multiplies as far as the stages reach; what is left of the fold costs time.
    """
    made = folded = 0.0
    step = 128 * 256 * BLOCK_STEP * 2 / (gpu.operations * gpu.clock * EFFICIENCY)
    fold_of_tile = 64 * 256 // views * (NATIVE_PAIR if views == 2 else NATIVE) / 32 / (4 * gpu.clock * ISSUE)
    tiles, tall = -(-shape.vocab // 256), -(-views * rows // 128)
    ranks = next(ranks for ranks in (cluster, 2, 1) if ranks <= tall)
    most, places = min(gpu.chip.cache // 2, WORKSPACE // 4), PLACES[ranks]
    taken = fused_rows(rows, 2 * views * shape.width, 128 * ranks // views, tiles, places, most)
    for part in Tiling(taken, 1).row_tiles(rows):
        clusters = -(-views * (part.stop - part.start) // (128 * ranks))
        splits = splits_of(clusters, tiles, places)
        waves = -(-clusters * splits // places)
        copied = 2 * BLOCK_STEP * (128 + 256 // ranks) * gpu.chip.multiprocessors / gpu.cache
        each, last = max(step, copied), waves * (fold_of_tile + BLOCK_START)
        made += waves * -(-tiles // splits) * math.ceil(shape.width / BLOCK_STEP) * each
        folded += waves * -(-tiles // splits) * max(fold_of_tile - STAGES * each / 2, 0.0) + last + 2 * GAP
    return Prediction(floor(gpu, views * rows, shape, 1), made + folded, made, folded)


def backward(gpu: Gpu, views: int, active: int, rows: int, shape: Shape) -> Prediction:
    """The gradients of the active rows' hidden states and of the weight: tiles made once more, and multiplied."""
    head = _Head(views, active, shape.vocab, shape.vocab, shape.width, rows)
    walk, picks = choose_walk(head, _InPlace(), WORKSPACE, gpu.chip), active < rows
    numbers = views * rows * shape.width
    made, rest = 0.0, elementwise(gpu, numbers, COPY, 6 * numbers)  # the sums, rounded

    def tiles(tiling: Tiling, band: slice, columns: int, copied: bool) -> None:
        nonlocal made, rest
        parts = list(tiling.tiles_of(band))
        together = views if copied and len(parts) == 1 else 1
        for part in parts:
            count = part.stop - part.start
            made += views // together * (product(gpu, together * count, columns, shape.width) + GAP)
            rest += elementwise(gpu, views * count * columns, GRADIENT, 6 * views * count * columns) + GAP

    def passes(tiling: Tiling, span: slice, summed: int, weight: bool) -> None:
        nonlocal made, rest
        bands, copied = list(tiling.bands(span)), picks or (weight and walk.stacked)
        if copied:
            again = 1 if len(bands) == 1 or not weight else -(-shape.vocab // tiling.columns)
            numbers = (span.stop - span.start) * shape.width
            rest += again * views * elementwise(gpu, numbers, COPY, 4 * numbers)
        parts = 1 if copied else views
        adds = parts * len(bands) > 1
        for columns in tiling.column_tiles(shape.vocab):
            width = columns.stop - columns.start
            for band in bands:
                tiles(tiling, band, width, copied)
                count, there = band.stop - band.start, min(band.stop, summed) - band.start
                if there > 0:
                    made += views * (product(gpu, there, shape.width, width, adds=True) + GAP)
                if weight:
                    depth = views * count // parts
                    made += parts * (product(gpu, width, shape.width, depth, 4 if adds else 2, adds) + GAP)
            if weight and adds:
                rest += elementwise(gpu, width * shape.width, COPY, 6 * width * shape.width)

    passes(walk.by_columns, slice(0, active), walk.together, True)
    for band in walk.by_rows.bands(slice(walk.together, active)):
        passes(walk.by_rows, band, active, False)
    return Prediction(floor(gpu, views * active, shape, 2), made + rest, made, rest)


def loss(gpu: Gpu, active: int, rows: int, shape: Shape) -> Prediction:
    """A sweep of the active ones of so many rows with its backward."""
    parts = forward(gpu, 1, active, shape), backward(gpu, 1, active, rows, shape)
    return Prediction(*(sum(both) for both in zip(*parts, strict=True)))


def floor(gpu: Gpu, rows: int, shape: Shape, products: int) -> float:
    """Seconds of the bare products at the rate of a large one."""
    rate = gpu.chip.multiprocessors * gpu.operations * gpu.clock * EFFICIENCY
    return products * 2 * rows * shape.vocab * shape.width / rate


def of(suite: str, labels: dict[str, Any]) -> float | None:
    """Seconds of a case of a suite on the GPU that is here; None for what the model does not know."""
    shape, gpu = Shape(labels.get("vocab", 0), labels.get("width", 0)), GPUS["here"]
    if suite in ("divergence", "logprob"):
        views, rows = 2 if suite == "divergence" else 1, labels["rows"]
        seconds = forward(gpu(), views, rows, shape).total
        return seconds + backward(gpu(), views, rows, rows, shape).total if labels["backward"] else seconds
    if suite == "loss":
        return loss(gpu(), labels["active_rows"], labels["rows"], shape).total
    return None


def view(name: str, presets: list[str], rows: list[int]) -> Table:
    """Milliseconds of the sweeps, and multiples of the bare products; of the fused ones these alone."""
    table = Table(
        title=f"{name}, predicted: ms and multiples of the bare products; KL through tiles, fused by Triton and by the "
        "native library, and its backward; loss with 40 % of the rows active",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    for heading in ("", "rows", "tile", "KL", "Triton", "native", "backward", "loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    gpu = GPUS[name]()
    for preset in presets:
        shape = PRESETS[preset]
        for count in rows:
            tiling = forward_tiling(gpu, 2, count, shape)
            cells = [preset, f"{count:,}", f"{tiling.rows:,} x {tiling.columns:,}"]
            tiles, by_triton = forward(gpu, 2, count, shape), fused(gpu, 2, count, shape)
            cells += [f"{1e3 * tiles.total:.1f} {tiles.multiple:.2f}x", f"{by_triton.multiple:.2f}x"]
            cells.append(f"{native_fused(gpu, 2, count, shape).multiple:.2f}x" if name in HOPPER else "")
            active = max(round(0.4 * count), 1)
            for found in (backward(gpu, 2, count, count, shape), loss(gpu, active, count, shape)):
                cells.append(f"{1e3 * found.total:.1f} {found.multiple:.2f}")
            table.add_row(*cells)
    return table
