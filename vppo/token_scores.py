"""Everything that two views of an image say about each response token: divergences, log-probabilities, entropies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vppo.perturbations import Perturbation, seeded
from vppo.prompts import Prompts
from vppo.scoring import Batch, head_forward, logit_options, response_hidden
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
        batch_tokens: The most tokens in one forward, prompts and padding included; one response may be longer.
    """

    perturbation: Perturbation
    draws: int = 1
    divergence: str = "kl"
    keep_ratio: float = 0.4
    temperature: float = 1.0
    seed: int = 0
    batch_tokens: int = 16384

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


def score_tokens(
    model: Any,
    prompts: Prompts,
    rows: Sequence[int],
    responses: Sequence[Sequence[int]],
    keys: Sequence[int],
    scoring: Scoring,
) -> Iterator[TokenScores]:
    """Scores given responses: one clean pass, `scoring.draws` perturbed ones, and never a logit in memory.

    Args:
        model: A vision-language model; it is left in the mode it was in.
        prompts: The problems.
        rows: The problem of each response.
        responses: Token ids, at least one each.
        keys: A number for each problem; its draw `m` comes from (seed, key, m), whatever else is in the batch.
        scoring: How to score.

    Yields:
        The scores of each response, in order.
    """
    sizes = [(prompts.lengths[row], len(ids)) for row, ids in zip(rows, responses, strict=True)]
    training = model.training
    model.eval()
    try:
        for part in token_batches(sizes, scoring.batch_tokens):
            found = _score(model, prompts, [rows[i] for i in part], [responses[i] for i in part], keys, scoring)
            start = 0
            for index in part:
                end = start + len(responses[index])
                yield _summary({name: values[:, start:end] for name, values in found.items()}, scoring)
                start = end
    finally:
        model.train(training)


def token_batches(sizes: Sequence[tuple[int, int]], most: int) -> Iterator[list[int]]:
    """Neighbouring rows that go through the model together.

    Args:
        sizes: The length of each row's prompt and response.
        most: Tokens in a batch, each row padded to the longest prompt and the longest response; one row may be longer.

    Yields:
        Indices of rows.
    """
    part: list[int] = []
    longest = (0, 0)
    for index, size in enumerate(sizes):
        wider = max(longest[0], size[0]), max(longest[1], size[1])
        if part and sum(wider) * (len(part) + 1) > most:
            yield part
            part, wider = [], size
        part.append(index)
        longest = wider
    if part:
        yield part


@torch.no_grad()
def _score(
    model: Any,
    prompts: Prompts,
    rows: Sequence[int],
    responses: Sequence[Sequence[int]],
    keys: Sequence[int],
    scoring: Scoring,
) -> dict[str, np.ndarray]:
    """Every number of every draw, each `[draws, tokens of all rows]` float64."""
    batch = Batch(prompts.join(rows, responses, model.device))
    everything, length = range(len(rows)), batch.mask.shape[1]
    clean = response_hidden(model, batch.model_inputs(everything), length)[batch.mask]
    targets = batch.completion_ids[batch.mask]
    options = logit_options(model, scoring.temperature)
    found: dict[str, list[Tensor]] = {}

    def at_head(head: Any, hidden: Tensor) -> None:
        perturbed = hidden[:, -(length + 1) : -1][batch.mask]
        views = clean.to(perturbed.device), perturbed, head.weight, getattr(head, "bias", None)
        outputs = {
            kind: linear_divergence(*views, targets=targets.to(perturbed.device), kind=kind, **options)
            for kind in EXACT
        }
        values = {kind: output.divergence for kind, output in outputs.items()}
        kl = outputs["kl"]
        assert kl.logprobs is not None and kl.logprobs_perturbed is not None
        values["k3"] = sampled_divergence(kl.logprobs, kl.logprobs_perturbed, kind="k3")
        values |= {"logprob": kl.logprobs, "logprob_perturbed": kl.logprobs_perturbed}
        values |= {"entropy": kl.entropy, "entropy_perturbed": kl.entropy_perturbed}
        for name, value in values.items():
            found.setdefault(name, []).append(value.double().cpu())

    for draw in range(scoring.draws):
        views = {row: prompts.perturbed(row, *scoring.draw(keys[row], draw)) for row in set(rows)}
        pixels = {place: views[row].to(model.device) for place, row in enumerate(rows)}
        with head_forward(model, at_head):
            model(**batch.model_inputs(everything, pixels), use_cache=False)
    return {name: torch.stack(values).numpy() for name, values in found.items()}


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
