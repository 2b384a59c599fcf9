"""Two views over the k likeliest words of p and one bin for all others: `KL(p || q)` of these k + 1 probabilities.

A sweep like that of `tiling.py`, with the same tile operations. It takes the best k words so far out of the tiles that
it folds, so that what is folded are the other words; the logarithm of their sum is the logit of their bin. The bins are
a tile of k + 1 columns, whose divergence, and the gradient of whose logits, come from the operations on any tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vppo_kernels.backends.protocols import TileOps
from vppo_kernels.logits import LogitTransform, Source
from vppo_kernels.statistics import (
    EXP_FLOOR,
    GRAD_DIVERGENCE,
    GRAD_ENTROPY_P,
    KL,
    MAX,
    MEAN_DIFF,
    PAIR_FIELDS,
    SOFTMAX_FIELDS,
    SUM,
    TARGET,
    finish_pair,
    nothing,
    pack,
    unpack_pair_stats,
)
from vppo_kernels.tile_shape import choose_tiling
from vppo_kernels.tiling import (
    blocks_of_rows,
    buffer_of,
    current_workspace,
    merge_packed_pair,
    of_finite,
    of_pair,
    walk_back,
    window,
)
from vppo_kernels.vocab_parallel import gather_ranks, max_ranks, merge_ranks

MOST_WORDS = 1 << 24  # of a vocabulary: what is saved for the backward is float32, which counts up to here
WORD_BYTES = 160  # that a row holds for each of its k words, at most, while words are compared or bins folded
UNCHANGED = (LogitTransform(), LogitTransform())
VIEWS = slice(TARGET, MEAN_DIFF, SOFTMAX_FIELDS)  # the same field of p and of q, here that of targets and of results


def fields(k: int) -> int:
    """Rows of what `forward` returns: a packed `Pair`, the logits of both views' bins, and the words."""
    return PAIR_FIELDS + 2 * (k + 1) + k


class _Best(NamedTuple):
    """The best words of p so far: logits of both views, `[2, rows, k]`, and indices, `[rows, k]`, -1 of none."""

    logits: Tensor
    words: Tensor


@dataclass
class _Room:
    """How many tiles of one view are held at a time; see `TileOps`."""

    SCRATCH: int
    PEAK: int


def _fold_columns(ops: TileOps, tile: Tensor, stats: Tensor) -> Tensor:
    """Packed `PairStats` with a few more columns, wherever in the vocabulary they lie."""
    return ops.fold_pair(tile, None, 0, stats, tile.new_empty(ops.SCRATCH, *tile.shape[1:]))


def _select(ops: TileOps, found: list[_Best], k: int, stats: Tensor) -> tuple[_Best, Tensor]:
    """The best k of these words, and the statistics with the others."""
    logits, words = torch.cat([best.logits for best in found], 2), torch.cat([best.words for best in found], 1)
    order = logits[0].argsort(dim=1, descending=True, stable=True)
    logits, words = logits.gather(2, order.expand_as(logits)), words.gather(1, order)
    best = _Best(logits[:, :, :k].contiguous(), words[:, :k].contiguous())
    return best, _fold_columns(ops, logits[:, :, k:].contiguous(), stats)


def _logits_at(tile: Tensor, words: Tensor, first: int) -> Tensor:
    """Both views' logits of one word in each row, `[2, rows]`; -inf if it lies elsewhere."""
    column = words - first
    inside = (column >= 0) & (column < tile.shape[2])
    place = column.clamp(0, tile.shape[2] - 1).unsqueeze(1)
    return torch.where(inside, tile.gather(2, place.expand(2, -1, -1)).squeeze(2), -torch.inf)


def _bins(best: Tensor, stats: Tensor) -> Tensor:
    """Logits of the bins, `[2, rows, k + 1]`, from those of the best words and the statistics of all others."""
    others = stats[MAX:MEAN_DIFF:SOFTMAX_FIELDS] + stats[SUM:MEAN_DIFF:SOFTMAX_FIELDS].log()
    # where nothing is left but masked words, and what stands in the places of the best ones
    others = others.masked_fill(others < -0.5 * EXP_FLOOR, -torch.inf)
    return torch.cat([best, others.unsqueeze(2)], 2)


def _pair_of(ops: TileOps, tile: Tensor) -> Tensor:
    """A packed `Pair` of a tile that is all of a vocabulary."""
    return pack(finish_pair(unpack_pair_stats(_fold_columns(ops, tile, nothing(2, tile.shape[1], tile)))))


