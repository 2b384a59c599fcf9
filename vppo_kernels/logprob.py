"""Log-probability of the sampled tokens and entropy of their distributions, from hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vppo_kernels import arguments, tensor_cores, tiling, verify, vocab_parallel
from vppo_kernels.logits import LogitTransform
from vppo_kernels.statistics import LogprobOutput
from vppo_kernels.sweep import sweep, wants_gradient


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
    precision: str = "default",
    backend: str = "auto",
    check: bool = False,
) -> LogprobOutput:
    """Log-probability of each target and entropy of its distribution, without holding `[rows, V]` logits.

    The backward recomputes tiles, and only for rows whose upstream gradient is not exactly zero: tokens that a filter,
    a clip or a zero advantage has silenced cost nothing. About a bias of -inf and the number of threads see
    `linear_divergence`.

    Args:
        hidden: `[..., D]` final hidden states; float32, bfloat16 or float16.
        weight: `[V, D]` weight of the language-model head.
        targets: `[...]` int64 or int32 tokens, each within the vocabulary.
        bias: `[V]` or None.
        temperature, logit_scale, softcap, vocab_size, process_group, precision, backend, check: As in
            `linear_divergence`.

    Returns:
        `LogprobOutput(logprobs, entropy)`, each `[...]` float32 (float64 for float64 inputs), in nats; differentiable,
        once, in hidden, weight and bias, through both.

    Raises:
        TypeError, ValueError, RuntimeError: As `linear_divergence`.
    """
    exact = tensor_cores.check_precision(precision)
    transform = LogitTransform(temperature, logit_scale, softcap)
    weight, bias, process_group = vocab_parallel.localize(weight, bias, process_group)
    hidden = vocab_parallel.local_hidden("hidden", hidden)
    arguments.head(hidden, weight, bias, empty=process_group is not None)
    leading, flat = hidden.shape[:-1], hidden.reshape(-1, hidden.shape[-1])
    same = transform.arguments() | dict(
        targets=targets, precision=precision, backend=backend, workspace_limit=tiling.current_workspace()
    )
    shard = vocab_parallel.shard_of(process_group, [flat], len(weight), vocab_size, "weight", same)
    arguments.indices("targets", targets, leading, shard.total, weight.device, check)
    logprobs, entropy = logprobs_of_rows(
        flat, weight, bias, targets.reshape(-1), None, transform, shard, exact, backend, check
    )
    return LogprobOutput(logprobs.view(leading), entropy.view(leading))


def logprobs_of_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    active: Tensor | None,
    transform: LogitTransform,
    shard: vocab_parallel.Shard,
    exact: bool,
    backend: str,
    check: bool,
) -> LogprobOutput:
    """`linear_logprob` of `[rows, D]` hidden states, or the active ones, and their targets; arguments are checked."""
    targets = targets.long().contiguous()
    values, _ = sweep(
        [hidden], weight, bias, None, None, targets, active, transform.fields(), None, list(shard[:4]), [False],
        shard.group, "logprob", 0.5, 0, backend, tiling.current_workspace(), exact,
        wants_gradient(hidden, weight, bias),
    )  # fmt: skip
    output = LogprobOutput(*values.unbind(0))
    if arguments.wanted(check, hidden):
        with torch.no_grad():
            arguments.finite_head(weight, bias, shard.columns)
            count = len(hidden) if active is None else len(active)
            if active is None:
                arguments.all_finite("hidden", hidden)
            if count:
                rows = verify.sample_rows(count, hidden.device)
                sampled = (hidden[rows if active is None else active[rows]], weight, bias, transform, shard)
                z, terms = verify.exact_logits(*sampled), verify.magnitude(*sampled)
                cut = not exact and tensor_cores.multiply(hidden, weight)
                verify.check_single(output, z, targets, rows, terms, cut)
    return output
