"""How much each response token depends on the image, for a loop that has the inputs of both views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vppo.heads import head_forward, logit_options
from vppo_kernels import linear_divergence


@torch.no_grad()
def measure_dependency(
    model: Any,
    clean: Mapping[str, Any],
    perturbed: Mapping[str, Any],
    tokens: int,
    *,
    kind: str = "kl",
    temperature: float = 1.0,
) -> Tensor:
    """Divergence of the next-token distributions given the clean and the perturbed image (VPPO, Eq. 2), without logits.

    Two forward passes, in evaluation mode; the model's head compares hidden states in its own forward, where sharding
    makes its weight whole. Every process that holds a part of the model has to call this.

    Args:
        model: A causal language model with `get_output_embeddings`; unwrapped from DDP, but not from FSDP.
        clean, perturbed: What its forward takes for `[B, L]` tokens, which differ in their images alone.
        tokens: How many of the last tokens of each row are compared; a token's distribution is predicted before it.
        kind: "kl", "reverse_kl" or "jsd".
        temperature: Of sampling; logits are divided by it.

    Returns:
        `[B, tokens]` float32 in nats. Not differentiable.

    Raises:
        TypeError, ValueError: As `vppo_kernels.linear_divergence`.
    """
    options, where = logit_options(model, temperature), slice(-tokens - 1, -1)
    seen: list[Tensor] = []

    def keep(head: Any, hidden: Tensor) -> None:
        seen.append(hidden[:, where])

    def compare(head: Any, hidden: Tensor) -> None:
        bias = getattr(head, "bias", None)
        values = linear_divergence(seen[0], hidden[:, where], head.weight, bias, kind=kind, **options)
        seen.append(values.divergence)

    training = model.training
    model.eval()
    try:
        for inputs, forward in ((clean, keep), (perturbed, compare)):
            with head_forward(model, forward):
                model(**inputs)
    finally:
        model.train(training)
    return seen[-1]
