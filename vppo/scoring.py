"""How much each response token depends on the image: two views through the model, one divergence at its head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vppo.batch import Batch, View
from vppo.heads import LogitOptions
from vppo.prefix_sharing import ResponsePasses
from vppo_kernels import linear_divergence, linear_logprob, sampled_divergence


@torch.no_grad()
def score(
    passes: ResponsePasses,
    batch: Batch,
    rows: Sequence[int],
    clean: View,
    perturbed: View,
    *,
    kind: str,
    options: LogitOptions,
    hidden_clean: Tensor | None = None,
    check: bool = False,
) -> Tensor:
    """Dependency of the response tokens of the given rows: the divergence between two views (VPPO, Eq 3).

    Args:
        passes: Of the policy.
        batch: The rows' tokens and images.
        rows: Which rows; all of them have an image.
        clean, perturbed: The two views.
        kind: "kl", "reverse_kl", "jsd" or "k3".
        options: From `logit_options`.
        hidden_clean: `[B, T, D]` hidden states of the clean view where they are known already; see `passes.hidden`.
        check: Compare a sample with the float64 definition.

    Returns:
        `[B, T]` float32 in nats, 0 at other rows and outside the responses.
    """
    dependency = torch.zeros(batch.mask.shape, device=batch.mask.device)
    for portion in passes.portions(batch, rows, clean):
        known = passes.hidden(batch, portion, clean) if hidden_clean is None else hidden_clean[portion]
        place = {row: index for index, row in enumerate(portion)}

        def at_head(
            head: Any, part: list[int], hidden: Tensor, known: Tensor = known, place: dict[int, int] = place
        ) -> None:
            length = hidden.shape[1]
            before = known[[place[row] for row in part], :length].to(hidden.device)
            mask, targets = batch.mask[part, :length], batch.completion_ids[part, :length]
            values = torch.zeros(mask.shape, device=mask.device)
            values[mask] = _divergence(head, before, hidden, targets, mask, kind, options, check).to(values)
            dependency[part, :length] = values

        passes.run(batch, portion, perturbed, at_head)
    return dependency


def _divergence(
    head: Any,
    clean: Tensor,
    perturbed: Tensor,
    targets: Tensor,
    mask: Tensor,
    kind: str,
    options: LogitOptions,
    check: bool,
) -> Tensor:
    """`[tokens]` of the masked ones, which alone meet the head."""
    mask = mask.to(clean.device)
    weight, bias, targets = head.weight, getattr(head, "bias", None), targets.to(clean.device)[mask]
    clean, perturbed = clean[mask], perturbed[mask]
    if kind == "k3":
        logprobs, logprobs_perturbed = (
            linear_logprob(hidden, weight, targets, bias, check=check, **options).logprobs
            for hidden in (clean, perturbed)
        )
        return sampled_divergence(logprobs, logprobs_perturbed, kind="k3")
    return linear_divergence(clean, perturbed, weight, bias, kind=kind, check=check, **options).divergence
