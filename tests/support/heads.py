"""A student and a teacher with a head each, whose distributions look like a language model's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from support.views import make_views
from vppo_kernels import reference
from vppo_kernels.statistics import DivergenceOutput

NAMES = ("student", "teacher", "weight", "bias", "weight_other", "bias_other")


@dataclass
class Heads:
    """Hidden states `[N, D]` and `[N, D_other]`, heads `[V, D]` and `[V_other, D_other]` with biases, targets `[N]`."""

    student: Tensor
    teacher: Tensor
    weight: Tensor
    bias: Tensor
    weight_other: Tensor
    bias_other: Tensor
    targets: Tensor
    vocab_size: int

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in NAMES}

    def grad(self, wanted: tuple[str, ...] = NAMES) -> Heads:
        """Copies that are leaves, of which the wanted ones want gradients."""
        leaves = {n: x.detach().clone().requires_grad_(n in wanted) for n, x in self.tensors().items()}
        return replace(self, **leaves)

    def double(self) -> Heads:
        return replace(self, **{name: x.detach().double() for name, x in self.tensors().items()})

    def logits(self, options: dict[str, Any], other: dict[str, Any]) -> tuple[Tensor, Tensor]:
        own = {**options, **{name.removesuffix("_other"): value for name, value in other.items()}}
        if own.get("softcap") == math.inf:
            own["softcap"] = None
        return (
            reference.logits(self.student, self.weight, self.bias, vocab_size=self.vocab_size, **options),
            reference.logits(self.teacher, self.weight_other, self.bias_other, vocab_size=self.vocab_size, **own),
        )

    def truth(self, kind: dict[str, Any], options: Any = None, other: Any = None) -> DivergenceOutput:
        """Every output in float64, on these very inputs; differentiable."""
        exact = replace(self, **{name: x.double() for name, x in self.tensors().items()})
        return reference.divergence(*exact.logits(options or {}, other or {}), self.targets, **kind)


def make_heads(
    rows: int = 48,
    vocab: int = 1000,
    width: int = 32,
    width_other: int = 48,
    padding: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
    dtype_other: torch.dtype | None = None,
    divergences: tuple[float, float] = (1e-4, 5.0),
    seed: int = 0,
) -> Heads:
    """A teacher whose logits are a wider model's, and whose divergences from the student run over decades."""
    g = torch.Generator().manual_seed(seed)
    small = min(width, width_other)
    views = make_views(rows, vocab, small, divergences=divergences, dtype=torch.float64, seed=seed)

    def rotated(hidden: Tensor, weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The same logits from an inner width of `size`, in other coordinates."""
        more = size - small
        turn = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0]
        hidden, weight = (torch.nn.functional.pad(x, (0, more)) for x in (hidden, weight))
        weight[:, small:] = torch.randn(vocab, more, generator=g, dtype=torch.float64) / math.sqrt(size)
        return hidden @ turn, weight @ turn

    student, weight = rotated(views.hidden, views.weight, width)
    teacher, weight_other = rotated(views.perturbed, views.weight, width_other)
    bias = 0.3 * torch.randn(vocab, generator=g, dtype=torch.float64)

    def padded(x: Tensor, more: int, to: torch.dtype) -> Tensor:
        return torch.cat([x, torch.full((more, *x.shape[1:]), math.nan, dtype=torch.float64)]).to(to)

    other = dtype_other or dtype
    return Heads(
        student.to(dtype), teacher.to(other), padded(weight, padding[0], dtype), padded(bias, padding[0], dtype),
        padded(weight_other, padding[1], other), padded(bias, padding[1], other), views.targets, vocab,
    )  # fmt: skip
