"""TRL's chunked divergence, called as its distillation trainer calls it: the clean view is the teacher."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.pair import Pair

NOTE = "differentiates the perturbed view only"


def divergence(pair: Pair) -> Callable[[], Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    teacher, teacher_weight = pair.hidden.detach(), pair.weight.detach()
    forward_kl, temperature = 0.0, 1.0

    def call() -> Tensor:
        value: Tensor = ChunkedDivergenceFunction.apply(
            pair.perturbed, pair.weight, None, teacher, teacher_weight, None, forward_kl, temperature
        )[0]
        return value

    return call
