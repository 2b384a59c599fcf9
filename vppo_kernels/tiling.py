"""The one driver: walks rows x vocabulary in tiles, which a source fills with logits and a backend folds.

At any time one tile of logits exists, for the Jensen-Shannon divergence the tiles of one block of rows, and those that
`forward_backward` keeps where they fit. So memory is bounded by `workspace_limit`, for any number of rows and words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch
from torch import Tensor

from vppo_kernels.backends.protocols import FusedSweep, TileOps
from vppo_kernels.linear_head import LinearHead
from vppo_kernels.logits import Source
from vppo_kernels.statistics import (
    GRAD_DIVERGENCE,
    GRAD_ENTROPY_P,
    GRAD_LOGPROB,
    GRAD_LOGPROB_P,
    JSD_FIELDS,
    KL,
    LOGPROB,
    MEAN_DIFF,
    SOFTMAX_FIELDS,
    finish,
    finish_pair,
    merge,
    merge_pair,
    nothing,
    pack,
    unpack_pair_stats,
    unpack_stats,
)
from vppo_kernels.tile_shape import MIB, Held, Tiling, choose_tiling
from vppo_kernels.vocab_parallel import merge_ranks, sum_ranks
from vppo_kernels.walk import Walk, choose_walk

DEFAULT_WORKSPACE = 256 * MIB
SUMS = 4  # of the workspace, a quarter may be sums of rows that wait for the last column

_workspace: ContextVar[int] = ContextVar("vppo_kernels_workspace", default=DEFAULT_WORKSPACE)


@contextmanager
def workspace_limit(nbytes: int) -> Iterator[None]:
    """Bound the working memory of the operations called inside the block (and of their backward).

    Args:
        nbytes: Bytes beyond inputs, outputs and gradients, at least 1 MiB; 256 MiB unless set. Gradients of 16-bit
            hidden states are summed in float32, those of up to half of the rows in the gradients' own memory: where the
            sums of all others do not fit beside the tiles and the weight has a gradient too, the tiles of the rows that
            are left are made once more, and a larger bound saves time. The bound gives way only where a single row of
            the vocabulary exceeds it.

    Raises:
        ValueError: Less than 1 MiB.
    """
    if nbytes < MIB:
        raise ValueError(f"nbytes: got {nbytes}, takes at least {MIB} (1 MiB)")
    token = _workspace.set(int(nbytes))
    try:
        yield
    finally:
        _workspace.reset(token)


def current_workspace() -> int:
    """The bound in force here, in bytes; 0 while tracing, for the one in force where the trace is run."""
    return 0 if torch.compiler.is_compiling() else _workspace.get()


def buffer_of(source: Source, tiling: Tiling, tiles: int) -> Tensor:
    return torch.empty(tiles * tiling.rows * tiling.columns, device=source.device, dtype=source.dtype)


def window(buffer: Tensor, tiles: int, rows: int, columns: slice) -> Tensor:
    """A contiguous `[tiles, rows, columns]` window of a flat buffer, also for the smaller tiles at the edges."""
    width = columns.stop - columns.start
    return buffer[: tiles * rows * width].view(tiles, rows, width)


def blocks_of_rows(source: Source, tiling: Tiling) -> Iterator[slice]:
    """Row tiles; one empty tile where there are no rows, so that results of no rows have the right shapes."""
    yield from tiling.row_tiles(source.rows) if source.rows else [slice(0, 0)]


def _merge(a: Tensor, b: Tensor) -> Tensor:
    return pack(merge(unpack_stats(a), unpack_stats(b)))


def merge_packed_pair(a: Tensor, b: Tensor) -> Tensor:
    return pack(merge_pair(unpack_pair_stats(a), unpack_pair_stats(b)))


def _head_to_fuse(source: Source, fused: FusedSweep | None) -> LinearHead | None:
    """The source where a fused sweep takes it, else None; the same on all ranks."""
    if fused is None or not isinstance(source, LinearHead) or not source.rows:
        return None
    # a cap's rounding must be the same here and in the backward, whose tiles torch caps; and its sums have no slabs
    return None if source.transform.softcap is not None or source.exact else source


def _fold_tiles(
    source: Source,
    ops: TileOps,
    targets: Tensor | None,
    rows: slice,
    column_tiles: list[slice],
    buffers: list[Tensor],
    scratch: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Packed statistics of a block of rows, and its tiles, which stay intact only if there is a buffer for each."""
    count = rows.stop - rows.start
    stats, tiles = nothing(source.views, count, scratch), []
    for index, columns in enumerate(column_tiles if count else []):
        tile = source.logits(rows, columns, window(buffers[index % len(buffers)], source.views, count, columns))
        work, first = window(scratch, ops.SCRATCH, count, columns), source.first + columns.start
        if source.views == 1:
            assert targets is not None
            stats = ops.fold(tile[0], targets, first, stats, work)
        else:
            stats = ops.fold_pair(tile, targets, first, stats, work)
        tiles.append(tile)
    return stats, tiles


