"""Log-probability of the sampled tokens and entropy of their distributions, from hidden states."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vppo_kernels import checks, tiling, verify
from vppo_kernels.backends import resolve
from vppo_kernels.head import LinearHead, LogitTransform
from vppo_kernels.statistics import LogprobOutput


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        vocab_size: int,
        backend: ModuleType,
        workspace: int,
    ) -> tuple[Tensor, Tensor]:
        source = LinearHead((hidden,), weight, bias, transform, vocab_size)
        with torch.autocast(weight.device.type, enabled=False):
            view = tiling.forward(source, backend, targets, workspace)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.view, ctx.transform, ctx.vocab_size = view, transform, vocab_size
        ctx.backend, ctx.workspace = backend, workspace
        ctx.set_materialize_grads(False)
        assert view.logprobs is not None
        return view.logprobs, view.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wants = ((needs[0],), needs[1], needs[2])
        source = LinearHead((hidden,), weight, bias, ctx.transform, ctx.vocab_size, wants)
        zero = torch.zeros_like(ctx.view.entropy)
        with torch.autocast(weight.device.type, enabled=False):
            tiling.backward(
                source,
                ctx.backend,
                ctx.view,
                targets,
                zero if grad_entropy is None else grad_entropy.to(zero.dtype),
                zero if grad_logprobs is None else grad_logprobs.to(zero.dtype),
                ctx.workspace,
            )
        grad_hidden = source.grad_hidden[0]
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            source.grad_weight,
            None if source.grad_bias is None else source.grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    process_group: Any = None,
    backend: str = "auto",
    check: bool = False,
) -> LogprobOutput:
    """Log-probability of each target and entropy of its distribution, without holding `[rows, V]` logits.

    The backward recomputes tiles, and only for rows whose upstream gradient is not exactly zero: tokens that a filter,
    a clip or a zero advantage has silenced cost nothing.

    Args:
        hidden: `[..., D]` final hidden states; float32, bfloat16 or float16.
        weight: `[V, D]` weight of the language-model head.
        targets: `[...]` int64 or int32 tokens, each within the vocabulary.
        bias: `[V]` or None.
        temperature, logit_scale, softcap, vocab_size, process_group, backend, check: As in `linear_divergence`.

    Returns:
        `LogprobOutput(logprobs, entropy)`, each `[...]` float32 (float64 for float64 inputs), in nats; differentiable,
        once, in hidden, weight and bias, through both.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: As `linear_divergence`.
    """
    checks.no_process_group(process_group)
    module = resolve(backend)
    transform = LogitTransform(temperature, logit_scale, softcap)
    checks.head(hidden, weight, bias, vocab_size)
    vocab_size = len(weight) if vocab_size is None else vocab_size
    leading = hidden.shape[:-1]
    checks.indices("targets", targets, leading, vocab_size, weight.device, check)
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    values = _LinearLogprob.apply(
        flat, weight, bias, flat_targets, transform, vocab_size, module, tiling.current_workspace()
    )
    if check:
        with torch.no_grad():
            checks.finite_head(weight, bias, vocab_size)
            checks.all_finite("hidden", flat)
            if len(flat):
                rows = verify.sample_rows(len(flat), flat.device)
                z = verify.exact_logits(flat[rows], weight, bias, transform, vocab_size)
                verify.check_single(LogprobOutput(*values), z, flat_targets, rows)
    return LogprobOutput(*(v.view(leading) for v in values))
