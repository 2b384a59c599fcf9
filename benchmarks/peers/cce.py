"""Cut Cross Entropy: the negated log-probabilities as its cross-entropy, with its default gradient filter."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.rollout import Rollouts

NOTES = {"logprob": "its gradient leaves out blocks of small probabilities"}


def logprob(rollouts: Rollouts) -> Callable[[], Tensor]:
    if not rollouts.hidden.is_cuda:
        raise NotImplementedError("needs a GPU with Triton")
    from cut_cross_entropy import linear_cross_entropy

    def call() -> Tensor:
        value: Tensor = linear_cross_entropy(rollouts.hidden, rollouts.weight, rollouts.targets, reduction="none")
        return -value

    return call
