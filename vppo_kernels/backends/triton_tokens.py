"""The token operations as Triton kernels; packed trajectories have one for the mask, and plain torch for the rest.

No tensor is empty or float64. Nothing is read where the mask is 0, and nothing waits for the device. Sums are made
block by block in a fixed order, so every result is bitwise repeatable.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from vppo_kernels.backends import torch_tokens
from vppo_kernels.backends.protocols import TrajectoryStats
from vppo_kernels.backends.torch_tokens import MIN_SPREAD
from vppo_kernels.backends.triton_launch import BLOCK, ROWS, WARPS, grid_of, launch
from vppo_kernels.backends.triton_loss import clipped_loss
from vppo_kernels.layout import Layout, Packed

__all__ = ["clipped_loss", "row_means", "shape", "topk", "topk_", "trajectory_scale"]

KEYS = 16384 if triton.knobs.runtime.interpret else 2048  # scores that a selecting program reads at a time


# --- selection


@triton.jit
def _block_of_keys(scores_ptr, mask_ptr, start, length, KEYS: tl.constexpr):
    """Where a block of scores lies, which of them are valid, and their keys."""
    index = start + tl.arange(0, KEYS)
    valid = tl.load(mask_ptr + index, mask=index < length, other=0) != 0
    return index, valid, _key_of(tl.load(scores_ptr + index, mask=valid, other=0.0).to(tl.float32))


@triton.jit
def _key_of(score):
    """A float32 score as a uint32 key of the same order: -0 equals 0, every NaN is the same and above all numbers."""
    bits = score.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -magnitude, magnitude)
    key = tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, key)
    return key.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit(do_not_specialize=["ratio_bits"])
def _topk_kernel(
    scores_ptr, mask_ptr, offsets_ptr, keep_ptr, ratio_bits, threshold, columns, total,
    PACKED: tl.constexpr, BOUNDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Radix select: histograms give the lowest kept key, eight bits at a time, and a last pass writes the mask."""
    row = tl.program_id(0).to(tl.int64)
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(offsets_ptr + row).to(tl.int64), 0), total)
        last = tl.minimum(tl.maximum(tl.load(offsets_ptr + row + 1).to(tl.int64), first), total)
        length = (last - first).to(tl.int32)
    else:
        first = row * columns
        length = columns
    scores_ptr += first
    mask_ptr += first
    keep_ptr += first

    digits = tl.arange(0, 256)
    lowest = tl.full((), 0, tl.uint32)  # of the kept keys, as far as its digits are known
    known = tl.full((), 0, tl.uint32)  # ones at those digits
    shift = tl.full((), 32, tl.uint32)  # of the digit sought
    wanted = tl.full((), 0, tl.int32)  # how many to keep of the keys that begin with these digits
    for step in range(4):
        shift -= 8
        counts = tl.zeros([256], tl.int32)
        for start in range(0, length, KEYS):
            index, valid, key = _block_of_keys(scores_ptr, mask_ptr, start, length, KEYS)
            begins_so = valid & ((key & known) == lowest)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=begins_so)
        if step == 0:
            # rounded as in `keep_counts` of torch_tokens.py
            ratio = ratio_bits.to(tl.float64, bitcast=True)
            share = tl.sum(counts, 0).to(tl.float64) * ratio * tl.full((), 0.9999999999990905, tl.float64)
            wanted = tl.ceil(share).to(tl.int32)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
        here = (above < wanted) & (wanted <= above + counts)
        lowest |= tl.sum(tl.where(here, digits, 0), 0).to(tl.uint32) << shift
        known |= tl.full((), 255, tl.uint32) << shift
        wanted -= tl.sum(tl.where(here, above, 0), 0)

    equal_before = tl.full((), 0, tl.int32)
    for start in range(0, length, KEYS):
        index, valid, key = _block_of_keys(scores_ptr, mask_ptr, start, length, KEYS)
        equal = (valid & (key == lowest)).to(tl.int32)
        rank = equal_before + tl.cumsum(equal, 0)  # from 1
        keep = valid & ((key > lowest) | ((equal != 0) & (rank <= wanted)))
        if BOUNDED:
            keep &= key > _key_of(tl.full((), threshold, tl.float32))
        tl.store(keep_ptr + index, keep.to(tl.float32).to(keep_ptr.dtype.element_ty), mask=index < length)
        equal_before += tl.sum(equal, 0)


def topk(scores: Tensor, valid: Tensor, keep_ratio: float, keep_threshold: float | None, layout: Layout) -> Tensor:
    """See `TokenOps`."""
    # unchecked offsets may leave tokens between rows, which no program writes
    blank = torch.zeros_like if layout.packed else torch.empty_like
    scores = scores.resolve_neg().contiguous()
    keep = blank(scores, dtype=torch.bool)
    _write_mask(scores, valid, keep_ratio, keep_threshold, layout, keep)
    return keep


def topk_(scores: Tensor, valid: Tensor, keep_ratio: float, keep_threshold: float | None, layout: Layout) -> Tensor:
    """See `TokenOps`."""
    if layout.packed or scores.is_neg() or not scores.is_contiguous():
        return scores.copy_(topk(scores, valid, keep_ratio, keep_threshold, layout))
    _write_mask(scores, valid, keep_ratio, keep_threshold, layout, scores)
    return scores


