"""The plain formula under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.pair import Pair
from benchmarks.peers.plain import kl

NOTE = "holds all logits"


def divergence(pair: Pair) -> Callable[[], Tensor]:
    torch.compiler.reset()  # after eight shapes it would give up and run the plain formula
    compiled = torch.compile(kl, dynamic=False)
    return lambda: compiled(pair.hidden, pair.perturbed, pair.weight)
