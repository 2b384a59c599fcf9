"""Selection, shaping and the clipped loss as Triton kernels; the formulas are those of the torch code beside each call.

Tensors arrive checked, on one device, none of them empty or float64. Nothing is read where the mask is 0, and nothing
waits for the device. Sums are made block by block in a fixed order, so every result is bitwise repeatable.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vppo_kernels.backends.triton_math import phi

# As in `backends/triton.py`: rows of a program and columns at a time; the interpreter pays by the operation.
ROWS, BLOCK = (64, 1024) if triton.knobs.runtime.interpret else (1, 1024)
KEYS = 16384 if triton.knobs.runtime.interpret else 2048  # scores that a selecting program looks at together
WARPS = 4
SUMS = 12  # of each row, in the order of `SUMS` of loss.py


def _launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument: by itself Triton takes the current one."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, **options)


# --- selection


@triton.jit
def _block_of_keys(scores_ptr, mask_ptr, start, length, KEYS: tl.constexpr):
    """A block of scores as uint32 keys of the same order: -0 equals 0, every NaN is the same and above all numbers."""
    index = start + tl.arange(0, KEYS)
    valid = tl.load(mask_ptr + index, mask=index < length, other=0) != 0
    score = tl.load(scores_ptr + index, mask=valid, other=0.0).to(tl.float32)
    bits = score.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -magnitude, magnitude)
    key = tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, key)
    return index, valid, key.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit(do_not_specialize=["ratio_bits"])
def _topk_kernel(
    scores_ptr, mask_ptr, offsets_ptr, keep_ptr, ratio_bits, columns, total, PACKED: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Radix select: the lowest kept key, eight bits at a time, from histograms of keys that begin so; then the mask."""
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
    wanted = tl.full((), 0, tl.int32)  # how many to keep of those that begin with these digits
    for step in range(4):
        shift -= 8
        counts = tl.zeros([256], tl.int32)
        for start in range(0, length, KEYS):
            index, valid, key = _block_of_keys(scores_ptr, mask_ptr, start, length, KEYS)
            alike = valid & ((key & known) == lowest)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=alike)
        if step == 0:
            # as `keep_counts` of selection.py, whose roundings these are
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
        tl.store(keep_ptr + index, keep.to(tl.float32).to(keep_ptr.dtype.element_ty), mask=index < length)
        equal_before += tl.sum(equal, 0)


