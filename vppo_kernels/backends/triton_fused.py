"""The forward sweep with the matrix product inside: logits live in registers only. The rest is `backends/triton.py`.

A program takes a block of rows and a part of the vocabulary. It multiplies tile after tile, folds each into statistics
in the registers that hold it, and writes those at the end; a second kernel merges the parts. Rows of both views
alternate in eights: a matrix instruction leaves rows i and i + 8 of its result in one thread, which thus holds both
logits of every pair that it folds. No tile of logits exists in memory, so it also works in a few MiB.

"auto" does not choose this backend as long as no GPU has timed it. Jensen-Shannon divergences, those of the likeliest
words, capped logits, logits that are given, two heads, and whatever has a gradient go through tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vppo_kernels import statistics
from vppo_kernels.backends.triton import OPTIONS
from vppo_kernels.backends.triton_math import (
    FLOOR,
    NEAR,
    PAIR_FIELDS,
    SOFTMAX_FIELDS,
    TARGET,
    P,
    Q,
    base_of,
    distance,
    fold_block_pair,
    load_pair_stats,
    load_stats,
    merge,
    merge_pair,
    phi,
    store_pair_stats,
    store_stats,
)
from vppo_kernels.backends.turns import in_turns
from vppo_kernels.linear_head import LinearHead
from vppo_kernels.tile_shape import splits_of

GROUP = 8  # row blocks that walk the vocabulary side by side, so that a tile of the weight is read from the cache
FEW = 4  # multiprocessors that the interpreter plays, so that parts are merged there too


@triton.jit
def _views(z):
    """Logits of both views, `[rows, columns]` each, from rows that alternate in eights."""
    rows: tl.constexpr = z.shape[0] // 2
    columns: tl.constexpr = z.shape[1]
    p, q = tl.split(tl.permute(tl.reshape(z, (rows // 8, 2, 8, columns)), (0, 2, 3, 1)))
    return tl.reshape(p, (rows, columns)), tl.reshape(q, (rows, columns))


@triton.jit
def _halves(z):
    """The left and the right columns."""
    rows: tl.constexpr = z.shape[0]
    columns: tl.constexpr = z.shape[1]
    return tl.split(tl.permute(tl.reshape(z, (rows, 2, columns // 2)), (0, 2, 1)))


# A tile is folded in parts, one after another, so that the temporaries of a part fit beside the whole tile.


@triton.jit
def _sums(z, about, PARTS: tl.constexpr):
    """Of one view: the sums of weights about a number for each row, and of weighted distances from it."""
    if PARTS == 1:
        shifted = z - about[:, None]
        weights = tl.exp(shifted)
        return tl.sum(weights, 1), tl.sum(weights * shifted, 1)
    else:
        left, right = _halves(z)
        a, b = _sums(left, about, PARTS // 2)
        c, d = _sums(right, about, PARTS // 2)
        return a + c, b + d


@triton.jit
def _pair_sums(z_p, z_q, about_p, about_q, centre, growth, PARTS: tl.constexpr):
    """The same of both views, and `sum w d` and `sum w phi(d)`: `d` is the known mean gap less a word's."""
    if PARTS == 1:
        shifted_p, shifted_q = z_p - about_p[:, None], z_q - about_q[:, None]
        p, q = tl.exp(shifted_p), tl.exp(shifted_q)
        d = centre[:, None] - (shifted_p - shifted_q)
        weighted = p * d
        series = 1 / 24 + d * (1 / 120 + d * (1 / 720 + d * (1 / 5040 + d * (1 / 40320))))
        near = weighted * d * (0.5 + d * (1 / 6 + d * series))
        far = q * growth[:, None] - p - weighted  # p exp(d) is q exp(mean gap)
        phis = tl.where(tl.abs(d) < 0.5, near, far)
        weighted_sum_p, weighted_sum_q = tl.sum(p * shifted_p, 1), tl.sum(q * shifted_q, 1)
        return tl.sum(p, 1), weighted_sum_p, tl.sum(q, 1), weighted_sum_q, tl.sum(weighted, 1), tl.sum(phis, 1)
    else:
        left_p, right_p = _halves(z_p)
        left_q, right_q = _halves(z_q)
        a, b, c, d, e, f = _pair_sums(left_p, left_q, about_p, about_q, centre, growth, PARTS // 2)
        g, h, i, j, k, l = _pair_sums(right_p, right_q, about_p, about_q, centre, growth, PARTS // 2)  # noqa: E741
        return a + g, b + h, c + i, d + j, e + k, f + l


@triton.jit
def _fold_pair_exactly(
    z_p, z_q, max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess, PARTS: tl.constexpr
):  # fmt: skip
    """Statistics with one more tile, each part about its own maxima and mean gap."""
    if PARTS == 1:
        a, b, c, d, e, f, g, h = fold_block_pair(z_p, z_q)
        return merge_pair(
            max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess, a, b, c, d, e, f, g, h
        )
    else:
        left_p, right_p = _halves(z_p)
        left_q, right_q = _halves(z_q)
        a, b, c, d, e, f, g, h = _fold_pair_exactly(
            left_p, left_q, max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess, PARTS // 2
        )
        return _fold_pair_exactly(right_p, right_q, a, b, c, d, e, f, g, h, PARTS // 2)


@triton.jit
def _fold(z, top, total, weighted_sum, PARTS: tl.constexpr):
    """One view's statistics with one more tile, which is finite."""
    found = tl.maximum(top, tl.max(z, 1))
    about = base_of(found)
    down = distance(top, about)
    keep = tl.exp(down)
    new_total, new_weighted_sum = _sums(z, about, PARTS)
    found = tl.where(found == FLOOR, float("-inf"), found)
    return found, keep * total + new_total, keep * (weighted_sum + down * total) + new_weighted_sum


@triton.jit
def _fold_pair(
    z_p, z_q, there, max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess,
    PARTS: tl.constexpr, EXACT_PARTS: tl.constexpr,
):  # fmt: skip
    """The same for two views, which need not be finite.

    Weights are taken about the maxima, this tile's included, and gaps about the mean gap known so far. Where that is so
    far from the new mean that the excess about it is lost (see `joined_pair` in triton_math.py), or where a word is
    masked, so that its weighted sum is NaN, the rows of this program fold the tile once more, exactly.
    """
    top_p, top_q = tl.maximum(max_p, tl.max(z_p, 1)), tl.maximum(max_q, tl.max(z_q, 1))
    about_p, about_q = base_of(top_p), base_of(top_q)
    down_p, down_q = distance(max_p, about_p), distance(max_q, about_q)
    keep_p, keep_q = tl.exp(down_p), tl.exp(down_q)
    centre = mean_diff + (down_p - down_q)
    a, b, c, d, gaps, phis = _pair_sums(z_p, z_q, about_p, about_q, centre, tl.exp(centre), PARTS)
    total_p, total_q = keep_p * sum_p + a, keep_q * sum_q + c
    new_p, new_q = keep_p * (weighted_sum_p + down_p * sum_p) + b, keep_q * (weighted_sum_q + down_q * sum_q) + d
    move = gaps / total_p  # from the new mean gap to the known one
    shrink, moved = tl.exp(-move), phi(move) * total_p
    new_excess = (keep_p * excess + phis - moved) * shrink
    new_excess = tl.where(new_excess > 0, new_excess, 0.0)
    lost = tl.maximum(phis, moved) * shrink
    close = lost <= 4 * new_excess + 1.2 * tl.sqrt(new_excess * total_p) + 0.004 * total_p
    close &= (tl.abs(centre) <= NEAR) & (tl.abs(move) <= NEAR) & (new_p == new_p) & (new_q == new_q)
    close &= (sum_p > 0) | (sum_q == 0)  # else the excess so far is of words that p masks, and hangs on no weight of p
    new_mean = centre - move
    if tl.max(tl.where(close | ~there, 0, 1), 0) > 0:
        a, b, c, d, e, f, g, h = _fold_pair_exactly(
            z_p, z_q, max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess, EXACT_PARTS
        )
        top_p, total_p, new_p = tl.where(close, top_p, a), tl.where(close, total_p, b), tl.where(close, new_p, c)
        top_q, total_q, new_q = tl.where(close, top_q, d), tl.where(close, total_q, e), tl.where(close, new_q, f)
        new_mean, new_excess = tl.where(close, new_mean, g), tl.where(close, new_excess, h)
    return top_p, total_p, new_p, top_q, total_q, new_q, new_mean, new_excess


@triton.jit
def _logits(z, bias, scale, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, FINITE: tl.constexpr):
    """Raw products to transformed logits; with FINITE of a masked word one so low that it has no weight."""
    if HAS_BIAS:
        z += bias
    if SCALED:
        z *= scale
    if FINITE:
        z = tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return z


@triton.jit
def _sweep_kernel(
    h, w, bias_ptr, shares_rounding_ptr, targets_ptr, parts_ptr,
    first, rows, columns, hidden_size, w_stride, w_inner, span, splits, scale,
    PAIR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TARGETS: tl.constexpr, SHARES_ROUNDING: tl.constexpr,
    SCALED: tl.constexpr, DESCRIPTORS: tl.constexpr, ALTERNATE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, EXACT_PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # the row blocks of a group run at the same time and read the same tile of the weight
    ROWS: tl.constexpr = BLOCK_M // 2 if ALTERNATE else BLOCK_M
    program, blocks = tl.program_id(0), tl.cdiv(rows, ROWS)
    group_first = program // (GROUP * splits) * GROUP
    group_size = tl.minimum(blocks - group_first, GROUP)
    block = group_first + program % (GROUP * splits) % group_size
    split = program % (GROUP * splits) // group_size

    row = block * ROWS + tl.arange(0, ROWS)
    there = row < rows
    row_start = block * BLOCK_M
    h_row = row_start + tl.arange(0, BLOCK_M)
    h_rows = tl.cdiv(rows, 8) * 16 if ALTERNATE else rows
    if HAS_TARGETS:
        target = (tl.load(targets_ptr + row, mask=there, other=-1) - first).to(tl.int32)
    max_p = tl.full((ROWS,), float("-inf"), tl.float32)
    sum_p, weighted_sum_p = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    target_p, target_q = max_p, max_p
    max_q, sum_q, weighted_sum_q, mean_diff, excess = max_p, sum_p, sum_p, sum_p, sum_p

    for column_start in range(split * span, tl.minimum(split * span + span, columns), BLOCK_N):
        column = column_start + tl.arange(0, BLOCK_N)
        z_p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        z_q = z_p
        for k_start in range(0, hidden_size, BLOCK_K):
            if DESCRIPTORS:
                b = w.load([column_start, k_start]).T
                a = h.load([row_start, k_start])
            else:
                k = k_start + tl.arange(0, BLOCK_K)
                b_ptr = w + column.to(tl.int64)[None, :] * w_stride + k.to(tl.int64)[:, None] * w_inner
                b = tl.load(b_ptr, mask=(k < hidden_size)[:, None] & (column < columns)[None, :], other=0.0)
                a_ptr = h + h_row.to(tl.int64)[:, None] * hidden_size + k[None, :]
                inside = (h_row < h_rows)[:, None] & (k < hidden_size)[None, :]
                a = tl.load(a_ptr, mask=inside, other=0.0)
            z_p = tl.dot(a, b.to(a.dtype), z_p, input_precision="ieee")
            if PAIR and not ALTERNATE:
                if DESCRIPTORS:
                    a = h.load([rows + row_start, k_start])
                else:
                    a = tl.load(a_ptr + tl.cast(rows, tl.int64) * hidden_size, mask=inside, other=0.0)
                z_q = tl.dot(a, b.to(a.dtype), z_q, input_precision="ieee")
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        if ALTERNATE:
            z_p, z_q = _views(z_p)
        if SHARES_ROUNDING:  # see `_difference_` in linear_head.py
            z_q += z_p * tl.load(shares_rounding_ptr + row, mask=there, other=0.0)[:, None]
        # of two views a masked word is found by its weighted sum, unless a bias masks words as a matter of course
        z_p = _logits(z_p, bias, scale, HAS_BIAS, SCALED, HAS_BIAS or not PAIR)
        if PAIR:
            z_q = _logits(z_q, bias, scale, HAS_BIAS, SCALED, HAS_BIAS)
        if column_start + BLOCK_N > columns:
            z_p = tl.where((column < columns)[None, :], z_p, FLOOR)
            z_q = tl.where((column < columns)[None, :], z_q, FLOOR)
        if HAS_TARGETS:  # noqa: SIM102 (the compiler looks into the inner condition only where there are targets)
            if tl.max(tl.where((target >= column_start) & (target < column_start + BLOCK_N), 1, 0), 0) > 0:
                hit = column[None, :] == target[:, None]
                target_p = tl.maximum(target_p, tl.max(tl.where(hit, z_p, float("-inf")), 1))
                if PAIR:
                    target_q = tl.maximum(target_q, tl.max(tl.where(hit, z_q, float("-inf")), 1))
        if PAIR:
            max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess = _fold_pair(
                z_p, z_q, there, max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess,
                PARTS, EXACT_PARTS,
            )  # fmt: skip
        else:
            max_p, sum_p, weighted_sum_p = _fold(z_p, max_p, sum_p, weighted_sum_p, PARTS)

    fields: tl.constexpr = PAIR_FIELDS if PAIR else SOFTMAX_FIELDS
    out = parts_ptr + tl.cast(split, tl.int64) * fields * rows + row
    # a masked word's logit is held at the floor, so that no sum meets an infinity
    tl.store(out + (P + TARGET) * rows, tl.where(target_p != FLOOR, target_p, float("-inf")), mask=there)
    if PAIR:
        tl.store(out + (Q + TARGET) * rows, tl.where(target_q != FLOOR, target_q, float("-inf")), mask=there)
        store_pair_stats(
            out, rows, there, max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess
        )
    else:
        store_stats(out, rows, there, max_p, sum_p, weighted_sum_p)


@triton.jit
def _merge_parts_kernel(parts_ptr, stats_ptr, rows, splits, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    parts, out = parts_ptr + row, stats_ptr + row
    fields: tl.constexpr = PAIR_FIELDS if PAIR else SOFTMAX_FIELDS
    target_p = tl.load(parts + (P + TARGET) * rows, mask=there, other=0.0)
    if PAIR:
        target_q = tl.load(parts + (Q + TARGET) * rows, mask=there, other=0.0)
        max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess = load_pair_stats(
            parts, rows, there
        )
    else:
        max_p, sum_p, weighted_sum_p = load_stats(parts, rows, there)
    for _ in range(1, splits):
        parts += fields * rows
        target_p = tl.maximum(target_p, tl.load(parts + (P + TARGET) * rows, mask=there, other=0.0))
        if PAIR:
            target_q = tl.maximum(target_q, tl.load(parts + (Q + TARGET) * rows, mask=there, other=0.0))
            a, b, c, d, e, f, g, h = load_pair_stats(parts, rows, there)
            max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess = merge_pair(
                max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess, a, b, c, d, e, f, g, h
            )
        else:
            a, b, c = load_stats(parts, rows, there)
            max_p, sum_p, weighted_sum_p = merge(max_p, sum_p, weighted_sum_p, a, b, c)
    tl.store(out + (P + TARGET) * rows, target_p, mask=there)
    if PAIR:
        tl.store(out + (Q + TARGET) * rows, target_q, mask=there)
        store_pair_stats(
            out, rows, there, max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess
        )
    else:
        store_stats(out, rows, there, max_p, sum_p, weighted_sum_p)


def configuration(dtype: torch.dtype, descriptors: bool, eight_apart: bool) -> dict[str, Any]:
    """Block sizes, parts of a tile, warps and stages.

    The logits of a block and a part's temporaries must fit the registers of a program. That takes 128 x 256 on Hopper,
    where descriptors hold the addresses, and a fraction of it elsewhere.
    """
    if triton.knobs.runtime.interpret:  # the interpreter pays by the operation, and has no registers
        rows = 128 if eight_apart else 64
        return dict(BLOCK_M=rows, BLOCK_N=256, BLOCK_K=128, PARTS=2, EXACT_PARTS=2, num_warps=4, num_stages=1)
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, PARTS=1, EXACT_PARTS=1, num_warps=8, num_stages=2)
    if descriptors and eight_apart:
        return dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, PARTS=4, EXACT_PARTS=16, num_warps=8, num_stages=4)
    if descriptors:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, PARTS=1, EXACT_PARTS=1, num_warps=8, num_stages=3)
    if eight_apart:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, PARTS=1, EXACT_PARTS=1, num_warps=4, num_stages=3)
    return dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=64, PARTS=1, EXACT_PARTS=1, num_warps=4, num_stages=3)


