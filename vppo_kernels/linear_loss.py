"""A loss of log-probabilities and entropies, from hidden states: its gradient is made in the forward.

The loss of a batch needs only two numbers per row, so torch differentiates it as it is written. What it gives, the
gradient of each row's log-probability and entropy, is all that the logits' gradient waits for: where the logits of all
rows fit the workspace they are still there, and three products do the whole step; otherwise a fourth recomputes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vppo_kernels import tiling
from vppo_kernels.backends import narrow_product, resolve
from vppo_kernels.logits import LinearHead, LogitTransform, full_precision, logit_dtype
from vppo_kernels.statistics import unpack_softmax
from vppo_kernels.vocab_parallel import Shard, max_ranks

FLOAT16_TOP = 2.0**15  # half of float16's largest number
LossOfRows = Callable[[Tensor, Tensor], Tensor]  # log-probabilities and entropies, `[rows]` each, to a scalar


def _float16_scale(grads: Tensor, source: LinearHead) -> Tensor:
    """A power of two, `[]`, that no gradient leaves float16's range with, and that brings them near its top.

    A gradient scaler keeps small float16 gradients from vanishing by a factor on the loss. Gradients that are made in
    the forward do not know it yet.

    Args:
        grads: `[2, rows]` derivatives of the loss by log-probabilities and by entropies.
        source: Of all rows.
    """
    # the sum over the vocabulary of the sizes of a row's gradient by its logits is at most this
    rows = 2 * grads[0].abs() + 4 * math.log(source.max_columns + 1) * grads[1].abs()
    factors = torch.stack([*torch.aminmax(source.hidden[0]), *torch.aminmax(source.weight)]).abs().max().float()
    largest = rows.sum() * max_ranks(factors, source.group).clamp_min(1)
    slope = abs(source.transform.logit_scale) / source.transform.temperature
    return torch.exp2((FLOAT16_TOP / (largest * slope)).log2().floor()).clamp(2.0**-24, 2.0**24)


class LinearLoss(torch.autograd.Function):
    """`loss_of(logprobs, entropy)` of `[rows, D]` hidden states under a head, a scalar. Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        loss_of: LossOfRows,
        transform: LogitTransform,
        shard: Shard,
        backend: str,
        workspace: int,
    ) -> Tensor:
        wants = ctx.needs_input_grad
        module = resolve(backend, weight.device, logit_dtype(hidden, weight))
        want_head = (wants[0],), wants[1], wants[2]
        source = LinearHead([hidden], weight, bias, transform, shard, None, want_head, narrow_product(module))
        found: list[Tensor] = []  # the loss, and what its gradients are multiplied by until the backward
        half = len(hidden) > 0 and torch.float16 in (hidden.dtype, weight.dtype)

        def derivative(view: Tensor) -> Tensor:
            softmax = unpack_softmax(view)
            rows = [softmax.logprobs.detach().requires_grad_(), softmax.entropy.detach().requires_grad_()]
            with torch.enable_grad():
                loss = loss_of(*rows)
                grads = torch.autograd.grad(loss, rows, allow_unused=True) if loss.requires_grad else (None, None)
            stacked = torch.stack([torch.zeros_like(x) if g is None else g for g, x in zip(grads, rows, strict=True)])
            found.extend((loss.detach(), _float16_scale(stacked, source) if half else torch.ones_like(loss)))
            return stacked * found[1]

        with full_precision(weight.device):
            tiling.forward_backward(source, module, targets, derivative, workspace)
            (ctx.grad_hidden,), ctx.grad_weight, ctx.grad_bias = source.gradients()
        loss, ctx.scale = found
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not hasattr(ctx, "grad_hidden"):
            raise RuntimeError("linear_vppo_loss: its gradient was made in the forward and is handed out once")
        grads = [ctx.grad_hidden, ctx.grad_weight, ctx.grad_bias]
        del ctx.grad_hidden, ctx.grad_weight, ctx.grad_bias  # in place: another copy of the weight's would be large
        factor = upstream / ctx.scale
        return *(None if g is None else g.mul_(factor) for g in grads), *(None,) * 6
