"""How much each response token depends on the image: two views through the model, one divergence at its head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vppo.batch import Batch, View
from vppo.heads import LogitOptions
from vppo.options import SAMPLED
from vppo.prefix_sharing import ResponsePasses
from vppo_kernels import linear_divergence, linear_logprob, sampled_divergence
from vppo_kernels.statistics import DivergenceOutput


@dataclass(frozen=True)
class Scores:
    """What two views say of the response tokens of a batch.

    Attributes:
        outputs: Every field `[B, T]` float32 in nats, 0 at rows that were not scored and outside the responses: means
            over the draws of the perturbed view.
        stderr: `[B, T]` standard error of the mean divergence; None of a single draw.
    """

    outputs: DivergenceOutput
    stderr: Tensor | None


def score(*args: Any, **kwargs: Any) -> Tensor:
    """Dependency of the response tokens alone, `[B, T]` float32 in nats; takes what `measure` takes."""
    return measure(*args, **kwargs).outputs.divergence


@torch.no_grad()
def measure(
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
) -> Scores:
    """The divergence between two views, which is the dependency of a token (VPPO, Eq 3), and what comes with it.

    Args:
        passes: Of the policy.
        batch: The rows' tokens and images.
        rows: Which rows; all of them have an image.
        clean: The clean view.
        perturbed: The perturbed one, with a key for each row. With several draws, one after the other, as many times as
            many keys (see `Batch.repeated`): then all draws of as many prompts as fit the memory pass together.
        kind: "kl", "reverse_kl", "jsd", "k3" or "prob_drop".
        options: From `logit_options`.
        hidden_clean: `[B, T, D]` hidden states of the clean view where they are known already; see `passes.hidden`.
        check: Compare a sample with the float64 definition.
    """
    draws = len(perturbed.keys) // len(batch)
    drawn = batch if draws == 1 else batch.repeated(draws)
    fields = len(DivergenceOutput._fields)
    found = torch.zeros(fields, draws, *batch.mask.shape, device=batch.mask.device)
    for portion in passes.portions(batch, rows, clean):
        known = passes.hidden(batch, portion, clean) if hidden_clean is None else hidden_clean[portion]
        place = {row: index for index, row in enumerate(portion)}

        def at_head(
            head: Any, part: list[int], hidden: Tensor, known: Tensor = known, place: dict[int, int] = place
        ) -> None:
            length = hidden.shape[1]
            draw, row = (list(index) for index in zip(*(divmod(one, len(batch)) for one in part), strict=True))
            before = known[[place[one] for one in row], :length].to(hidden.device)
            mask, targets = batch.mask[row, :length], batch.completion_ids[row, :length]
            values = found.new_zeros(fields, *mask.shape)
            outputs = _divergence(head, before, hidden, targets, mask, kind, options, check)
            values[:, mask] = torch.stack([part for part in outputs if part is not None]).to(values)
            found[:, draw, row, :length] = values

        if draws == 1:
            passes.run(batch, portion, perturbed, at_head)
            continue
        shown = [draw * len(batch) + row for draw in range(draws) for row in portion]
        for part in passes.portions(drawn, shown, perturbed):
            passes.run(drawn, part, perturbed, at_head)
    stderr = None if draws == 1 else found[0].std(0) / draws**0.5
    return Scores(DivergenceOutput(*(found[:, 0] if draws == 1 else found.mean(1))), stderr)


@torch.no_grad()
def entropies(
    passes: ResponsePasses,
    batch: Batch,
    rows: Sequence[int],
    clean: View,
    *,
    options: LogitOptions,
    check: bool = False,
) -> Tensor:
    """Entropy of the policy at the response tokens of the given rows, `[B, T]` float32 in nats, 0 elsewhere.

    Takes what `measure` takes, and one pass of the clean view.
    """
    found = torch.zeros(batch.mask.shape, device=batch.mask.device)

    def at_head(head: Any, part: list[int], hidden: Tensor) -> None:
        length = hidden.shape[1]
        mask, targets = batch.mask[part, :length], batch.completion_ids[part, :length]
        inside = mask.to(hidden.device)
        values = torch.zeros(mask.shape, device=found.device)
        output = linear_logprob(
            hidden[inside], head.weight, targets.to(hidden.device)[inside], getattr(head, "bias", None), check=check,
            **options,
        )  # fmt: skip
        values[mask] = output.entropy.to(values)
        found[part, :length] = values

    for portion in passes.portions(batch, rows, clean):
        passes.run(batch, portion, clean, at_head)
    return found


def _divergence(
    head: Any,
    clean: Tensor,
    perturbed: Tensor,
    targets: Tensor,
    mask: Tensor,
    kind: str,
    options: LogitOptions,
    check: bool,
) -> DivergenceOutput:
    """Every field `[tokens]` of the masked ones, which alone meet the head."""
    mask = mask.to(clean.device)
    weight, bias, targets = head.weight, getattr(head, "bias", None), targets.to(clean.device)[mask]
    clean, perturbed = clean[mask], perturbed[mask]
    if kind in SAMPLED:
        p, q = (linear_logprob(hidden, weight, targets, bias, check=check, **options) for hidden in (clean, perturbed))
        estimate = sampled_divergence(p.logprobs, q.logprobs, kind=kind)
        return DivergenceOutput(estimate, p.entropy, q.entropy, p.logprobs, q.logprobs)
    return linear_divergence(clean, perturbed, weight, bias, targets=targets, kind=kind, check=check, **options)
