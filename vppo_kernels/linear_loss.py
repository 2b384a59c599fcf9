"""The VPPO loss of a batch from hidden states: its gradient is made in the forward.

The loss depends on the logits through two numbers per row alone, log-probability and entropy. Autograd differentiates
the loss by these two, and a tile operation turns that into the gradient of the logits. Where the logits of all rows fit
the workspace they are kept for it, and the whole step takes three matrix products; elsewhere a fourth recomputes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vppo_kernels import arguments, backends, tensor_cores, tiling, vocab_parallel
from vppo_kernels.backends.protocols import LossInputs, LossOptions
from vppo_kernels.layout import layout_of
from vppo_kernels.linear_head import LinearHead
from vppo_kernels.logits import LogitTransform, full_precision, logit_dtype
from vppo_kernels.logprob import logprobs_of_rows
from vppo_kernels.loss import Metrics, Reduction, check_tokens, loss_and_metrics, shaped_by
from vppo_kernels.shaping import Gate, ScaleOptions, TrajectoryStats
from vppo_kernels.statistics import unpack_softmax
from vppo_kernels.sweep import wants_gradient
from vppo_kernels.vocab_parallel import Shard, max_ranks

FLOAT16_TOP = 2.0**15  # half of float16's largest number
LossOfRows = Callable[[Tensor, Tensor], Tensor]  # log-probabilities and entropies, `[rows]` each, to a scalar


def _float16_scale(grads: Tensor, source: LinearHead) -> Tensor:
    """A power of two, `[]`: about the largest factor that keeps every gradient within float16's range.

    A gradient scaler multiplies the loss, so that small float16 gradients do not vanish. Gradients that are made in the
    forward cannot have that factor yet; they are made with this one, which the backward divides out.

    Args:
        grads: `[2, rows]` derivatives of the loss by log-probabilities and by entropies.
        source: Of all rows.
    """
    # per row an upper bound on the sum of the absolute gradients of its logits
    rows = 2 * grads[0].abs() + 4 * math.log(source.max_columns + 1) * grads[1].abs()
    factors = torch.stack([*source.hidden_range(), *torch.aminmax(source.weight)]).abs().max().float()
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
        active: Tensor | None,
        loss_of: LossOfRows,
        transform: LogitTransform,
        shard: Shard,
        backend: str,
        workspace: int,
        exact: bool,
    ) -> Tensor:
        wants = ctx.needs_input_grad
        chosen = backends.resolve(backend, weight.device, logit_dtype(hidden, weight))
        want_head = (wants[0],), wants[1], wants[2]
        source = LinearHead([hidden], weight, bias, transform, shard, active, want_head, chosen.product, exact)
        chosen.check(source)
        found: list[Tensor] = []  # the loss, and the factor that the backward divides out
        half = source.rows > 0 and torch.float16 in (hidden.dtype, weight.dtype)

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
            tiling.forward_backward(source, chosen.tiles, targets, derivative, workspace)
            (ctx.grad_hidden,), ctx.grad_weight, ctx.grad_bias = source.gradients()
        loss, ctx.scale = found
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not hasattr(ctx, "grad_hidden"):
            raise RuntimeError("linear_vppo_loss: its gradient was made in the forward and is handed out once")
        grads = [ctx.grad_hidden, ctx.grad_weight, ctx.grad_bias]
        del ctx.grad_hidden, ctx.grad_weight, ctx.grad_bias
        factor = upstream / ctx.scale
        # with few rows the pass over the weight's gradient is a good part of all; asking a GPU would wait for it
        if not (factor.is_cpu and factor == 1):
            for grad in grads:
                if grad is not None:
                    grad.mul_(factor)  # in place: a copy of the weight's gradient would be large
        return *grads, *(None,) * 8


def linear_vppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    dependency: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    keep_ratio: float = 0.4,
    keep_threshold: float | None = None,
    scale_min: float = 0.9,
    scale_max: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_dual: float | None = None,
    loss_agg: str = "token-mean",
    denominator: Tensor | float | None = None,
    nll_coef: float = 0.0,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    is_weights: Tensor | None = None,
    has_image: Tensor | None = None,
    stats: TrajectoryStats | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    process_group: Any = None,
    stats_group: Any = None,
    precision: str = "default",
    backend: str = "auto",
    check: bool | None = None,
) -> tuple[Tensor, Metrics]:
    """`vppo_loss` from hidden states: only the rows that can carry gradient meet the weight.

    A token whose shaped advantage is 0 (padding, filtered, zero-advantage group) is dropped before the first product,
    unless an entropy, likelihood or reference term asks for every response token. The gradient is made in the forward,
    while the logits are there (with `check=True` and with loss_agg "none" in the backward, from recomputed ones), and
    handed out once: a second backward raises.

    Which tokens are dropped depends on values, and `torch.compile` knows none: in code that it traces all rows meet the
    weight once, in the forward, and only those that carry gradient again, in the backward. Loss, gradients and metrics
    are the same.

    Args:
        hidden: `[B, T, D]` hidden states that predict the response tokens, or `[total, D]` with `cu_seqlens`; not read
            where they are dropped.
        weight: `[V, D]`.
        targets: `[B, T]` or `[total]` response tokens; any value where `mask` is 0.
        old_logprobs, advantages, mask, dependency, cu_seqlens: As in `vppo_loss`.
        bias: `[V]` or None.
        temperature, logit_scale, softcap, vocab_size, process_group, precision, backend: As in `linear_divergence`.
        stats_group: Statistics over all ranks of this group, as in `vppo_advantages`. Ranks that share a vocabulary
            (`process_group`) hold the same trajectories, so they belong to different groups of this kind.
        check: As in `topk_mask`; True also compares a sample of rows with the definition.
        (others): As in `vppo_loss`; the entropies are computed here.

    Returns:
        As `vppo_loss`, with the same values. Differentiable, once, in hidden, weight and bias.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, shape, device or range, or not finite when checked.
    """
    scaling = ScaleOptions(scale_min, scale_max, stats, stats_group)
    options = LossOptions(clip_low, clip_high, clip_dual, nll_coef, entropy_coef, kl_coef)
    reduction = Reduction(loss_agg, denominator)
    gate = Gate(keep_ratio, keep_threshold)
    exact = tensor_cores.check_precision(precision)
    transform = LogitTransform(temperature, logit_scale, softcap)
    weight, bias, process_group = vocab_parallel.localize(weight, bias, process_group)
    hidden = vocab_parallel.local_hidden("hidden", hidden)
    vocab_parallel.check_group("process_group", process_group)
    arguments.head(hidden, weight, bias, empty=process_group is not None)
    layout = layout_of("old_logprobs", old_logprobs, cu_seqlens, check)
    if kl_coef and ref_logprobs is None:
        raise ValueError("ref_logprobs: got None, takes [B, T] log-probabilities where kl_coef is not 0")
    leading, takes = hidden.shape[:-1], "[total, D] with cu_seqlens" if layout.packed else "[B, T, D]"
    if len(leading) != old_logprobs.dim():
        raise ValueError(f"hidden: got shape {list(hidden.shape)}, takes {takes}")
    arguments.shape("old_logprobs", old_logprobs, tuple(leading), "the leading dimensions of hidden")
    arguments.same_device("old_logprobs", old_logprobs, weight.device, "weight")
    arguments.tensor("targets", targets)
    arguments.shape("targets", targets, tuple(leading), "the leading dimensions of hidden")
    arguments.same_device("targets", targets, weight.device, "weight")
    valid = layout.within(arguments.token_mask(mask, old_logprobs))
    check_values = arguments.wanted(check, old_logprobs)
    tensors = (old_logprobs, advantages, dependency, ref_logprobs, is_weights, hidden, weight, bias)
    # `backend` names first of all what sweeps, which may take float64 where kernels of tokens do not
    double = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tensors)
    ops = backends.token_ops("torch" if double else backend, old_logprobs)
    shaped = shaped_by(dependency, advantages, valid, has_image, gate, scaling, layout, ops, check_values)
    tokens = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "is_weights": is_weights}
    for name, value in tokens.items():
        check_tokens(name, value, valid, check_values)
    old, ref, weights = (None if x is None else x.detach() for x in tokens.values())
    assert old is not None

    needed = valid if options.every_token else valid & (shaped.advantages != 0)
    tracing = torch.compiler.is_compiling()
    rows = None if tracing else needed.nonzero(as_tuple=True)
    active = None
    if rows is None or len(rows[0]) == needed.numel():
        chosen = hidden.flatten(0, -2)
    elif hidden.is_contiguous():  # a copy of these rows would grow with their number
        chosen, active = hidden.flatten(0, -2), needed.flatten().nonzero().squeeze(1)
    else:
        chosen = hidden[rows]
    targets = torch.where(valid, targets, 0)
    same = transform.arguments() | dict(
        targets=targets, precision=precision, backend=backend, workspace_limit=tiling.current_workspace()
    )
    of_ranks = [chosen if active is None or process_group is None else chosen[active]]
    shard = vocab_parallel.shard_of(process_group, of_ranks, len(weight), vocab_size, "weight", same)
    arguments.indices("targets", targets, leading, shard.total, weight.device, check_values)
    chosen_targets = targets.flatten() if rows is None else targets[rows]
    if check_values:
        arguments.all_finite("hidden", hidden, needed)
    metrics: Metrics = {}

    def placed(values: Tensor, rest: Tensor) -> Tensor:
        return torch.where(needed, values.view(leading), rest) if rows is None else rest.index_put(rows, values)

    def loss_of(row_logprobs: Tensor, row_entropy: Tensor) -> Tensor:
        # a dropped token has ratio 1 and advantage 0
        logprobs = placed(row_logprobs, old.to(row_logprobs.dtype))
        entropy = placed(row_entropy, torch.zeros_like(logprobs)) if entropy_coef else None
        inputs = LossInputs(
            logprobs, old, shaped.advantages, shaped.keep, valid, entropy, ref, weights, dependency
        )  # fmt: skip
        loss, found = loss_and_metrics(inputs, shaped.alpha, has_image, options, reduction, layout, ops)
        metrics.update(found)
        return loss

    if tracing or check or loss_agg == "none" or not wants_gradient(hidden, weight, bias):
        return loss_of(
            *logprobs_of_rows(
                chosen, weight, bias, chosen_targets, active, transform, shard, exact, backend, bool(check)
            )
        ), metrics
    loss = LinearLoss.apply(
        chosen,
        weight,
        bias,
        chosen_targets.long(),
        active,
        loss_of,
        transform,
        shard,
        backend,
        tiling.current_workspace(),
        exact,
    )
    return loss, metrics
