"""The forward sweep with the matrix product inside: logits live in registers only. The rest is `backends/triton.py`.

A program takes a block of rows and a part of the vocabulary. It multiplies tile after tile, both views against the same
tile of the weight, folds each into its statistics and writes those; a second kernel merges the parts. No tile of logits
exists in memory, so it also works in a few MiB. A library's matrix product is faster than this one as long as its tiles
stay in the cache, so "auto" does not choose this backend. It is for a workspace too small for useful tiles, and for few
rows. Jensen-Shannon divergences, those of the likeliest words, capped logits, logits that are given, two heads, and
whatever has a gradient go through tiles.
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
    PAIR_FIELDS,
    SOFTMAX_FIELDS,
    TARGET,
    P,
    Q,
    finite,
    fold_block,
    fold_block_pair,
    load_pair_stats,
    load_stats,
    merge,
    merge_pair,
    store_pair_stats,
    store_stats,
)
from vppo_kernels.logits import LinearHead

GROUP = 8  # row blocks that walk the vocabulary side by side, so that a tile of the weight is read from the cache
PROGRAMS_PER_CORE = 4  # enough parts of the vocabulary that no multiprocessor idles at the end


@triton.jit
def _transformed(z, bias_ptr, column, columns, scale, HAS_BIAS: tl.constexpr):
    """Raw products to transformed logits."""
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    return z * scale


@triton.jit
def _sweep_kernel(
    h, w, bias_ptr, shares_rounding_ptr, targets_ptr, parts_ptr,
    first, rows, columns, hidden_size, w_stride, w_inner, span, splits, scale,
    PAIR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TARGETS: tl.constexpr, SHARES_ROUNDING: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    # the row blocks of a group run at the same time and read the same tile of the weight
    program, blocks = tl.program_id(0), tl.cdiv(rows, BLOCK_M)
    group_first = program // (GROUP * splits) * GROUP
    group_size = tl.minimum(blocks - group_first, GROUP)
    block = group_first + program % (GROUP * splits) % group_size
    split = program % (GROUP * splits) // group_size

    row_start = block * BLOCK_M
    row = row_start + tl.arange(0, BLOCK_M)
    there = row < rows
    if HAS_TARGETS:
        target = tl.load(targets_ptr + row, mask=there, other=-1) - first
    max_p = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_p, weighted_sum_p = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    target_p, target_q = max_p, max_p
    max_q, sum_q, weighted_sum_q, mean_diff, excess = max_p, sum_p, sum_p, sum_p, sum_p

    for column_start in range(split * span, tl.minimum(split * span + span, columns), BLOCK_N):
        column = column_start + tl.arange(0, BLOCK_N)
        z_p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        z_q = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k_start in range(0, hidden_size, BLOCK_K):
            if DESCRIPTORS:
                b = w.load([column_start, k_start]).T
                a = h.load([row_start, k_start])
            else:
                k = k_start + tl.arange(0, BLOCK_K)
                b_ptr = w + column.to(tl.int64)[None, :] * w_stride + k.to(tl.int64)[:, None] * w_inner
                b = tl.load(b_ptr, mask=(k < hidden_size)[:, None] & (column < columns)[None, :], other=0.0)
                a_ptr = h + row.to(tl.int64)[:, None] * hidden_size + k[None, :]
                inside = there[:, None] & (k < hidden_size)[None, :]
                a = tl.load(a_ptr, mask=inside, other=0.0)
            z_p = tl.dot(a, b.to(a.dtype), z_p, input_precision="ieee")
            if PAIR:
                if DESCRIPTORS:
                    a = h.load([rows + row_start, k_start])
                else:
                    a = tl.load(a_ptr + tl.cast(rows, tl.int64) * hidden_size, mask=inside, other=0.0)
                z_q = tl.dot(a, b.to(a.dtype), z_q, input_precision="ieee")
        if SHARES_ROUNDING:  # see `_difference_` in logits.py
            z_q += z_p * tl.load(shares_rounding_ptr + row, mask=there, other=0.0)[:, None]
        inside = there[:, None] & (column < columns)[None, :]
        outside = float("-inf")
        z_p = _transformed(z_p, bias_ptr, column[None, :], columns, scale, HAS_BIAS)
        z_p = tl.where(inside, z_p, outside)
        if HAS_TARGETS:
            hit = column[None, :] == target[:, None]
            target_p = tl.maximum(target_p, tl.max(tl.where(hit, z_p, outside), 1))
        if PAIR:
            z_q = _transformed(z_q, bias_ptr, column[None, :], columns, scale, HAS_BIAS)
            z_q = tl.where(inside, z_q, outside)
            if HAS_TARGETS:
                target_q = tl.maximum(target_q, tl.max(tl.where(hit, z_q, outside), 1))
            c, d, e, f, g, i, j, l = fold_block_pair(z_p, z_q)  # noqa: E741
            max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess = merge_pair(
                max_p, sum_p, weighted_sum_p, max_q, sum_q, weighted_sum_q, mean_diff, excess, c, d, e, f, g, i, j, l
            )
        else:
            c, d, e, _, _ = fold_block(finite(z_p))
            max_p, sum_p, weighted_sum_p = merge(max_p, sum_p, weighted_sum_p, c, d, e)

    fields: tl.constexpr = PAIR_FIELDS if PAIR else SOFTMAX_FIELDS
    out = parts_ptr + tl.cast(split, tl.int64) * fields * rows + row
    tl.store(out + (P + TARGET) * rows, target_p, mask=there)
    if PAIR:
        tl.store(out + (Q + TARGET) * rows, target_q, mask=there)
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


def configuration(dtype: torch.dtype, descriptors: bool) -> dict[str, Any]:
    """Block sizes, warps and stages.

    The accumulators of both views and the fold's temporaries must fit the registers of a program. That bounds a block
    to 64 x 128 where descriptors hold the addresses, and to a quarter of it where registers do.
    """
    if triton.knobs.runtime.interpret:  # the interpreter pays by the operation, and has no registers
        return dict(BLOCK_M=64, BLOCK_N=256, BLOCK_K=128, num_warps=4, num_stages=1)
    if dtype == torch.float32:
        return dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=2)
    if descriptors:
        return dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
    return dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=64, num_warps=4, num_stages=3)


def _describable(stacked: Tensor, weight: Tensor) -> bool:
    """Whether the chip has tensor descriptors (sm_90 on) and the operands are aligned as those need it."""
    if not weight.is_cuda or torch.version.hip or torch.cuda.get_device_capability(weight.device) < (9, 0):
        return False
    if weight.dtype != stacked.dtype or weight.dtype == torch.float32:  # float32 would spill
        return False
    return all(
        x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
        for x in (stacked, weight)
    )


def _sweep(source: LinearHead, rows: slice, targets: Tensor | None, pair: bool) -> Tensor:
    count, columns = rows.stop - rows.start, source.columns
    stacked, shares_rounding = source.stacked(rows)
    h: Any = stacked
    w: Any = source.weight
    descriptors = _describable(h, w)
    config = configuration(stacked.dtype, descriptors)
    if descriptors:
        h = TensorDescriptor.from_tensor(h, [config["BLOCK_M"], config["BLOCK_K"]])
        w = TensorDescriptor.from_tensor(w, [config["BLOCK_N"], config["BLOCK_K"]])
    blocks, tiles = triton.cdiv(count, config["BLOCK_M"]), triton.cdiv(columns, config["BLOCK_N"])
    cores = torch.cuda.get_device_properties(stacked.device).multi_processor_count if stacked.is_cuda else 1
    span = triton.cdiv(tiles, max(1, min(tiles, cores * PROGRAMS_PER_CORE // blocks))) * config["BLOCK_N"]
    splits = triton.cdiv(columns, span)
    fields = statistics.PAIR_FIELDS if pair else statistics.SOFTMAX_FIELDS
    parts = torch.empty(splits, fields, count, device=stacked.device, dtype=torch.float32)
    scale = source.transform.logit_scale / source.transform.temperature
    _sweep_kernel[(blocks * splits,)](
        h, w, None if source.bias is None else source.bias.contiguous(), shares_rounding, targets, parts,
        source.first, count, columns, source.hidden_size, source.weight.stride(0), source.weight.stride(1), span,
        splits, scale, pair, source.bias is not None, targets is not None, shares_rounding is not None, descriptors,
        GROUP=GROUP, enable_fp_fusion=True, **config,
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
