"""What one writes: full logits in the inputs' dtype, then float32, two log-softmaxes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear

from benchmarks.pair import Pair

NOTE = "holds all logits"


def kl(hidden: Tensor, perturbed: Tensor, weight: Tensor) -> Tensor:
    """`[N]` divergences from `[N, D]` hidden states and a `[V, D]` weight."""
    logp, logq = (linear(h, weight).float().log_softmax(-1) for h in (hidden, perturbed))
    return (logp.exp() * (logp - logq)).sum(-1)


def divergence(pair: Pair) -> Callable[[], Tensor]:
    return lambda: kl(pair.hidden, pair.perturbed, pair.weight)
