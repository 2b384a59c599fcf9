"""Everything that two views of an image say about each response token: divergences, log-probabilities, entropies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vppo.batch import Batch, View
from vppo.data.prompts import Prompts
from vppo.heads import LogitOptions, logit_options
from vppo.perturbations import Perturbation, seeded
from vppo.prefix_sharing import ResponsePasses
from vppo_kernels import linear_divergence, sampled_divergence, topk_mask

EXACT = ("kl", "reverse_kl", "jsd")
DIVERGENCES = (*EXACT, "k3")


@dataclass(frozen=True)
class Scoring:
    """How responses are scored.

    Attributes:
        perturbation: What the perturbed view does.
        draws: Perturbed views of each problem, shared by its responses.
        divergence: What counts as dependency: "kl", "reverse_kl", "jsd" or "k3".
        keep_ratio: Fraction of each response that counts as kept, in (0, 1].
        temperature: Divides the logits of both views.
        seed: Of the perturbation.
    """

    perturbation: Perturbation
    draws: int = 1
    divergence: str = "kl"
    keep_ratio: float = 0.4
    temperature: float = 1.0
    seed: int = 0

    def draw(self, key: int, number: int) -> tuple[Perturbation, torch.Generator]:
        """What makes the perturbed view `number` of the problem with this key."""
        return self.perturbation, seeded(self.seed, key, number)


@dataclass(frozen=True)
class TokenScores:
    """The scores of one response of `n` tokens, each `[n]` float32 (`kept` is bool), in nats.

    Attributes:
        kept: The `ceil(keep_ratio * n)` tokens of highest `dependency` (VPPO, Eq. 4).
        dependency: The chosen divergence between the views (VPPO, Eq. 3), as a mean over the draws of the perturbation.
        dependency_se: Its standard error over the draws; NaN with one draw.
        kl, reverse_kl, jsd: Exact divergences, means over the draws.
        k3: The one-sample estimate of `kl` from the response's own token, as a mean over the draws.
        kl_first, k3_first: Of the first draw alone: what training would have seen.
        logprob: log-probability of the token given the image.
        logprob_perturbed: The same given the perturbed image, as a mean over the draws.
        entropy: Of the next-token distribution given the image.
        entropy_perturbed: The same given the perturbed image, as a mean over the draws.
    """

    kept: np.ndarray
    dependency: np.ndarray
    dependency_se: np.ndarray
    kl: np.ndarray
    reverse_kl: np.ndarray
    jsd: np.ndarray
    k3: np.ndarray
    kl_first: np.ndarray
    k3_first: np.ndarray
    logprob: np.ndarray
    logprob_perturbed: np.ndarray
    entropy: np.ndarray
    entropy_perturbed: np.ndarray

    def overlap(self, one: str, other: str, keep_ratio: float) -> float:
        """How much of the set that filtering by `one` keeps is kept by `other` too, 0..1."""
        first, second = (_kept(getattr(self, name), keep_ratio) for name in (one, other))
        return float((first & second).sum() / first.sum())


@torch.no_grad()
def score_tokens(
    passes: ResponsePasses,
    prompts: Prompts,
    rows: Sequence[int],
    responses: Sequence[Sequence[int]],
    keys: Sequence[int],
    scoring: Scoring,
) -> list[TokenScores]:
    """Scores given responses: one clean view, `scoring.draws` perturbed ones, and never a logit in memory.

    Args:
        passes: Of the model, which is left in the mode it was in.
        prompts: The problems.
        rows: The problem of each response.
        responses: Token ids, at least one each.
        keys: A number for each problem; its draw `m` comes from (seed, key, m), whatever else is in the batch.
        scoring: How to score.

    Returns:
        The scores of each response, in order.
    """
    model = passes.model
    batch, clean = Batch(prompts.join(rows, responses, model.device)), View(rows)
    options = logit_options(model, scoring.temperature)
    found: list[dict[str, list[Tensor]]] = [{} for _ in rows]  # of each response: every number, in each draw

    def score(known: Tensor, place: dict[int, int], head: Any, part: list[int], hidden: Tensor) -> None:
        mask = batch.mask[part, : hidden.shape[1]]
        before = known[[place[row] for row in part], : hidden.shape[1]]
        targets = batch.completion_ids[part, : hidden.shape[1]][mask].to(hidden.device)
        mask = mask.to(hidden.device)
        values = _numbers(head, before.to(hidden.device)[mask], hidden[mask], targets, options)
        lengths = [len(responses[row]) for row in part]
        for name, value in values.items():
            for row, own in zip(part, value.double().cpu().split(lengths), strict=True):
                found[row].setdefault(name, []).append(own)

    training = model.training
    model.eval()
    try:
        for portion in passes.portions(batch, range(len(rows)), clean):
            known = passes.hidden(batch, portion, clean)
            receive = partial(score, known, {row: index for index, row in enumerate(portion)})
            for draw in range(scoring.draws):
                shown = {rows[row] for row in portion}
                views = {row: prompts.perturbed(row, *scoring.draw(keys[row], draw)) for row in sorted(shown)}
                pixels = {row: view.to(model.device) for row, view in views.items()}
                passes.run(batch, portion, View(rows, pixels), receive)
    finally:
        model.train(training)
    return [_summary({name: torch.stack(draws).numpy() for name, draws in own.items()}, scoring) for own in found]


def _numbers(head: Any, clean: Tensor, perturbed: Tensor, targets: Tensor, options: LogitOptions) -> dict[str, Tensor]:
    """Every number of some tokens, each `[tokens]`, from `[tokens, D]` hidden states of both views."""
    views = clean, perturbed, head.weight, getattr(head, "bias", None)
    outputs = {kind: linear_divergence(*views, targets=targets, kind=kind, **options) for kind in EXACT}
    kl = outputs["kl"]
    assert kl.logprobs is not None and kl.logprobs_perturbed is not None
    return {
        **{kind: output.divergence for kind, output in outputs.items()},
        "k3": sampled_divergence(kl.logprobs, kl.logprobs_perturbed, kind="k3"),
        "logprob": kl.logprobs,
        "logprob_perturbed": kl.logprobs_perturbed,
        "entropy": kl.entropy,
        "entropy_perturbed": kl.entropy_perturbed,
    }


def _summary(found: dict[str, np.ndarray], scoring: Scoring) -> TokenScores:
    """One response's scores from its numbers in each draw, `[draws, n]`."""
    draws = len(found["kl"])
    means = {name: values.mean(0).astype(np.float32) for name, values in found.items()}
    chosen = found[scoring.divergence]
    error = chosen.std(0, ddof=1) / math.sqrt(draws) if draws > 1 else np.full(chosen.shape[1], np.nan)
    return TokenScores(
        kept=_kept(means[scoring.divergence], scoring.keep_ratio),
        dependency=means[scoring.divergence],
        dependency_se=error.astype(np.float32),
        kl_first=found["kl"][0].astype(np.float32),
        k3_first=found["k3"][0].astype(np.float32),
        logprob=found["logprob"][0].astype(np.float32),
        entropy=found["entropy"][0].astype(np.float32),
        **{name: means[name] for name in (*DIVERGENCES, "logprob_perturbed", "entropy_perturbed")},
    )


def _kept(scores: np.ndarray, keep_ratio: float) -> np.ndarray:
    values = torch.from_numpy(scores)[None]
    return topk_mask(values, torch.ones_like(values, dtype=torch.bool), keep_ratio)[0].numpy()
