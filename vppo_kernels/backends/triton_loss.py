"""The clip rule and the terms beside it as Triton kernels; the formulas are those of `torch_loss.py`.

No tensor is empty or float64. Nothing is read where the mask is 0. Sums are made block by block in a fixed order, so
every result is bitwise repeatable.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vppo_kernels import arguments
from vppo_kernels.backends.protocols import LOG_RATIO_LIMIT, SUMS, LossInputs, LossOptions
from vppo_kernels.backends.triton_launch import BLOCK, ROWS, WARPS, grid_of, launch
from vppo_kernels.backends.triton_math import phi

# The rows of the sums, in the order of `SUMS`.
TOKENS, KEPT, ACTIVE, ENTROPY, RATIO, APPROX_KL, CLIP_LOW, CLIP_HIGH, CLIP_DUAL, REF_KL, DEPENDENCY, LOSS = (
    tl.constexpr(i) for i in range(len(SUMS))
)


@triton.jit
def _within(x, low, high):
    """`x` held within bounds; a NaN stays one."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _value(pointer, token, mask):
    return tl.load(pointer + token, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _surrogate(log_ratio, advantage, low, high, dual, limit, DUAL: tl.constexpr):
    """The clip rule: the ratio, the clipped surrogate, and where gradient passes the clips."""
    ratio = tl.exp(_within(log_ratio, -limit, limit))
    free, clipped = -ratio * advantage, -_within(ratio, low, high) * advantage
    policy = tl.where(free > clipped, free, clipped)
    passes = (clipped <= free) & (tl.abs(log_ratio) <= limit)
    if DUAL:
        bound = -dual * advantage
        over = (advantage < 0) & (policy > bound)
        policy = tl.where(over, bound, policy)
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
    """Loss of each token, and the sums over a block of a row, in the order of `SUMS`."""
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
    _put(sums_ptr, TOKENS, stride, there, valid.to(tl.float32))
    _put(sums_ptr, KEPT, stride, there, keep.to(tl.float32))
    _put(sums_ptr, ACTIVE, stride, there, active.to(tl.float32))
    _put(sums_ptr, RATIO, stride, there, tl.where(active, ratio, 0.0))
    _put(sums_ptr, APPROX_KL, stride, there, tl.where(active, phi(_within(log_ratio, -limit, limit)), 0.0))
    _put(sums_ptr, CLIP_LOW, stride, there, ((ratio < low) & falling).to(tl.float32))
    _put(sums_ptr, CLIP_HIGH, stride, there, ((ratio > high) & rising).to(tl.float32))
    _put(sums_ptr, CLIP_DUAL, stride, there, ((ratio > dual) & falling).to(tl.float32))
    if weights_ptr is not None:
        value *= _value(weights_ptr, token, valid)
    value -= tl.where(nll_coef != 0, nll_coef * logprob, 0.0)
    if entropy_ptr is not None:
        entropy = _value(entropy_ptr, token, valid)
        value -= tl.where(entropy_coef != 0, entropy_coef * entropy, 0.0)
        _put(sums_ptr, ENTROPY, stride, there, entropy)
    if ref_ptr is not None:
        k3 = phi(_within(_value(ref_ptr, token, valid) - logprob, -limit, limit))
        value += tl.where(kl_coef != 0, kl_coef * k3, 0.0)
        _put(sums_ptr, REF_KL, stride, there, tl.where(valid if REF_OF_ALL else active, k3, 0.0))
    if dependency_ptr is not None:
        _put(sums_ptr, DEPENDENCY, stride, there, _value(dependency_ptr, token, valid))
    value = tl.where(valid, value, 0.0)
    _put(sums_ptr, LOSS, stride, there, value)
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
        ctx: Any, logprobs: Tensor, entropy: Tensor | None, inputs: LossInputs, options: LossOptions, per_token: bool
    ) -> tuple[Tensor, Tensor]:
        rows, columns = inputs.mask.shape
        grid = grid_of(rows, columns)
        values = logprobs.new_empty((rows, columns), dtype=torch.float32) if per_token else None
        sums = logprobs.new_zeros((len(SUMS), rows, grid[1]), dtype=torch.float32)
        launch(
            _loss_kernel, grid,
            logprobs, inputs.old_logprobs, inputs.advantages, inputs.keep, inputs.mask, entropy, inputs.ref_logprobs,
            inputs.is_weights, inputs.dependency, values, sums, rows, columns, grid[1], sums.stride(0),
            *_numbers(options), options.clip_dual is not None, per_token, options.every_token, ROWS, BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
        ctx.save_for_backward(
            logprobs, entropy, inputs.old_logprobs, inputs.advantages, inputs.mask, inputs.ref_logprobs,
            inputs.is_weights,
        )  # fmt: skip
        ctx.options, ctx.per_token = options, per_token
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
        launch(
            _loss_gradient_kernel, grid_of(rows, columns),
            logprobs, old_logprobs, advantages, mask, ref_logprobs, is_weights, upstream.resolve_neg().contiguous(),
            grad, grad_entropy, rows, columns, *_numbers(ctx.options), ctx.options.clip_dual is not None,
            ctx.per_token, ROWS, BLOCK, num_warps=WARPS,
        )  # fmt: skip
        return grad, grad_entropy, None, None, None


def _numbers(options: LossOptions) -> tuple[float, ...]:
    """What both kernels take of the options: low, high, dual, limit, and the three coefficients."""
    dual = 0.0 if options.clip_dual is None else options.clip_dual
    numbers = (*options.ratio_bounds, dual, LOG_RATIO_LIMIT, options.nll_coef, options.entropy_coef, options.kl_coef)
    return tuple(float(x) for x in numbers)


def clipped_loss(inputs: LossInputs, options: LossOptions, per_token: bool) -> tuple[Tensor, Tensor]:
    """See `TokenOps`; differentiable once, in reverse mode."""
    arguments.reverse_mode(inputs.logprobs, inputs.entropy)
    given = {name: x.resolve_neg().contiguous() for name, x in vars(inputs).items() if x is not None}
    inputs = replace(inputs, **given)
    return _ClippedLoss.apply(inputs.logprobs, inputs.entropy, inputs, options, per_token)
