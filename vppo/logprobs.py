"""Log-probabilities and entropies of a batch's responses, with gradients, from a pass in which prompts are shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vppo.batch import Batch, View
from vppo.heads import LogitOptions
from vppo.passes import ResponsePasses
from vppo_kernels import linear_logprob


def shared_logprobs(
    passes: ResponsePasses, forward: Callable[..., Any], batch: Batch, view: View, options: LogitOptions
) -> tuple[Tensor, Tensor]:
    """What the plain pass gives, for less: a prompt's tokens pass once, and their gradients are summed before they go
    back through it.

    Args:
        passes: Of the policy; they `carry_gradients`.
        forward: The policy, or what wraps it.
        batch: Tokens and images.
        view: The clean view; rows of one key share their prompt.
        options: From `logit_options`.

    Returns:
        Log-probabilities and entropies, `[B, T]` float32 in nats, 0 outside the responses.
    """
    found: list[Tensor] = []

    def at_head(head: Any, part: list[int], hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        mask = batch.completion_mask[part, :length].bool()
        targets = batch.completion_ids[part, :length][mask]
        values = linear_logprob(hidden[mask], head.weight, targets, getattr(head, "bias", None), **options)
        row, column = mask.nonzero(as_tuple=True)
        places = torch.tensor(part, device=mask.device)[row], column
        for value in (values.logprobs, values.entropy):
            found.append(value.new_zeros(batch.mask.shape).index_put(places, value))
        return torch.stack(found, dim=-1)

    passes.run_with_gradients(forward, batch, view, at_head)
    logprobs, entropy = found
    return logprobs, entropy
