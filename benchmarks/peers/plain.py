"""What one writes: full logits in the inputs' dtype, then float32, then the formula; for a selection, row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks import lesson as lessons
from benchmarks.lesson import Lesson
from benchmarks.pair import Pair
from benchmarks.rollout import Rollouts
from benchmarks.scores import Scores
from vppo_kernels import vppo_loss

NOTES = {
    "divergence": "holds all logits",
    "distill": "holds all logits",
    "logprob": "holds all logits",
    "loss": "holds all logits; then vppo_loss",
    "selection": "a loop over the rows",
}


def kl(hidden: Tensor, perturbed: Tensor, weight: Tensor) -> Tensor:
    """`[N]` divergences from `[N, D]` hidden states and a `[V, D]` weight."""
    logp, logq = (linear(h, weight).float().log_softmax(-1) for h in (hidden, perturbed))
    return (logp.exp() * (logp - logq)).sum(-1)


def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`[...]` log-probabilities of the targets from `[..., D]` hidden states and a `[V, D]` weight."""
    return linear(hidden, weight).float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def divergence(pair: Pair) -> Callable[[], Tensor]:
    return lambda: kl(pair.hidden, pair.perturbed, pair.weight)


def distill(lesson: Lesson) -> Callable[[], Tensor]:
    def call() -> Tensor:
        student, weight, teacher, teacher_weight = lesson.tensors
        z = linear(student, weight).float(), linear(teacher, teacher_weight).float()
        return lessons.divergence(*z, lesson.beta)

    return call


def logprob(rollouts: Rollouts) -> Callable[[], Tensor]:
    return lambda: logprobs(rollouts.hidden, rollouts.weight, rollouts.targets)


def loss(rollouts: Rollouts) -> Callable[[], Tensor]:
    plan, forward = rollouts.plan, logprob(rollouts)
    return lambda: vppo_loss(forward(), rollouts.old_logprobs, *plan.arguments, **plan.options)[0]


def selection(scores: Scores) -> Callable[[], Tensor]:
    def call() -> Tensor:
        keep = torch.zeros_like(scores.values)
        for row, values, length in zip(keep, scores.values, scores.mask.sum(1).tolist(), strict=True):
            row[values[:length].topk(scores.keep_count(length), sorted=False).indices] = 1
        return keep

    return call


def advantages(scores: Scores) -> Callable[[], Tensor]:
    select = selection(scores)

    def call() -> Tensor:
        return select() * (scores.advantages * scale(scores.values, scores.mask)).unsqueeze(1)

    return call


def scale(values: Tensor, mask: Tensor, scale_min: float = 0.9) -> Tensor:
    """`[B]` factors of the trajectories with mean 1 (VPPO, Eq. 5)."""
    means = (values * mask).sum(1) / mask.sum(1)
    share = (means - means.min()) / (means.max() - means.min())
    return scale_min + share * (1 - scale_min) / share.mean()
