"""The one driver: walks rows x vocabulary in tiles, asks a source for logits and a backend what to do with them.

Never more than one tile of logits exists (for the Jensen-Shannon divergence, the tiles of one block of rows), so memory
is bounded by `workspace_limit`, whatever the numbers of rows and of vocabulary entries are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from vppo_kernels.backends.protocols import FusedSweep, TileOps
from vppo_kernels.logits import LinearHead, Source
from vppo_kernels.statistics import (
    finish,
    finish_pair,
    merge,
    merge_pair,
    nothing,
    pack,
    unpack_pair_stats,
    unpack_stats,
)
from vppo_kernels.vocab_parallel import merge_ranks, sum_ranks

MIB = 1 << 20
DEFAULT_WORKSPACE = 256 * MIB
COLUMN_MULTIPLE = 128  # tiles are multiples of this many columns, which is what matrix products like
CPU_ROWS, GPU_ROWS = 512, 4096

_workspace: ContextVar[int] = ContextVar("vppo_kernels_workspace", default=DEFAULT_WORKSPACE)


@contextmanager
def workspace_limit(nbytes: int) -> Iterator[None]:
    """Bound the working memory of the operations called inside the block (and of their backward).

    Args:
        nbytes: Bytes beyond inputs, outputs and gradients, at least 1 MiB; 256 MiB unless set. Gradients of 16-bit
            hidden states are summed in float32 and count as such. The bound gives way only where a single row of the
            vocabulary exceeds it.

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