def forward(source: Source, ops: TileOps, targets: Tensor, workspace: int, fused: FusedSweep | None = None) -> Tensor:
    """One view: normaliser, entropy and log-probability of every row, a packed `Softmax`, `[4, rows]`.

    `fused` sweeps instead of the tile operations where it takes the source.
    """
    tiling = choose_tiling(source, ops, workspace or current_workspace())
    head = _head_to_fuse(source, fused)
    if fused is not None and head is not None:
        tiling = replace(tiling, rows=fused.rows(head, tiling.rows, workspace or current_workspace()))
        head = head if source.columns else None
    buffers = [] if head else [buffer_of(source, tiling, 1)]
    scratch = buffer_of(source, tiling, ops.SCRATCH)
    column_tiles, blocks = list(tiling.column_tiles(source.columns)), []
    for rows in blocks_of_rows(source, tiling):
        if fused is not None and head is not None:
            stats = fused.sweep(head, rows, targets[rows])
        else:
            stats, _ = _fold_tiles(source, ops, targets[rows], rows, column_tiles, buffers, scratch)
        blocks.append(pack(finish(unpack_stats(merge_ranks(stats, source.group, _merge)))))
    return torch.cat(blocks, dim=1)


def forward_pair(
    source: Source,
    ops: TileOps,
    targets: Tensor | None,
    workspace: int,
    beta: float | None = None,
    fused: FusedSweep | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Two views: both softmaxes and `KL(p || q)` of every row, a packed `Pair`, `[10, rows]`.

    With `beta` also the two terms of that Jensen-Shannon divergence, `[2, rows]`. It needs both normalisers first, so a
    second fold follows over the tiles of the row block, which are kept: no product is done twice, and nothing is fused.
    """
    jsd = beta is not None
    tiling = choose_tiling(source, ops, workspace or current_workspace(), keep_tiles=jsd)
    head = None if jsd else _head_to_fuse(source, fused)
    if fused is not None and head is not None:
        tiling = replace(tiling, rows=fused.rows(head, tiling.rows, workspace or current_workspace()))
        head = head if source.columns else None
    column_tiles = list(tiling.column_tiles(source.columns))
    buffers = [] if head else [buffer_of(source, tiling, 2) for _ in (column_tiles if jsd else column_tiles[:1])]
    scratch = buffer_of(source, tiling, ops.SCRATCH)
    blocks, jsd_terms = [], []
    for rows in blocks_of_rows(source, tiling):
        chosen = None if targets is None else targets[rows]
        if fused is not None and head is not None:
            tiles: list[Tensor] = []
            stats = fused.sweep_pair(head, rows, chosen)
        else:
            stats, tiles = _fold_tiles(source, ops, chosen, rows, column_tiles, buffers, scratch)
        pair = pack(finish_pair(unpack_pair_stats(merge_ranks(stats, source.group, merge_packed_pair))))
        blocks.append(pair)
        if beta is not None:
            terms = stats.new_zeros(JSD_FIELDS, rows.stop - rows.start)
            for tile in tiles:
                terms = ops.fold_jsd(tile, pair, terms, beta)
            jsd_terms.append(sum_ranks(terms, source.group))
    return torch.cat(blocks, dim=1), torch.cat(jsd_terms, dim=1) if jsd else None


def of_finite(values: Tensor, grads: Tensor) -> Tensor:
    """Upstream gradients of these outputs, 0 where one is infinite: no change of the logits would move it."""
    return torch.where(torch.isinf(values), 0.0, grads)


def _of_view(softmax: Tensor, grads: Tensor) -> Tensor:
    """Upstream gradients of one view's outputs, as its tiles are given them."""
    after = GRAD_LOGPROB + 1
    return torch.cat([of_finite(softmax[LOGPROB:], grads[:after]), grads[after:]])


def of_pair(pair: Tensor, grads: Tensor, jsd: bool) -> Tensor:
    """Those of two views' outputs; without targets there are none of log-probabilities."""
    entropies, logprobs = grads[GRAD_ENTROPY_P:GRAD_LOGPROB_P], grads[GRAD_LOGPROB_P:]
    divergence = grads[GRAD_DIVERGENCE:GRAD_ENTROPY_P]
    if not jsd:
        divergence = of_finite(pair[KL:], divergence)
    if len(logprobs):
        logprobs = of_finite(pair[LOGPROB:MEAN_DIFF:SOFTMAX_FIELDS], logprobs)
    return torch.cat([divergence, entropies, logprobs])


Gradient = Callable[[slice, slice, Tensor, Tensor], None]
"""`gradient(rows, columns, tile, out)` of a recomputed tile of logits, `[views, rows, columns]`, fills `out`, which may
be the tile: see `TileOps`."""


def _walk(source: Source, ops: Held, workspace: int) -> Walk:
    """The way through rows and columns."""
    if source.device.type != "cpu" and source.banded is not None:
        return choose_walk(source, ops, workspace)
    _, row_sum, *_, free = source.footprint
    by_rows = choose_tiling(source, ops, workspace, sum_rows=True)
    if row_sum and not source.shares_columns:
        return Walk(0, by_rows, by_rows)
    beside = min(source.rows, workspace // SUMS // row_sum) if row_sum else source.rows
    together = max(beside, min(source.rows, free))
    by_columns = choose_tiling(source, ops, workspace - (together * row_sum if together > free else 0))
    if together < source.rows:
        together = together // by_columns.rows * by_columns.rows
    return Walk(together, by_columns, by_rows)


def walk_back(source: Source, ops: Held, workspace: int, gradient: Gradient) -> None:
    """Recompute tiles in an order in which all sums fit, and hand the source their gradients.

    Gradients of rows are sums over the vocabulary, those of columns over the rows. Column by column, the sums of all
    rows wait for the last column. Those that fit do; the other rows are walked once more, row by row. The row tiles of
    a band follow each other, so that a source may multiply the gradients of all of them at once.
    """
    if not source.rows:
        return
    together, by_columns, by_rows, stacked = _walk(source, ops, workspace or current_workspace())
    if together or source.shares_columns:
        buffer = buffer_of(source, by_columns, source.views)
        source.open(slice(0, together))
        for columns in by_columns.column_tiles(source.columns):
            for band in by_columns.bands(slice(0, source.rows)):
                source.begin(band, stacked)
                _tiles_of_band(source, by_columns, buffer, band, columns, True, gradient)
        source.close()
        del buffer
    if together == source.rows:
        return
    buffer = buffer_of(source, by_rows, source.views)
    for band in by_rows.bands(slice(together, source.rows)):
        source.open(band)
        for columns in by_rows.column_tiles(source.columns):
            source.begin(band)
            _tiles_of_band(source, by_rows, buffer, band, columns, not source.shares_columns, gradient)
        source.close()


def _tiles_of_band(
    source: Source,
    tiling: Tiling,
    buffer: Tensor,
    band: slice,
    columns: slice,
    of_columns: bool,
    gradient: Gradient,
) -> None:
    for rows in tiling.tiles_of(band):
        tile = source.logits(rows, columns, window(buffer, source.views, rows.stop - rows.start, columns))
        out = source.place(rows, columns, tile)
        gradient(rows, columns, tile, out)
        source.accumulate(rows, columns, out, of_columns)


def backward(source: Source, ops: TileOps, softmax: Tensor, targets: Tensor, grads: Tensor, workspace: int) -> None:
    """Hand the source the gradient of all its tiles.

    Args:
        source: Of the active rows, as are all the others.
        softmax: `[4, rows]`, what `forward` returned.
        targets: `[rows]`.
        grads: `[2, rows]`, upstream of log-probability and entropy.
        ops, workspace: As in the forward.
    """
    grads, transform = _of_view(softmax, grads), source.transforms[0]

    def gradient(rows: slice, columns: slice, tile: Tensor, out: Tensor) -> None:
        first = source.first + columns.start
        ops.gradient_(tile[0], softmax[:, rows], targets[rows], first, grads[:, rows], transform, out[0])

    walk_back(source, ops, workspace, gradient)


def forward_backward(
    source: Source,
    ops: TileOps,
    targets: Tensor,
    derivative: Callable[[Tensor], Tensor],
    workspace: int,
) -> None:
    """One view forward and at once backward: tiles are kept in between where they fit, and recomputed where not.

    Args:
        source: Of all rows.
        targets: `[rows]`.
        derivative: From a packed `Softmax`, `[4, rows]`, to what `backward` takes as `grads`.
        ops, workspace: As in the forward.
    """
    tiling = choose_tiling(source, ops, workspace or current_workspace())
    column_tiles, row_blocks = list(tiling.column_tiles(source.columns)), list(tiling.row_tiles(source.rows))
    size = source.rows * source.columns * source.dtype.itemsize
    _, row_sum, *_, free = source.footprint
    sums = source.rows * row_sum if source.rows > free else 0
    bound = workspace or current_workspace()
    if source.rows == 0 or size > bound // 2 or sums > bound // SUMS:
        softmax = forward(source, ops, targets, workspace)
        backward(source, ops, softmax, targets, derivative(softmax), workspace)
        return
    scratch = buffer_of(source, tiling, ops.SCRATCH)
    kept, blocks = [], []
    for rows in row_blocks:
        buffers = [scratch.new_empty((rows.stop - rows.start) * (c.stop - c.start)) for c in column_tiles]
        stats, tiles = _fold_tiles(source, ops, targets[rows], rows, column_tiles, buffers, scratch)
        blocks.append(pack(finish(unpack_stats(merge_ranks(stats, source.group, _merge)))))
        kept.append(tiles)
    softmax = torch.cat(blocks, dim=1)
    grads = _of_view(softmax, derivative(softmax))
    source.open(slice(0, source.rows))
    for index, columns in enumerate(column_tiles):
        for rows, tiles in zip(row_blocks, kept, strict=True):
            source.begin(rows)
            tile, first, transform = tiles[index], source.first + columns.start, source.transforms[0]
            out = source.place(rows, columns, tile)
            ops.gradient_(tile[0], softmax[:, rows], targets[rows], first, grads[:, rows], transform, out[0])
            source.accumulate(rows, columns, out)
    source.close()


def backward_pair(
    source: Source,
    ops: TileOps,
    pair: Tensor,
    jsd_terms: Tensor | None,
    beta: float,
    targets: Tensor | None,
    grads: Tensor,
    workspace: int,
) -> None:
    """As `backward`, for two views; `grads` are upstream of divergence, both entropies and both log-probabilities."""
    grads = of_pair(pair, grads, jsd_terms is not None)

    def gradient(rows: slice, columns: slice, tile: Tensor, out: Tensor) -> None:
        ops.gradient_pair_(
            tile,
            pair[:, rows],
            None if jsd_terms is None else jsd_terms[:, rows],
            beta,
            None if targets is None else targets[rows],
            source.first + columns.start,
            grads[:, rows],
            source.transforms,
            out,
        )

    walk_back(source, ops, workspace, gradient)