def topk(scores: Tensor, valid: Tensor, keep_ratio: float, cu_seqlens: Tensor | None, out: Tensor) -> None:
    """Write the top-k mask of selection.py into `out`, which may be `scores`; both contiguous."""
    rows = len(scores) if cu_seqlens is None else len(cu_seqlens) - 1
    # a float argument arrives in single precision: its 64 bits go as an integer; below 2**-64 the ceiling is 1 anyway
    (ratio_bits,) = struct.unpack("<q", struct.pack("<d", max(keep_ratio, 2.0**-64)))
    if rows:
        _launch(
            _topk_kernel, (rows,),
            scores, valid.contiguous(), cu_seqlens, out, ratio_bits, scores.shape[-1], scores.numel(),
            cu_seqlens is not None, KEYS, num_warps=WARPS,
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


def row_means(scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """As `_row_means` of shaping.py."""
    rows, columns = scores.shape
    means = scores.new_empty(rows, dtype=torch.float32)
    present = valid.new_empty(rows)
    _launch(
        _row_means_kernel,
        _grid(rows),
        scores.resolve_neg().contiguous(),
        valid.contiguous(),
        means,
        present,
        rows,
        columns,
        ROWS,
        BLOCK,
        num_warps=WARPS,
    )
    return means, present


def alpha_of(means: Tensor, present: Tensor, scale_min: float, scale_max: float | None, min_spread: float) -> Tensor:
    """Factor of each row from the statistics of all of them, as in `trajectory_scale`."""
    alpha = torch.empty_like(means)
    dynamic = scale_max is None
    scale_range = 0.0 if scale_max is None else float(scale_max - scale_min)
    _launch(
        _alpha_kernel, (1,),
        means, present, alpha, len(means), float(scale_min), float(1 - scale_min), scale_range, min_spread,
        dynamic, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return alpha


def shape(advantages: Tensor, alpha: Tensor, keep: Tensor) -> Tensor:
    """`advantages * alpha` where kept, 0 elsewhere; advantages `[B]` or `[B, T]`."""
    rows, columns = keep.shape
    shaped = torch.empty_like(keep, dtype=advantages.dtype, memory_format=torch.contiguous_format)
    _launch(
        _shape_kernel, _grid(rows, columns),
        advantages.resolve_neg().contiguous(), alpha, keep.contiguous(), shaped, rows, columns,
        advantages.dim() == 2, ROWS, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return shaped


# --- the clipped loss


@triton.jit
def _within(x, low, high):
    """`x` held within bounds; a NaN stays one."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _value(pointer, token, mask):
    return tl.load(pointer + token, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _surrogate(log_ratio, advantage, low, high, dual, limit, DUAL: tl.constexpr):
    """Ratio, clipped surrogate, and where gradient passes the clips."""
    ratio = tl.exp(_within(log_ratio, -limit, limit))
    free, clipped = -ratio * advantage, -_within(ratio, low, high) * advantage
    policy = tl.where(free > clipped, free, clipped)
    passes = (clipped <= free) & (tl.abs(log_ratio) <= limit)
    if DUAL:
        most = -dual * advantage
        over = (advantage < 0) & (policy > most)
        policy = tl.where(over, most, policy)
        passes = passes & (over == 0)
    return ratio, policy, passes


@triton.jit
def _put(sums_ptr, field, stride, there, values):
    tl.store(sums_ptr + field * stride, tl.sum(values, 1), mask=there)


@triton.jit
def _loss_kernel(
    logprobs_ptr, old_ptr, advantages_ptr, keep_ptr, mask_ptr, entropy_ptr, ref_ptr, weights_ptr, dependency_ptr,
    values_ptr, sums_ptr, rows, columns, blocks, stride, low, high, dual, limit, nll_coef, entropy_coef, kl_coef,
    DUAL: tl.constexpr, PER_TOKEN: tl.constexpr, REF_OF_ALL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of each token, and the sums over a block of a row, in the order of `SUMS` of loss.py."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = row < rows
    inside = there[:, None] & (column < columns)
    token = (row * columns)[:, None] + column
    valid = tl.load(mask_ptr + token, mask=inside, other=0) != 0
    keep = tl.load(keep_ptr + token, mask=valid, other=0) != 0
    logprob, advantage = _value(logprobs_ptr, token, valid), _value(advantages_ptr, token, valid)
    log_ratio = logprob - _value(old_ptr, token, valid)
    ratio, value, _ = _surrogate(log_ratio, advantage, low, high, dual, limit, DUAL)
    active = valid & (advantage != 0)
    falling, rising = active & (advantage < 0), active & (advantage > 0)
    sums_ptr += row * blocks + tl.program_id(1)
    _put(sums_ptr, 0, stride, there, valid.to(tl.float32))
    _put(sums_ptr, 1, stride, there, keep.to(tl.float32))
    _put(sums_ptr, 2, stride, there, active.to(tl.float32))
    _put(sums_ptr, 4, stride, there, tl.where(active, ratio, 0.0))
    _put(sums_ptr, 5, stride, there, tl.where(active, phi(_within(log_ratio, -limit, limit)), 0.0))
    _put(sums_ptr, 6, stride, there, ((ratio < low) & falling).to(tl.float32))
    _put(sums_ptr, 7, stride, there, ((ratio > high) & rising).to(tl.float32))
    _put(sums_ptr, 8, stride, there, ((ratio > dual) & falling).to(tl.float32))
    if weights_ptr is not None:
        value *= _value(weights_ptr, token, valid)
    value -= tl.where(nll_coef != 0, nll_coef * logprob, 0.0)
    if entropy_ptr is not None:
        entropy = _value(entropy_ptr, token, valid)
        value -= tl.where(entropy_coef != 0, entropy_coef * entropy, 0.0)
        _put(sums_ptr, 3, stride, there, entropy)
    if ref_ptr is not None:
        k3 = phi(_within(_value(ref_ptr, token, valid) - logprob, -limit, limit))
        value += tl.where(kl_coef != 0, kl_coef * k3, 0.0)
        _put(sums_ptr, 9, stride, there, tl.where(valid if REF_OF_ALL else active, k3, 0.0))
    if dependency_ptr is not None:
        _put(sums_ptr, 10, stride, there, _value(dependency_ptr, token, valid))
    value = tl.where(valid, value, 0.0)
    _put(sums_ptr, 11, stride, there, value)
    if PER_TOKEN:
        tl.store(values_ptr + token, value, mask=inside)


@triton.jit
def _loss_gradient_kernel(
    logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, ref_ptr, weights_ptr, upstream_ptr, grad_ptr, grad_entropy_ptr,
    rows, columns, low, high, dual, limit, nll_coef, entropy_coef, kl_coef,
    DUAL: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    token = (row * columns)[:, None] + column
    valid = tl.load(mask_ptr + token, mask=inside, other=0) != 0
    logprob, advantage = _value(logprobs_ptr, token, valid), _value(advantages_ptr, token, valid)
    log_ratio = logprob - _value(old_ptr, token, valid)
    ratio, _, passes = _surrogate(log_ratio, advantage, low, high, dual, limit, DUAL)
    grad = tl.where(passes, -ratio * advantage, 0.0)
    if weights_ptr is not None:
        grad *= _value(weights_ptr, token, valid)
    grad -= nll_coef
    if ref_ptr is not None:
        d = _value(ref_ptr, token, valid) - logprob
        grad -= tl.where((kl_coef == 0) | (tl.abs(d) > limit), 0.0, kl_coef * (phi(d) + d))
    upstream = _value(upstream_ptr, token if PER_TOKEN else row[:, None], valid)
    tl.store(grad_ptr + token, tl.where(valid, grad * upstream, 0.0), mask=inside)
    if grad_entropy_ptr is not None:
        tl.store(grad_entropy_ptr + token, -entropy_coef * upstream, mask=inside)


class _ClippedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        old_logprobs: Tensor,
        advantages: Tensor,
        keep: Tensor,
        mask: Tensor,
        ref_logprobs: Tensor | None,
        is_weights: Tensor | None,
        dependency: Tensor | None,
        numbers: tuple[float, ...],
        dual: bool,
        per_token: bool,
        ref_of_all: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, columns = mask.shape
        grid = _grid(rows, columns)
        values = logprobs.new_empty((rows, columns), dtype=torch.float32) if per_token else None
        sums = logprobs.new_zeros((SUMS, rows, grid[1]), dtype=torch.float32)
        _launch(
            _loss_kernel, grid,
            logprobs, old_logprobs, advantages, keep, mask, entropy, ref_logprobs, is_weights, dependency,
            values, sums, rows, columns, grid[1], sums.stride(0), *numbers,
            dual, per_token, ref_of_all, ROWS, BLOCK, num_warps=WARPS,
        )  # fmt: skip
        ctx.save_for_backward(logprobs, entropy, old_logprobs, advantages, mask, ref_logprobs, is_weights)
        ctx.options = (*numbers, dual, per_token)
        sums = sums.sum(2)
        ctx.mark_non_differentiable(sums)
        return sums[-1].clone() if values is None else values, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, entropy, old_logprobs, advantages, mask, ref_logprobs, is_weights = ctx.saved_tensors
        rows, columns = mask.shape
        grad = torch.empty_like(logprobs)
        grad_entropy = torch.empty_like(entropy) if ctx.needs_input_grad[1] else None
        _launch(
            _loss_gradient_kernel, _grid(rows, columns),
            logprobs, old_logprobs, advantages, mask, ref_logprobs, is_weights, upstream.resolve_neg().contiguous(),
            grad, grad_entropy, rows, columns, *ctx.options, ROWS, BLOCK, num_warps=WARPS,
        )  # fmt: skip
        return grad, grad_entropy, *(None,) * 11


def clipped_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    keep: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    is_weights: Tensor | None,
    dependency: Tensor | None,
    *,
    low: float,
    high: float,
    dual: float | None,
    limit: float,
    nll_coef: float,
    entropy_coef: float,
    kl_coef: float,
    per_token: bool,
    ref_of_all: bool,
) -> tuple[Tensor, Tensor]:
    """As `_clipped_loss` of loss.py, from arguments that may hold anything where `mask` is 0."""
    tensors = (logprobs, entropy, old_logprobs, advantages, keep, mask, ref_logprobs, is_weights, dependency)
    numbers = (low, high, 0.0 if dual is None else dual, limit, nll_coef, entropy_coef, kl_coef)
    return _ClippedLoss.apply(
        *(None if x is None else x.resolve_neg().contiguous() for x in tensors),
        tuple(float(x) for x in numbers),
        dual is not None,
        per_token,
        ref_of_all,
    )


def _grid(rows: int, columns: int = 1) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS), triton.cdiv(columns, BLOCK)