@dataclass(frozen=True)
class Tiling:
    """Rows and vocabulary columns of a tile."""

    rows: int
    columns: int

    def row_tiles(self, total: int) -> Iterator[slice]:
        return _slices(total, self.rows)

    def column_tiles(self, total: int) -> Iterator[slice]:
        return _slices(total, self.columns)


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def choose_tiling(source: Source, ops: TileOps, workspace: int, keep_tiles: bool = False) -> Tiling:
    """Tile shape for a source: as many rows as keep a product busy, then as many columns as the cache holds.

    Args:
        source: What the tiles are cut from.
        ops: Its `SCRATCH` and `PEAK` say how many tiles of one view it holds at a time.
        workspace: Bound in bytes; 0 for the one in force.
        keep_tiles: All column tiles of a row block stay in memory until the block is done.
    """
    size = source.dtype.itemsize
    workspace = workspace or current_workspace()
    budget = workspace // (4 if keep_tiles else 2)
    per_row = (
        (source.views + 1) * source.hidden_size * size
    )  # stacked rows, and their difference or a gradient to be added
    per_column = 4 * source.hidden_size * size  # converted weights, their gradient, its sum, and that rounded
    per_entry = ops.PEAK * size

    rows = min(max(source.rows, 1), CPU_ROWS if source.device.type == "cpu" else GPU_ROWS)
    rows = min(rows, budget // 2 // max(per_row, COLUMN_MULTIPLE * per_entry))
    if keep_tiles:
        rows = min(rows, workspace // 2 // max(source.max_columns * source.views * size, 1))
    rows = max(rows, 1)
    columns = min(_cached_columns(source, ops, rows), budget // (rows * per_entry + per_column))
    if columns > COLUMN_MULTIPLE:
        columns = columns // COLUMN_MULTIPLE * COLUMN_MULTIPLE
    return Tiling(rows, max(1, min(columns, source.max_columns)))


def _cached_columns(source: Source, ops: TileOps, rows: int) -> int:
    """Columns of a tile that is still in the cache when the fold reads what the product wrote."""
    per_column = rows * (source.views + ops.SCRATCH) * source.dtype.itemsize
    if source.device.type == "cpu":
        return 16 * MIB // per_column  # half of a 32 MiB last-level cache: 2,048 columns beat 16,384 by a quarter
    chip = torch.cuda.get_device_properties(source.device)
    columns = 2 * chip.L2_cache_size // 3 // per_column
    # A product runs in rounds of one 128 x 256 block per multiprocessor: a tile that fills whole rounds idles none.
    blocks_down = -(-source.views * rows // 128)
    rounds = blocks_down * (columns // 256) // chip.multi_processor_count
    return max(rounds * chip.multi_processor_count // blocks_down * 256, 256) if rounds else columns


def _buffer(source: Source, tiling: Tiling, tiles: int) -> Tensor:
    return torch.empty(tiles * tiling.rows * tiling.columns, device=source.device, dtype=source.dtype)


def _tile(buffer: Tensor, tiles: int, rows: int, columns: slice) -> Tensor:
    """A contiguous `[tiles, rows, columns]` window of a flat buffer, also for the smaller tiles at the edges."""
    width = columns.stop - columns.start
    return buffer[: tiles * rows * width].view(tiles, rows, width)


def _row_blocks(source: Source, tiling: Tiling) -> Iterator[slice]:
    """Row tiles; one empty tile where there are no rows, so that results have their shapes all the same."""
    yield from tiling.row_tiles(source.rows) if source.rows else [slice(0, 0)]


def _merge(a: Tensor, b: Tensor) -> Tensor:
    return pack(merge(unpack_stats(a), unpack_stats(b)))


def _merge_pair(a: Tensor, b: Tensor) -> Tensor:
    return pack(merge_pair(unpack_pair_stats(a), unpack_pair_stats(b)))


def _head_to_fuse(source: Source, fused: FusedSweep | None) -> LinearHead | None:
    """The source where a fused sweep takes it, else None."""
    # a cap's rounding must be the same here and in the backward, whose tiles torch caps
    capped = source.transform.softcap is not None
    if fused is None or capped or not isinstance(source, LinearHead) or not source.rows or not source.columns:
        return None
    return None if source.exact else source  # its sums have no slabs


def _fold_tiles(
    source: Source,
    ops: TileOps,
    targets: Tensor | None,
    rows: slice,
    column_tiles: list[slice],
    buffers: list[Tensor],
    scratch: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Packed statistics of a block of rows, and its tiles; those stay what they are if there is a buffer for each."""
    count = rows.stop - rows.start
    stats, tiles = nothing(source.views, count, scratch), []
    for index, columns in enumerate(column_tiles if count else []):
        tile = source.logits(rows, columns, _tile(buffers[index % len(buffers)], source.views, count, columns))
        work, first = _tile(scratch, ops.SCRATCH, count, columns), source.first + columns.start
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
    tiling = choose_tiling(source, ops, workspace)
    head = _head_to_fuse(source, fused)
    buffers = [] if head else [_buffer(source, tiling, 1)]
    scratch = _buffer(source, tiling, ops.SCRATCH)
    column_tiles, blocks = list(tiling.column_tiles(source.columns)), []
    for rows in _row_blocks(source, tiling):
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
    jsd: bool = False,
    fused: FusedSweep | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Two views: both softmaxes and `KL(p || q)` of every row, a packed `Pair`, `[10, rows]`.

    With `jsd` also the two terms of that divergence, `[2, rows]`. It needs both normalisers first, so a second fold
    follows over the tiles of the row block, which are kept: no product is done twice, and nothing is fused.
    """
    tiling = choose_tiling(source, ops, workspace, keep_tiles=jsd)
    head = None if jsd else _head_to_fuse(source, fused)
    column_tiles = list(tiling.column_tiles(source.columns))
    buffers = [] if head else [_buffer(source, tiling, 2) for _ in (column_tiles if jsd else column_tiles[:1])]
    scratch = _buffer(source, tiling, ops.SCRATCH)
    blocks, jsd_terms = [], []
    for rows in _row_blocks(source, tiling):
        chosen = None if targets is None else targets[rows]
        if fused is not None and head is not None:
            tiles: list[Tensor] = []
            stats = fused.sweep_pair(head, rows, chosen)
        else:
            stats, tiles = _fold_tiles(source, ops, chosen, rows, column_tiles, buffers, scratch)
        pair = pack(finish_pair(unpack_pair_stats(merge_ranks(stats, source.group, _merge_pair))))
        blocks.append(pair)
        if jsd:
            half = stats.new_zeros(2, rows.stop - rows.start)
            for tile in tiles:
                half = ops.fold_jsd(tile, pair, half)
            jsd_terms.append(sum_ranks(half, source.group))
    return torch.cat(blocks, dim=1), torch.cat(jsd_terms, dim=1) if jsd else None


def _of_finite(values: Tensor, grads: Tensor) -> Tensor:
    """Upstream gradients of these outputs; what is infinite, whatever the logits do, has none."""
    return torch.where(torch.isinf(values), 0.0, grads)


def _of_view(view: Tensor, grads: Tensor) -> Tensor:
    """Upstream gradients of (log-probability, entropy) that a view's tiles are to be given."""
    return torch.cat([_of_finite(view[3:4], grads[:1]), grads[1:]])


def _of_pair(pair: Tensor, grads: Tensor, jsd: bool) -> Tensor:
    """Those of (divergence, both entropies, both log-probabilities), the last two if there are targets."""
    divergence = grads[:1] if jsd else _of_finite(pair[9:], grads[:1])
    return torch.cat([divergence, grads[1:3], _of_finite(pair[3:8:4], grads[3:]) if len(grads) > 3 else grads[3:]])


def _backward_tiles(source: Source, ops: TileOps, workspace: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Recomputed tiles, all rows of a column tile before the next column tile; none where there are no rows."""
    tiling = choose_tiling(source, ops, workspace)
    buffer = _buffer(source, tiling, source.views)
    for columns in tiling.column_tiles(source.columns):
        for rows in tiling.row_tiles(source.rows):
            tile = _tile(buffer, source.views, rows.stop - rows.start, columns)
            yield rows, columns, source.logits(rows, columns, tile)


def backward(source: Source, ops: TileOps, view: Tensor, targets: Tensor, grads: Tensor, workspace: int) -> None:
    """Hand the source the gradient of all its tiles.

    Args:
        source: Of the active rows, as are all the others.
        view: `[4, rows]`, what `forward` returned.
        targets: `[rows]`.
        grads: `[2, rows]`, upstream of log-probability and entropy.
        ops, workspace: As in the forward.
    """
    grads = _of_view(view, grads)
    for rows, columns, tile in _backward_tiles(source, ops, workspace):
        first = source.first + columns.start
        ops.gradient_(tile[0], view[:, rows], targets[rows], first, grads[:, rows], source.transform)
        source.accumulate(rows, columns, tile)


def forward_backward(
    source: Source,
    ops: TileOps,
    targets: Tensor,
    derivative: Callable[[Tensor], Tensor],
    workspace: int,
) -> None:
    """One view forward, and at once backward: the logits are kept where they fit, and made again where they do not.

    Args:
        source: Of all rows.
        targets: `[rows]`.
        derivative: From a packed `Softmax`, `[4, rows]`, to what `backward` takes as `grads`.
        ops, workspace: As in the forward.
    """
    tiling = choose_tiling(source, ops, workspace)
    column_tiles, row_blocks = list(tiling.column_tiles(source.columns)), list(tiling.row_tiles(source.rows))
    size = source.rows * source.columns * source.dtype.itemsize
    if source.rows == 0 or size > (workspace or current_workspace()) // 2:
        view = forward(source, ops, targets, workspace)
        backward(source, ops, view, targets, derivative(view), workspace)
        return
    scratch = _buffer(source, tiling, ops.SCRATCH)
    kept, blocks = [], []
    for rows in row_blocks:
        buffers = [scratch.new_empty((rows.stop - rows.start) * (c.stop - c.start)) for c in column_tiles]
        stats, tiles = _fold_tiles(source, ops, targets[rows], rows, column_tiles, buffers, scratch)
        blocks.append(pack(finish(unpack_stats(merge_ranks(stats, source.group, _merge)))))
        kept.append(tiles)
    view = torch.cat(blocks, dim=1)
    grads = _of_view(view, derivative(view))
    for index, columns in enumerate(column_tiles):
        for rows, tiles in zip(row_blocks, kept, strict=True):
            tile, first = tiles[index], source.first + columns.start
            ops.gradient_(tile[0], view[:, rows], targets[rows], first, grads[:, rows], source.transform)
            source.accumulate(rows, columns, tile)


def backward_pair(
    source: Source,
    ops: TileOps,
    pair: Tensor,
    jsd_terms: Tensor | None,
    targets: Tensor | None,
    grads: Tensor,
    workspace: int,
) -> None:
    """The same for two views; `grads` is upstream of (divergence, both entropies, both log-probabilities)."""
    grads = _of_pair(pair, grads, jsd_terms is not None)
    for rows, columns, tile in _backward_tiles(source, ops, workspace):
        ops.gradient_pair_(
            tile,
            pair[:, rows],
            None if jsd_terms is None else jsd_terms[:, rows],
            None if targets is None else targets[rows],
            source.first + columns.start,
            grads[:, rows],
            source.transform,
        )
        source.accumulate(rows, columns, tile)
