"""The tile operations as Triton kernels: one program per row and one sweep over its tile, or elementwise in place.

Statistics stay in registers while a program walks its row and are merged
with those of earlier tiles before they are written back, in place. Under `TRITON_INTERPRET=1` all of it runs on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vppo_kernels.backends.triton_math import (
    APART,
    ENTROPY,
    FLOOR,
    GRAD_DIVERGENCE,
    GRAD_ENTROPY,
    GRAD_ENTROPY_P,
    GRAD_ENTROPY_Q,
    GRAD_LOGPROB,
    GRAD_LOGPROB_P,
    GRAD_LOGPROB_Q,
    JSD_P,
    JSD_Q,
    KL,
    LOG_SUM,
    MAX,
    MEAN_DIFF,
    NEAR,
    TARGET,
    P,
    Q,
    add_block,
    add_block_pair,
    base_of,
    expm1,
    finite,
    fold_block,
    fold_block_pair,
    gap_of,
    joined,
    joined_pair,
    load_logits,
    load_pair_stats,
    load_stats,
    log_shares,
    merge,
    merge_pair,
    store_pair_stats,
    store_stats,
)
from vppo_kernels.logits import LogitTransform

SCRATCH = 0  # nothing but the tile itself
PEAK = 2  # tiles of one view alive at a time: those of logits
WARPS = 4
OPTIONS = dict(num_warps=WARPS, enable_fp_fusion=True)  # what the accuracy was proven with; Triton's default may change
PREPARED = 64  # launches that are remembered
# Rows of a program and columns that it takes at a time. The interpreter pays by the operation, not by the element.
ROWS, BLOCK = (64, 1024) if triton.knobs.runtime.interpret else (1, 1024)


@triton.jit
def _fold_exactly(z_ptr, rows, columns, there, top, total, weighted_sum, first, BLOCK: tl.constexpr):
    """Statistics with the columns from `first` on, each block about its own maximum."""
    for start in range(first, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & (column < columns)
        z = tl.load(z_ptr[:, None] + column, mask=inside, other=float("-inf"))
        part_top, part_total, part_weighted_sum, _, _ = fold_block(finite(z))
        top, total, weighted_sum = merge(top, total, weighted_sum, part_top, part_total, part_weighted_sum)
    return top, total, weighted_sum


@triton.jit(do_not_specialize=["first"])
def _fold_kernel(
    z_ptr, stats_ptr, targets_ptr, first, rows, columns,
    HAS_TARGETS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    stats, z_ptr = stats_ptr + row, z_ptr + row * columns
    top, total, weighted_sum = load_stats(stats, rows, there)
    begin = 0
    if tl.max(tl.where(top == float("-inf"), 1, 0), 0) > 0:
        begin = BLOCK
        top, total, weighted_sum = _fold_exactly(
            z_ptr, rows, tl.minimum(columns, BLOCK), there, top, total, weighted_sum, 0, BLOCK
        )
    about = base_of(top)
    tops = tl.full((ROWS, BLOCK), FLOOR, tl.float32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    weighted_sums = sums
    whole = begin + tl.maximum(columns - begin, 0) // BLOCK * BLOCK
    column = tl.arange(0, BLOCK)[None, :]
    for start in range(begin, whole, BLOCK):
        z = load_logits(z_ptr[:, None] + start + column, there[:, None], ROWS > 1)
        tops, sums, weighted_sums = add_block(z, about, tops, sums, weighted_sums)
    if whole < columns:
        z = load_logits(z_ptr[:, None] + whole + column, there[:, None] & (whole + column < columns), True)
        tops, sums, weighted_sums = add_block(z, about, tops, sums, weighted_sums)
    found, new_total, new_weighted_sum = joined(top, about, total, weighted_sum, tops, sums, weighted_sums)
    near = (found - about <= NEAR) & (about > 0.1 * FLOOR) & (new_total == new_total)
    if tl.min(tl.where(near | ~there, 1, 0), 0) == 0:
        a, b, c = _fold_exactly(z_ptr, rows, columns, there, top, total, weighted_sum, begin, BLOCK)
        found, new_total, new_weighted_sum = (
            tl.where(near, found, a),
            tl.where(near, new_total, b),
            tl.where(near, new_weighted_sum, c),
        )
    store_stats(stats, rows, there, found, new_total, new_weighted_sum)
    if HAS_TARGETS:
        target = tl.load(targets_ptr + row, mask=there, other=-1) - first
        hit = there & (target >= 0) & (target < columns)
        tl.store(stats + TARGET * rows, tl.load(z_ptr + target, mask=hit, other=0.0), mask=hit)


@triton.jit
def _fold_pair_exactly(
    p_ptr, q_ptr, columns, there, max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess, first,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for two views, each block about its own maxima and mean gap."""
    for start in range(first, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & (column < columns)
        z_p = tl.load(p_ptr[:, None] + column, mask=inside, other=float("-inf"))
        z_q = tl.load(q_ptr[:, None] + column, mask=inside, other=float("-inf"))
        a, b, c, d, e, f, g, h = fold_block_pair(z_p, z_q)
        max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess = merge_pair(
            max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess, a, b, c, d, e, f, g, h
        )
    return max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess


@triton.jit(do_not_specialize=["first"])
def _fold_pair_kernel(
    z_ptr, stats_ptr, targets_ptr, first, rows, columns,
    HAS_TARGETS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    stats, p_ptr, q_ptr = stats_ptr + row, z_ptr + row * columns, z_ptr + (rows + row) * columns
    max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess = load_pair_stats(stats, rows, there)
    begin = 0
    if tl.max(tl.where((max_p == float("-inf")) | (max_q == float("-inf")), 1, 0), 0) > 0:
        begin = BLOCK  # nothing is known that distances could be measured from
        max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess = _fold_pair_exactly(
            p_ptr, q_ptr, tl.minimum(columns, BLOCK), there,
            max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess, 0, BLOCK,
        )  # fmt: skip
    known = (max_p > 0.1 * FLOOR) & (max_q > 0.1 * FLOOR) & (tl.abs(max_p - max_q) <= APART)
    known &= tl.abs(mean_diff) <= NEAR
    about_p, about_q = tl.where(known, max_p, 0.0), tl.where(known, max_q, 0.0)
    # gaps are measured from the rounded sum, so that its rounding is no error but another mean
    between = (about_p - about_q) + tl.where(known, mean_diff, 0.0)
    centre = between - (about_p - about_q)
    growth = tl.exp(centre)
    tops_p = tl.full((ROWS, BLOCK), FLOOR, tl.float32)
    zeros = tl.zeros((ROWS, BLOCK), tl.float32)
    sums_p, weighted_sums_p, tops_q, sums_q, weighted_sums_q = zeros, zeros, tops_p, zeros, zeros
    gaps, phis = zeros, zeros
    whole = begin + tl.maximum(columns - begin, 0) // BLOCK * BLOCK
    column = tl.arange(0, BLOCK)[None, :]
    for start in range(begin, whole, BLOCK):
        z_p = load_logits(p_ptr[:, None] + start + column, there[:, None], ROWS > 1)
        z_q = load_logits(q_ptr[:, None] + start + column, there[:, None], ROWS > 1)
        tops_p, sums_p, weighted_sums_p, tops_q, sums_q, weighted_sums_q, gaps, phis = add_block_pair(
            z_p, z_q, about_p, about_q, between, growth,
            tops_p, sums_p, weighted_sums_p, tops_q, sums_q, weighted_sums_q, gaps, phis,
        )  # fmt: skip
    if whole < columns:
        inside = there[:, None] & (whole + column < columns)
        z_p = load_logits(p_ptr[:, None] + whole + column, inside, True)
        z_q = load_logits(q_ptr[:, None] + whole + column, inside, True)
        tops_p, sums_p, weighted_sums_p, tops_q, sums_q, weighted_sums_q, gaps, phis = add_block_pair(
            z_p, z_q, about_p, about_q, between, growth,
            tops_p, sums_p, weighted_sums_p, tops_q, sums_q, weighted_sums_q, gaps, phis,
        )  # fmt: skip
    a, b, c, d, e, f, g, h, close = joined_pair(
        max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess, known, about_p, about_q, centre,
        tops_p, sums_p, weighted_sums_p, tops_q, sums_q, weighted_sums_q, gaps, phis,
    )  # fmt: skip
    if tl.min(tl.where(close | ~there, 1, 0), 0) == 0:
        i, j, k, l, m, n, o, p = _fold_pair_exactly(  # noqa: E741
            p_ptr, q_ptr, columns, there,
            max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess, begin, BLOCK,
        )  # fmt: skip
        a, b, c, d = tl.where(close, a, i), tl.where(close, b, j), tl.where(close, c, k), tl.where(close, d, l)
        e, f, g, h = tl.where(close, e, m), tl.where(close, f, n), tl.where(close, g, o), tl.where(close, h, p)
    store_pair_stats(stats, rows, there, a, b, c, d, e, f, g, h)
    if HAS_TARGETS:
        target = tl.load(targets_ptr + row, mask=there, other=-1) - first
        hit = there & (target >= 0) & (target < columns)
        tl.store(stats + (P + TARGET) * rows, tl.load(p_ptr + target, mask=hit, other=0.0), mask=hit)
        tl.store(stats + (Q + TARGET) * rows, tl.load(q_ptr + target, mask=hit, other=0.0), mask=hit)


@triton.jit
def _field(packed, index, stride, there):
    """One field of packed statistics, `[rows, 1]`."""
    return tl.load(packed + index * stride, mask=there, other=0.0)[:, None]


@triton.jit
def _load_finite(z_ptr, inside):
    """Logits; of a masked word a finite one whose probability is 0."""
    return finite(tl.load(z_ptr, mask=inside, other=0.0))


@triton.jit
def _log_probabilities(z_p, z_q, pair, stride, there):
    """`log p`, `log q`, `log(p / q)`, and the gap of each column from the mean gap, `log(p / q) - KL`."""
    max_p, max_q = _field(pair, P + MAX, stride, there), _field(pair, Q + MAX, stride, there)
    centred = gap_of(z_p, z_q, max_p, max_q) - _field(pair, MEAN_DIFF, stride, there)
    log_p = (z_p - max_p) - _field(pair, P + LOG_SUM, stride, there)
    log_q = (z_q - max_q) - _field(pair, Q + LOG_SUM, stride, there)
    kl = _field(pair, KL, stride, there)
    return log_p, log_q, tl.where(kl > APART, log_p - log_q, centred + kl), centred


@triton.jit
def _fold_jsd_kernel(
    z_ptr, pair_ptr, pair_stride, terms_ptr, rows, columns, beta, log_beta, log_rest, HALF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    pair, p_ptr, q_ptr = pair_ptr + row, z_ptr + row * columns, z_ptr + (rows + row) * columns
    term_p = tl.load(terms_ptr + JSD_P * rows + row, mask=there, other=0.0)
    term_q = tl.load(terms_ptr + JSD_Q * rows + row, mask=there, other=0.0)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & (column < columns)
        z_p, z_q = _load_finite(p_ptr[:, None] + column, inside), _load_finite(q_ptr[:, None] + column, inside)
        log_p, log_q, d, _ = _log_probabilities(z_p, z_q, pair, pair_stride, there)
        of_p, of_q = log_shares(d, beta, log_beta, log_rest, HALF)
        term_p += tl.sum(tl.where(inside, tl.exp(log_p) * of_p, 0.0), 1)
        term_q += tl.sum(tl.where(inside, tl.exp(log_q) * of_q, 0.0), 1)
    tl.store(terms_ptr + JSD_P * rows + row, term_p, mask=there)
    tl.store(terms_ptr + JSD_Q * rows + row, term_q, mask=there)


@triton.jit
def _slope(z, scale, to_cap, SOFTCAP: tl.constexpr):
    """Derivative of transformed logits by raw ones, from the transformed ones."""
    if SOFTCAP:
        return scale * (1 - (z * to_cap) * (z * to_cap))
    else:
        return scale


@triton.jit(do_not_specialize=["first"])
def _gradient_kernel(
    z_ptr, out_ptr, softmax_ptr, softmax_stride, targets_ptr, grads_ptr, grads_stride, first, rows, columns, scale,
    to_cap, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = row < rows
    inside = there[:, None] & (column < columns)
    entry, softmax, grads = (row * columns)[:, None] + column, softmax_ptr + row, grads_ptr + row
    z = _load_finite(z_ptr + entry, inside)
    log_p = (z - _field(softmax, MAX, softmax_stride, there)) - _field(softmax, LOG_SUM, softmax_stride, there)
    grad_logprob = _field(grads, GRAD_LOGPROB, grads_stride, there)
    grad_entropy = _field(grads, GRAD_ENTROPY, grads_stride, there)
    grad = tl.exp(log_p) * (-grad_entropy * (log_p + _field(softmax, ENTROPY, softmax_stride, there)) - grad_logprob)
    target = tl.load(targets_ptr + row, mask=there, other=-1)[:, None] - first
    grad += tl.where(column == target, grad_logprob, 0.0)
    tl.store(out_ptr + entry, grad * _slope(z, scale, to_cap, SOFTCAP), mask=inside)


@triton.jit(do_not_specialize=["first"])
def _gradient_pair_kernel(
    z_ptr, out_ptr, out_stride, pair_ptr, pair_stride, terms_ptr, terms_stride, targets_ptr, grads_ptr, grads_stride,
    first, rows, columns, scale_p, to_cap_p, scale_q, to_cap_q, beta, log_beta, log_rest,
    HAS_TARGETS: tl.constexpr, JSD: tl.constexpr, HALF: tl.constexpr, SOFTCAP_P: tl.constexpr, SOFTCAP_Q: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = row < rows
    inside = there[:, None] & (column < columns)
    entry, pair, grads = (row * columns)[:, None] + column, pair_ptr + row, grads_ptr + row
    z_p = _load_finite(z_ptr + entry, inside)
    z_q = _load_finite(z_ptr + ((rows + row) * columns)[:, None] + column, inside)
    log_p, log_q, d, centred = _log_probabilities(z_p, z_q, pair, pair_stride, there)
    p, q = tl.exp(log_p), tl.exp(log_q)
    upstream = _field(grads, GRAD_DIVERGENCE, grads_stride, there)
    if JSD:
        of_p, of_q = log_shares(d, beta, log_beta, log_rest, HALF)
        grad_p = (1 - beta) * upstream * p * (of_p - _field(terms_ptr + row, JSD_P, terms_stride, there))
        grad_q = beta * upstream * q * (of_q - _field(terms_ptr + row, JSD_Q, terms_stride, there))
    else:
        grad_p = upstream * p * centred
        # q - p = -q (exp(d) - 1): the difference of two exponentials would lose the digits of a small gap
        grad_q = upstream * tl.where(d > 1.0, q - p, -q * expm1(tl.minimum(d, 1.0)))
    entropy_p, entropy_q = _field(pair, P + ENTROPY, pair_stride, there), _field(pair, Q + ENTROPY, pair_stride, there)
    grad_p -= _field(grads, GRAD_ENTROPY_P, grads_stride, there) * p * (log_p + entropy_p)
    grad_q -= _field(grads, GRAD_ENTROPY_Q, grads_stride, there) * q * (log_q + entropy_q)
    if HAS_TARGETS:
        target = tl.load(targets_ptr + row, mask=there, other=-1)[:, None] - first
        hit = tl.where(column == target, 1.0, 0.0)
        grad_p += _field(grads, GRAD_LOGPROB_P, grads_stride, there) * (hit - p)
        grad_q += _field(grads, GRAD_LOGPROB_Q, grads_stride, there) * (hit - q)
    tl.store(out_ptr + entry, grad_p * _slope(z_p, scale_p, to_cap_p, SOFTCAP_P), mask=inside)
    tl.store(out_ptr + out_stride + entry, grad_q * _slope(z_q, scale_q, to_cap_q, SOFTCAP_Q), mask=inside)


def fold(tile: Tensor, targets: Tensor | None, first: int, stats: Tensor, scratch: Tensor) -> Tensor:
    """See `TileOps`; `stats` is updated in place."""
    rows, columns = tile.shape
    if tile.numel():
        start(
            _fold_kernel, _grid(rows), (pointer(tile), pointer(stats), pointer(targets), rows, columns),
            tile, stats, targets, first, rows, columns, targets is not None, ROWS, BLOCK,
        )  # fmt: skip
    return stats


def fold_pair(tile: Tensor, targets: Tensor | None, first: int, stats: Tensor, scratch: Tensor) -> Tensor:
    """See `TileOps`; `stats` is updated in place."""
    _, rows, columns = tile.shape
    if tile.numel():
        start(
            _fold_pair_kernel, _grid(rows), (pointer(tile), pointer(stats), pointer(targets), rows, columns),
            tile, stats, targets, first, rows, columns, targets is not None, ROWS, BLOCK,
        )  # fmt: skip
    return stats


def fold_jsd(tile: Tensor, pair: Tensor, jsd_terms: Tensor, beta: float) -> Tensor:
    """See `TileOps`; `jsd_terms` is updated in place."""
    _, rows, columns = tile.shape
    if tile.numel():
        _fold_jsd_kernel[_grid(rows)](
            tile, pair, pair.stride(0), jsd_terms, rows, columns, *_mixture_arguments(beta), ROWS, BLOCK, **OPTIONS
        )
    return jsd_terms


def gradient_(
    tile: Tensor,
    softmax: Tensor,
    targets: Tensor,
    first: int,
    grads: Tensor,
    transform: LogitTransform,
    out: Tensor,
) -> None:
    """See `TileOps`."""
    rows, columns = tile.shape
    strides, slope = (softmax.stride(0), grads.stride(0)), _slope_arguments(transform)
    if tile.numel():
        places = pointer(tile), pointer(out), pointer(softmax), pointer(targets), pointer(grads)
        start(
            _gradient_kernel, _grid(rows, columns), (*places, out.dtype, *strides, rows, columns, slope),
            tile, out, softmax, strides[0], targets, grads, strides[1], first, rows, columns, *slope, ROWS, BLOCK,
        )  # fmt: skip


def gradient_pair_(
    tile: Tensor,
    pair: Tensor,
    jsd_terms: Tensor | None,
    beta: float,
    targets: Tensor | None,
    first: int,
    grads: Tensor,
    transforms: tuple[LogitTransform, ...],
    out: Tensor,
) -> None:
    """See `TileOps`."""
    _, rows, columns = tile.shape
    slopes = [_slope_arguments(each) for each in transforms]
    (scale_p, to_cap_p, softcap_p), (scale_q, to_cap_q, softcap_q) = slopes
    *shares, half = _mixture_arguments(beta)
    strides = out.stride(0), pair.stride(0), 0 if jsd_terms is None else jsd_terms.stride(0), grads.stride(0)
    if tile.numel():
        places = pointer(tile), pointer(out), pointer(pair), pointer(jsd_terms), pointer(targets), pointer(grads)
        same = (*places, out.dtype, *strides, rows, columns, *slopes, beta)
        start(
            _gradient_pair_kernel, _grid(rows, columns), same,
            tile, out, strides[0], pair, strides[1], jsd_terms, strides[2], targets, grads, strides[3],
            first, rows, columns, scale_p, to_cap_p, scale_q, to_cap_q, *shares,
            targets is not None, jsd_terms is not None, half, softcap_p, softcap_q, ROWS, BLOCK,
        )  # fmt: skip


_prepared: dict[tuple[Any, ...], Callable[..., None]] = {}


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def start(kernel: Any, grid: tuple[int, int], same: tuple[Any, ...], *arguments: Any) -> None:
    """Run a kernel of tiles, and the next time with less ado: Triton takes ten microseconds to see what it is given.

    Args:
        kernel: Its argument `first` is not specialized on.
        grid: Numbers of programs.
        same: Whatever else decides which machine code is right: all addresses, sizes and flags.
        arguments: All that the kernel takes, in order.
    """
    key = kernel, arguments[0].device, grid, same
    prepared = _prepared.get(key)
    if prepared is not None:
        prepared(*arguments)
        return
    compiled = kernel[grid](*arguments, **OPTIONS)
    if compiled is not None:  # the interpreter compiles nothing
        if len(_prepared) >= PREPARED:
            _prepared.clear()
        _prepared[key] = compiled[(*grid, 1)]


def _grid(rows: int, columns: int = 1) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS), triton.cdiv(columns, BLOCK)


def _mixture_arguments(beta: float) -> tuple[float, float, float, bool]:
    return beta, math.log(beta), math.log1p(-beta), beta == 0.5


def _slope_arguments(transform: LogitTransform) -> tuple[float, float, bool]:
    cap = transform.softcap
    to_cap = 0.0 if cap is None else transform.temperature / cap
    return transform.logit_scale / transform.temperature, to_cap, cap is not None
