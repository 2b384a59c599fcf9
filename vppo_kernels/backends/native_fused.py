"""The forward sweep of Hopper chips with the matrix product inside: `csrc/cuda/sweep.cu`. The rest is `native.py`.

A block takes 128 rows, of two views in turns of eight, through a part of the vocabulary; a second kernel merges the
parts. No tile of logits exists in memory. It takes 16-bit hidden states and a weight of the same dtype whose rows begin
at multiples of 16 bytes, and refuses others by name.

"auto" does not choose this backend as long as no GPU has timed it. Jensen-Shannon divergences, those of the likeliest
words, capped logits, `precision="exact"`, logits that are given, two heads, and whatever has a gradient go through
tiles.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from vppo_kernels import statistics
from vppo_kernels.backends.turns import in_turns
from vppo_kernels.linear_head import LinearHead
from vppo_kernels.native_library import library
from vppo_kernels.tile_shape import BLOCK_COLUMNS, BLOCK_ROWS, MIB, chip_of, fused_rows, splits_of

ALIGNMENT = 8  # numbers of 16 bits, 16 bytes: where a copy of a tile may begin, and what lies between its rows
CLUSTER = 4  # blocks that share a tile of the weight, so that the cache is asked for it once


def refuses(source: LinearHead) -> str:
    """See `FusedSweep`."""
    weight = source.weight
    if source.product_dtype.itemsize != 2 or source.dtype != torch.float32:
        given = sorted({str(x.dtype).removeprefix("torch.") for x in (*source.hidden, weight)})
        return f"which takes hidden states and weight that are all bfloat16 or all float16; got {' and '.join(given)}"
    if not _aligned(weight):
        return (
            "which takes a weight whose entries follow each other in a row, and whose rows begin at multiples of 16 "
            f"bytes; got strides {weight.stride()} of shape {tuple(weight.shape)}"
        )
    return ""


def _aligned(x: Tensor) -> bool:
    """Whether copies of tiles can read this matrix."""
    return x.stride(1) == 1 and x.stride(0) % ALIGNMENT == 0 and x.data_ptr() % (2 * ALIGNMENT) == 0


def _align(x: Tensor) -> Tensor:
    if _aligned(x):
        return x
    width = x.shape[1]
    wide = x.new_empty(len(x), -(-width // ALIGNMENT) * ALIGNMENT)
    wide[:, :width] = x
    return wide[:, :width]


@cache
def places(device: torch.device, ranks: int) -> int:
    """Clusters of so many blocks that run at a time; a chip may have fewer than its multiprocessors would make."""
    return library(device.type).sweep_places(device.index or 0, ranks)


def _ranks(rows: int) -> int:
    """Blocks of a cluster, for so many rows of all views: no more than there are blocks."""
    blocks = -(-rows // BLOCK_ROWS)
    return next(ranks for ranks in (CLUSTER, 2, 1) if ranks <= blocks)


def rows(source: LinearHead, of_tiles: int, workspace: int) -> int:
    """See `FusedSweep`."""
    ranks, tiles = _ranks(source.views * source.rows), -(-source.max_columns // BLOCK_COLUMNS)
    last_cache = chip_of(source.device).cache if source.device.type == "cuda" else 50 * MIB
    # all blocks read their rows once for each tile: half of the cache; and they are copied twice: half of the workspace
    most = min(last_cache // 2, workspace // 4)
    row_bytes = source.views * source.hidden_size * 2
    each = BLOCK_ROWS * ranks // source.views
    return min(fused_rows(source.rows, row_bytes, each, tiles, places(source.device, ranks), most), source.rows)


def _sweep(source: LinearHead, rows: slice, targets: Tensor | None, pair: bool) -> Tensor:
    count = rows.stop - rows.start
    hidden, _ = source.stacked(rows)  # the views of 16-bit numbers are never made of differences
    hidden = _align(in_turns(hidden) if pair else hidden)
    ranks = _ranks(len(hidden))
    clusters, tiles = -(-len(hidden) // (BLOCK_ROWS * ranks)), -(-source.columns // BLOCK_COLUMNS)
    splits = splits_of(clusters, tiles, places(hidden.device, ranks))
    fields = statistics.PAIR_FIELDS if pair else statistics.SOFTMAX_FIELDS
    parts = torch.empty(splits, fields, count, device=hidden.device, dtype=torch.float32)
    stats = torch.empty(fields, count, device=hidden.device, dtype=torch.float32)
    bias = None if source.bias is None else source.bias[: source.columns].float().contiguous()
    scale = source.transform.logit_scale / source.transform.temperature
    weight = source.weight[: source.columns]
    targets = None if targets is None else targets.contiguous()
    library(hidden.device.type).sweep(hidden, weight, bias, targets, source.first, scale, ranks, parts, stats)
    return stats


def sweep(source: LinearHead, rows: slice, targets: Tensor) -> Tensor:
    """See `FusedSweep`."""
    return _sweep(source, rows, targets, pair=False)


def sweep_pair(source: LinearHead, rows: slice, targets: Tensor | None) -> Tensor:
    """See `FusedSweep`."""
    return _sweep(source, rows, targets, pair=True)
