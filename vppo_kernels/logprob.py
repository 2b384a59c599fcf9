"""Log-probability of the sampled tokens and entropy of their distributions, from hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vppo_kernels import checks, parallel, tiling, verify
from vppo_kernels.head import LogitTransform
from vppo_kernels.ops import sweep, wants_gradient
from vppo_kernels.statistics import LogprobOutput


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
        TypeError, ValueError, RuntimeError: As `linear_divergence`.
    """
    transform = LogitTransform(temperature, logit_scale, softcap)
    weight, bias, process_group = parallel.localize(weight, bias, process_group)
    hidden = parallel.local_hidden("hidden", hidden)
    checks.head(hidden, weight, bias, empty=process_group is not None)
    leading, flat = hidden.shape[:-1], hidden.reshape(-1, hidden.shape[-1])
    shard = parallel.shard_of(process_group, [flat], len(weight), vocab_size, "weight")
    checks.indices("targets", targets, leading, shard.total, weight.device, check)
    flat_targets = targets.reshape(-1).long().contiguous()
    values, _ = sweep(
        [flat], weight, bias, flat_targets, transform.fields(), list(shard[:4]), shard.group, "logprob", backend,
        tiling.current_workspace(), wants_gradient(flat, weight, bias),
    )  # fmt: skip
    logprobs, entropy = values.unbind(0)
    if check:
        with torch.no_grad():
            checks.finite_head(weight, bias, shard.columns)
            checks.all_finite("hidden", flat)
            if len(flat):
                rows = verify.sample_rows(len(flat), flat.device)
                z = verify.exact_logits(flat[rows], weight, bias, transform, shard)
                verify.check_single(LogprobOutput(logprobs, entropy), z, flat_targets, rows)
    return LogprobOutput(logprobs.view(leading), entropy.view(leading))