def forward(source: Source, ops: TileOps, targets: Tensor | None, k: int, workspace: int) -> tuple[Tensor, Tensor]:
    """The divergence of the bins, `[rows]`, and what the backward needs besides the logits, `[fields(k), rows]`."""
    tiling = choose_tiling(source, ops, workspace or current_workspace(), more_row=WORD_BYTES * k)
    buffer, scratch = buffer_of(source, tiling, 2), buffer_of(source, tiling, ops.SCRATCH)
    values, saved = [], []
    for rows in blocks_of_rows(source, tiling):
        count = rows.stop - rows.start
        stats, at_target = nothing(2, count, scratch), scratch.new_full((2, count), -torch.inf)
        words = torch.full((count, k), -1, device=scratch.device)
        best = _Best(scratch.new_full((2, count, k), -torch.inf), words)
        for columns in tiling.column_tiles(source.columns) if count else []:
            tile, first = window(buffer, 2, count, columns), source.first + columns.start
            source.logits(rows, columns, tile)
            if targets is not None:
                at_target = torch.maximum(at_target, _logits_at(tile, targets[rows], first))
            places = tile[0].topk(min(k, tile.shape[2]), 1).indices.sort(1).values
            both = places.expand(2, -1, -1)
            found = _Best(tile.gather(2, both), places + first)
            tile.scatter_(2, both, -EXP_FLOOR)  # finite, so that folds need not take the way of masked words
            stats = ops.fold_pair(tile, None, first, stats, window(scratch, ops.SCRATCH, count, columns))
            best, stats = _select(ops, [best, found], k, stats)
        stats = merge_ranks(stats, source.group, merge_packed_pair)
        if source.group:
            ranks = zip(*(gather_ranks(part, source.group) for part in best), strict=True)
            best, stats = _select(ops, [_Best(*rank) for rank in ranks], k, stats)
            at_target = max_ranks(at_target, source.group)
        bins = _bins(best.logits, stats)
        stats = _fold_columns(ops, best.logits, stats)
        stats[VIEWS] = at_target
        values.append(_pair_of(ops, bins)[KL])
        pair = pack(finish_pair(unpack_pair_stats(stats)))
        saved.append(torch.cat([pair, *bins.transpose(1, 2), best.words.T.to(pair.dtype)]))
    return torch.cat(values), torch.cat(saved, 1)


def backward(
    source: Source, ops: TileOps, saved: Tensor, targets: Tensor | None, grads: Tensor, k: int, workspace: int
) -> None:
    """Hand the source the gradient of all its tiles; arguments as those of `tiling.backward_pair`."""
    pair, bins_p, bins_q, words = saved.split([PAIR_FIELDS, k + 1, k + 1, k])
    bins, words = torch.stack([bins_p.T, bins_q.T]), words.T.long()
    grads = of_pair(pair, grads, jsd=True)  # which leaves the divergence's as it is
    of_divergence = grads[GRAD_DIVERGENCE:GRAD_ENTROPY_P].clone()
    grads[GRAD_DIVERGENCE] = 0.0
    asks_more = bool(grads.any())  # of entropies and log-probabilities, which are of the whole vocabulary
    room = _Room(ops.SCRATCH, ops.PEAK + (2 if asks_more else 0))
    done, in_bins = slice(0, 0), bins

    def gradient(rows: slice, columns: slice, tile: Tensor, out: Tensor) -> None:
        nonlocal done, in_bins
        first = source.first + columns.start
        if rows != done:
            done, in_bins = rows, _gradient_of_bins(ops, bins[:, rows], of_divergence[:, rows])
        others = None
        if asks_more:
            others, chosen = tile.clone(), None if targets is None else targets[rows]
            ops.gradient_pair_(
                others, pair[:, rows], None, 0.5, chosen, first, grads[:, rows].contiguous(), source.transforms, others
            )
        column = words[rows] - first
        row, place = ((column >= 0) & (column < tile.shape[2])).nonzero(as_tuple=True)
        nowhere = column.new_full((len(column),), -1)
        for view, transform in enumerate(source.transforms):
            of_view, shares = tile[view], torch.zeros_like(pair[:SOFTMAX_FIELDS, rows])
            # of the others, the sum of whose exponentials this is the logarithm of; -inf where all of them are masked
            shares[MAX] = bins[view, rows, k].clamp_min(-EXP_FLOOR)
            of_shares = torch.stack([-in_bins[view, :, k], torch.zeros_like(in_bins[view, :, k])])
            of_words = in_bins[view, row, place] * _slope(transform, bins[view, rows][row, place])
            ops.gradient_(of_view, shares, nowhere, first, of_shares, transform, of_view)
            of_view[row, column[row, place]] = of_words
        if others is not None:
            tile += others
        if out.dtype != tile.dtype:
            out.copy_(tile)

    walk_back(source, room, workspace, gradient)


def _gradient_of_bins(ops: TileOps, bins: Tensor, of_divergence: Tensor) -> Tensor:
    """Of the bins' logits, `[2, rows, k + 1]`."""
    bins = bins.contiguous()
    pair = _pair_of(ops, bins)
    upstream = torch.cat([of_finite(pair[KL:], of_divergence), torch.zeros_like(pair[:2])])
    gradient = bins.clone()
    ops.gradient_pair_(gradient, pair, None, 0.5, None, 0, upstream, UNCHANGED, gradient)
    return gradient


def _slope(transform: LogitTransform, logits: Tensor) -> Tensor | float:
    return transform.slope(logits.clamp_min(-EXP_FLOOR))