def _describable(stacked: Tensor, weight: Tensor) -> bool:
    """Whether the chip has tensor descriptors (sm_90 on) and the operands are aligned as those need it."""
    if not triton.knobs.runtime.interpret and (
        not weight.is_cuda or torch.version.hip or torch.cuda.get_device_capability(weight.device) < (9, 0)
    ):
        return False
    if weight.dtype != stacked.dtype or weight.dtype == torch.float32:  # float32 would spill
        return False
    return all(
        x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
        for x in (stacked, weight)
    )


def _eight_apart(stacked: Tensor) -> bool:
    """Whether matrix instructions leave two rows, eight apart, in one thread: those of Ampere and Hopper, in 16 bits.

    Elsewhere both views are multiplied one after the other, which leaves their logits in the same thread too.
    """
    if triton.knobs.runtime.interpret:
        return True
    nvidia = stacked.is_cuda and not torch.version.hip
    return nvidia and stacked.dtype.itemsize == 2 and torch.cuda.get_device_capability(stacked.device)[0] in (8, 9)


def refuses(source: LinearHead) -> str:
    """See `FusedSweep`."""
    return ""


def rows(source: LinearHead, of_tiles: int, workspace: int) -> int:
    """See `FusedSweep`."""
    return of_tiles


def _sweep(source: LinearHead, rows: slice, targets: Tensor | None, pair: bool) -> Tensor:
    count, columns = rows.stop - rows.start, source.columns
    stacked, shares_rounding = source.stacked(rows)
    eight_apart = _eight_apart(stacked)
    alternate = pair and eight_apart
    if alternate:
        stacked = in_turns(stacked)
    h: Any = stacked
    w: Any = source.weight
    descriptors = _describable(h, w)
    config = configuration(stacked.dtype, descriptors, eight_apart)
    if descriptors:
        h = TensorDescriptor.from_tensor(h, [config["BLOCK_M"], config["BLOCK_K"]])
        w = TensorDescriptor.from_tensor(w, [config["BLOCK_N"], config["BLOCK_K"]])
    rows_each = config["BLOCK_M"] // 2 if alternate else config["BLOCK_M"]
    blocks, tiles = triton.cdiv(count, rows_each), triton.cdiv(columns, config["BLOCK_N"])
    cores = torch.cuda.get_device_properties(stacked.device).multi_processor_count if stacked.is_cuda else FEW
    span = triton.cdiv(tiles, splits_of(blocks, tiles, cores)) * config["BLOCK_N"]
    splits = triton.cdiv(columns, span)
    fields = statistics.PAIR_FIELDS if pair else statistics.SOFTMAX_FIELDS
    parts = torch.empty(splits, fields, count, device=stacked.device, dtype=torch.float32)
    scale = source.transform.logit_scale / source.transform.temperature
    _sweep_kernel[(blocks * splits,)](
        h, w, None if source.bias is None else source.bias.contiguous(), shares_rounding, targets, parts,
        source.first, count, columns, source.hidden_size, source.weight.stride(0), source.weight.stride(1), span,
        splits, scale, pair, source.bias is not None, targets is not None, shares_rounding is not None, scale != 1.0,
        descriptors, alternate, GROUP=GROUP, enable_fp_fusion=True, **config,
    )  # fmt: skip
    if splits == 1:
        return parts[0]
    stats = torch.empty_like(parts[0])
    _merge_parts_kernel[(triton.cdiv(count, 128),)](parts, stats, count, splits, pair, 128, **OPTIONS)
    return stats


def sweep(source: LinearHead, rows: slice, targets: Tensor) -> Tensor:
    """See `FusedSweep`."""
    return _sweep(source, rows, targets, pair=False)


def sweep_pair(source: LinearHead, rows: slice, targets: Tensor | None) -> Tensor:
    """See `FusedSweep`."""
    return _sweep(source, rows, targets, pair=True)
