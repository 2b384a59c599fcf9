"""The one driver: walks rows x vocabulary in tiles, asks a source for logits and a backend what to do with them.

Never more than one tile of logits exists (for the Jensen-Shannon divergence, the tiles of one block of rows), so memory
is bounded by `workspace_limit`, whatever the numbers of rows and of vocabulary entries are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vppo_kernels.head import Source
from vppo_kernels.statistics import Pair, Softmax, finish, finish_pair, merge, merge_pair

MIB = 1 << 20
DEFAULT_WORKSPACE = 256 * MIB
SCRATCH = 3  # tiles of working space that a fold may use beside each view's logits
PEAK = 14  # tiles alive in the hungriest step, counted: the gradient of the Jensen-Shannon divergence, or far views

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
    """The bound in force here, in bytes."""
    return _workspace.get()


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


def _cache_bytes(device: torch.device) -> int:
    """Memory that a tile should stay in between the product that writes it and the fold that reads it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size // 2
    return 16 * MIB  # half of a 32 MiB last-level cache: 2,048 columns beat 16,384 by a quarter at 512 rows


def choose_tiling(source: Source, workspace: int, keep_tiles: bool = False) -> Tiling:
    """Tile shape for a source: as many rows as keep a product busy, then as many columns as the cache holds.

    Args:
        source: What the tiles are cut from.
        workspace: Bound in bytes.
        keep_tiles: All column tiles of a row block stay in memory until the block is done.
    """
    size = source.dtype.itemsize
    budget = workspace // (4 if keep_tiles else 2)
    per_row = (source.views + 1) * source.depth * size  # stacked rows, and their difference or a gradient to be added
    per_column = 4 * source.depth * size  # converted weights, their gradient, its sum, and that rounded
    per_entry = PEAK * size

    rows = min(max(source.rows, 1), 512 if source.device.type == "cpu" else 4096)
    rows = min(rows, budget // 2 // max(per_row, 128 * per_entry))
    if keep_tiles:
        rows = min(rows, workspace // 2 // (source.columns * source.views * size))
    rows = max(rows, 1)
    columns = min(
        _cache_bytes(source.device) // (rows * (source.views + SCRATCH) * size),
        budget // (rows * per_entry + per_column),
    )
    if columns > 128:
        columns = columns // 128 * 128
    return Tiling(rows, max(1, min(columns, source.columns)))


def _buffer(source: Source, tiling: Tiling, tiles: int) -> Tensor:
    return torch.empty(tiles * tiling.rows * tiling.columns, device=source.device, dtype=source.dtype)


def _tile(buffer: Tensor, tiles: int, rows: int, columns: slice) -> Tensor:
    """A contiguous `[tiles, rows, columns]` window of a flat buffer, also for the smaller tiles at the edges."""
    width = columns.stop - columns.start
    return buffer[: tiles * rows * width].view(tiles, rows, width)


def _concatenate(blocks: list) -> Any:
    """Join the per-row results of row blocks, nested named tuples of `[rows]` tensors."""
    first = blocks[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(blocks)
    return _rebuild(first, [_concatenate([block[i] for block in blocks]) for i in range(len(first))])


def _select(values: Any, rows: Tensor) -> Any:
    """The given rows of nested (named) tuples of `[rows]` tensors."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        return values[rows]
    return _rebuild(values, [_select(value, rows) for value in values])


def _rebuild(like: tuple, fields: list) -> Any:
    return type(like)(*fields) if hasattr(like, "_fields") else tuple(fields)


def _row_blocks(source: Source, tiling: Tiling) -> Iterator[slice]:
    """Row tiles; one empty tile where there are no rows, so that results have their shapes all the same."""
    yield from tiling.row_tiles(source.rows) if source.rows else [slice(0, 0)]


def forward(source: Source, backend: ModuleType, targets: Tensor, workspace: int) -> Softmax:
    """One view: normaliser, entropy and log-probability of every row."""
    tiling = choose_tiling(source, workspace)
    buffer, scratch = _buffer(source, tiling, 1), _buffer(source, tiling, SCRATCH)
    blocks = []
    for rows in _row_blocks(source, tiling):
        count, stats = rows.stop - rows.start, None
        for columns in tiling.column_tiles(source.columns):
            tile = source.logits(rows, columns, _tile(buffer, 1, count, columns))
            part = backend.fold(tile[0], targets[rows], columns.start, _tile(scratch, SCRATCH, count, columns))
            stats = part if stats is None else merge(stats, part)
        assert stats is not None
        blocks.append(finish(stats))
    return _concatenate(blocks)


def forward_pair(
    source: Source, backend: ModuleType, targets: Tensor | None, workspace: int, jsd: bool
) -> tuple[Pair, tuple[Tensor, Tensor] | None]:
    """Two views: both softmaxes and `KL(p || q)` of every row; with `jsd` also the two halves of that divergence.

    The Jensen-Shannon divergence needs both normalisers first, so a second fold follows over the tiles of the row
    block, which are kept: no product is done twice.
    """
    tiling = choose_tiling(source, workspace, keep_tiles=jsd)
    scratch = _buffer(source, tiling, SCRATCH)
    column_tiles = list(tiling.column_tiles(source.columns))
    buffers = [_buffer(source, tiling, 2) for _ in (column_tiles if jsd else column_tiles[:1])]
    blocks, halves = [], []
    for rows in _row_blocks(source, tiling):
        count, stats, kept = rows.stop - rows.start, None, []
        rows_targets = None if targets is None else targets[rows]
        for index, columns in enumerate(column_tiles):
            tile = source.logits(rows, columns, _tile(buffers[index if jsd else 0], 2, count, columns))
            part = backend.fold_pair(tile, rows_targets, columns.start, _tile(scratch, SCRATCH, count, columns))
            stats = part if stats is None else merge_pair(stats, part)
            kept.append(tile)
        assert stats is not None
        pair = finish_pair(stats)
        blocks.append(pair)
        if jsd:
            parts = [backend.fold_jsd(tile, pair) for tile in kept]
            halves.append(tuple(torch.stack(part).sum(0) for part in zip(*parts, strict=True)))
    return _concatenate(blocks), _concatenate(halves) if jsd else None


def _backward_tiles(source: Source, active: Tensor, workspace: int) -> Iterator[tuple[Tensor, slice, Tensor]]:
    """Recomputed tiles of the active rows, all rows of a column tile before the next column tile."""
    tiling = choose_tiling(source, workspace)
    buffer = _buffer(source, tiling, source.views)
    if len(active) == 0:
        return
    for columns in tiling.column_tiles(source.columns):
        for block in tiling.row_tiles(len(active)):
            rows = active[block]
            yield rows, columns, source.logits(rows, columns, _tile(buffer, source.views, len(rows), columns))


def backward(
    source: Source,
    backend: ModuleType,
    view: Softmax,
    targets: Tensor,
    grad_entropy: Tensor,
    grad_logprobs: Tensor,
    workspace: int,
) -> None:
    """Hand the source the gradient of all its tiles; rows whose upstream gradient is zero meet no product."""
    active = ((grad_entropy != 0) | (grad_logprobs != 0)).nonzero().flatten()
    for rows, columns, tile in _backward_tiles(source, active, workspace):
        slope = source.transform.slope(tile)
        backend.gradient_(
            tile[0], _select(view, rows), targets[rows], columns.start, grad_entropy[rows], grad_logprobs[rows]
        )
        source.accumulate(rows, columns, tile.mul_(slope))


def backward_pair(
    source: Source,
    backend: ModuleType,
    pair: Pair,
    jsd_parts: tuple[Tensor, Tensor] | None,
    targets: Tensor | None,
    grad_divergence: Tensor,
    grad_entropy: tuple[Tensor, Tensor],
    grad_logprobs: tuple[Tensor | None, Tensor | None],
    workspace: int,
) -> None:
    """The same for two views and their divergence."""
    upstream = [grad_divergence, *grad_entropy, *(g for g in grad_logprobs if g is not None)]
    active = torch.stack([g != 0 for g in upstream]).any(0).nonzero().flatten()
    for rows, columns, tile in _backward_tiles(source, active, workspace):
        slope = source.transform.slope(tile)
        backend.gradient_pair_(
            tile,
            _select(pair, rows),
            _select(jsd_parts, rows),
            _select(targets, rows),
            columns.start,
            grad_divergence[rows],
            _select(grad_entropy, rows),
            _select(grad_logprobs, rows),
        )
        source.accumulate(rows, columns, tile.mul_(slope))