def _write_mask(
    scores: Tensor, valid: Tensor, keep_ratio: float, keep_threshold: float | None, layout: Layout, out: Tensor
) -> None:
    """The mask goes to `out`, which may be `scores`; both contiguous."""
    offsets = layout.offsets if isinstance(layout, Packed) else None
    rows = layout.count
    # a float argument arrives in single precision: its 64 bits go as an integer; below 2**-64 the ceiling is 1 anyway
    (ratio_bits,) = struct.unpack("<q", struct.pack("<d", max(keep_ratio, 2.0**-64)))
    if rows:
        launch(
            _topk_kernel, (rows,),
            scores, valid.contiguous(), offsets, out, ratio_bits, keep_threshold or 0.0, scores.shape[-1],
            scores.numel(), layout.packed, keep_threshold is not None, KEYS, num_warps=WARPS,
        )  # fmt: skip


# --- shaping


@triton.jit
def _row_means_kernel(
    scores_ptr, mask_ptr, means_ptr, present_ptr, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    scores_ptr, mask_ptr = scores_ptr + row * columns, mask_ptr + row * columns
    total, count = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.int32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & (column < columns)
        valid = tl.load(mask_ptr[:, None] + column, mask=inside, other=0) != 0
        total += tl.sum(tl.load(scores_ptr[:, None] + column, mask=valid, other=0.0).to(tl.float32), 1)
        count += tl.sum(valid.to(tl.int32), 1)
    tl.store(means_ptr + row, tl.div_rn(total, tl.maximum(count, 1).to(tl.float32)), mask=there)
    tl.store(present_ptr + row, count > 0, mask=there)


@triton.jit
def _alpha_kernel(
    means_ptr, present_ptr, alpha_ptr, rows, scale_min, to_one, scale_range, min_spread,
    DYNAMIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the batch's statistics, then the factor of every row."""
    low, high = tl.full([BLOCK], float("inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
    total, count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    unknown = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        present = tl.load(present_ptr + row, mask=row < rows, other=0) != 0
        mean = tl.load(means_ptr + row, mask=present, other=0.0)
        low = tl.where(present & (mean < low), mean, low)
        high = tl.where(present & (mean > high), mean, high)
        total += mean
        count += present.to(tl.float32)
        unknown |= (mean != mean).to(tl.int32)
    least = tl.min(low, 0)
    spread = tl.where(tl.max(unknown, 0) != 0, float("nan"), tl.max(high, 0) - least)
    trajectories = tl.sum(count, 0)
    varied = tl.where((spread <= min_spread) | (trajectories < 2), 0, 1)  # a NaN spread compares False
    spread = tl.where(varied != 0, spread, 1.0)
    if DYNAMIC:
        mean_u = (tl.sum(total, 0) / tl.maximum(trajectories, 1.0) - least) / spread
        scale_range = to_one / tl.where(mean_u < 1.0e-6, 1.0e-6, mean_u)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        present = tl.load(present_ptr + row, mask=row < rows, other=0) != 0
        mean = tl.load(means_ptr + row, mask=present, other=0.0)
        alpha = scale_min + (mean - least) / spread * scale_range
        tl.store(alpha_ptr + row, tl.where(present.to(tl.int32) * varied == 0, 1.0, alpha), mask=row < rows)


@triton.jit
def _shape_kernel(
    advantages_ptr, alpha_ptr, keep_ptr, shaped_ptr, rows, columns,
    PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = row < rows
    inside = there[:, None] & (column < columns)
    token = (row * columns)[:, None] + column
    keep = tl.load(keep_ptr + token, mask=inside, other=0) != 0
    source = token if PER_TOKEN else row[:, None]
    advantage = tl.load(advantages_ptr + source, mask=keep, other=0.0)
    alpha = tl.load(alpha_ptr + row, mask=there, other=0.0)[:, None].to(advantage.dtype)  # rounded as torch rounds it
    shaped = advantage.to(tl.float32) * alpha.to(tl.float32)
    tl.store(shaped_ptr + token, tl.where(keep, shaped, 0.0), mask=inside)


def row_means(scores: Tensor, valid: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """See `TokenOps`."""
    if layout.packed:
        return torch_tokens.row_means(scores, valid, layout)
    rows, columns = scores.shape
    means, present = scores.new_empty(rows, dtype=torch.float32), valid.new_empty(rows)
    launch(
        _row_means_kernel, grid_of(rows),
        scores.resolve_neg().contiguous(), valid.contiguous(), means, present, rows, columns, ROWS, BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    return means, present


def trajectory_scale(
    means: Tensor, present: Tensor, stats: TrajectoryStats | None, scale_min: float, scale_max: float | None
) -> Tensor:
    """See `TokenOps`."""
    if stats is not None:
        return torch_tokens.trajectory_scale(means, present, stats, scale_min, scale_max)
    alpha = torch.empty_like(means)
    scale_range = 0.0 if scale_max is None else float(scale_max - scale_min)
    launch(
        _alpha_kernel, (1,),
        means, present, alpha, len(means), float(scale_min), float(1 - scale_min), scale_range, MIN_SPREAD,
        scale_max is None, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return alpha


def shape(advantages: Tensor, alpha: Tensor, keep: Tensor, layout: Layout) -> Tensor:
    """See `TokenOps`."""
    if layout.packed:
        return torch_tokens.shape(advantages, alpha, keep, layout)
    rows, columns = keep.shape
    shaped = torch.empty_like(keep, dtype=advantages.dtype, memory_format=torch.contiguous_format)
    launch(
        _shape_kernel, grid_of(rows, columns),
        advantages.resolve_neg().contiguous(), alpha, keep.contiguous(), shaped, rows, columns,
        advantages.dim() == 2, ROWS, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return shaped
