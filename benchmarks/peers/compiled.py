"""The plain formula under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.pair import Pair
from benchmarks.peers import plain
from benchmarks.rollout import Rollouts

NOTES = {"divergence": "holds all logits", "logprob": "holds all logits"}


def divergence(pair: Pair) -> Callable[[], Tensor]:
    compiled = _compiled(plain.kl)
    return lambda: compiled(pair.hidden, pair.perturbed, pair.weight)


def logprob(rollouts: Rollouts) -> Callable[[], Tensor]:
    compiled = _compiled(plain.logprobs)
    return lambda: compiled(rollouts.hidden, rollouts.weight, rollouts.targets)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch.compiler.reset()  # after eight shapes it would give up and run the plain formula
    return torch.compile(function, dynamic=False)
