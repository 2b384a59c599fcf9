"""Two views under one head, and what float64 says about some of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.inputs import PRESETS, make_views, make_weight
from vppo_kernels import reference

SAMPLE = 64  # rows that are judged, evenly spread
COLUMNS = 8_192  # of the float64 weight at a time


class Pair:
    """The inputs of a suite with two views.

    Attributes:
        hidden, perturbed: `[N, D]` of the clean and of the perturbed view; leaves that ask for gradients if wanted.
        weight: `[V, D]`, likewise.
        upstream: `[N]` float32 gradient of a mean over rows, in which only some rows may count: see `only`.
    """

    def __init__(self, hidden: Tensor, perturbed: Tensor, weight: Tensor, backward: bool) -> None:
        self.hidden, self.perturbed, self.weight = (t.detach() for t in (hidden, perturbed, weight))
        self.backward = backward
        for leaf in self.leaves:
            leaf.requires_grad_(backward)
        self.upstream = torch.full((len(hidden),), 1 / len(hidden), device=hidden.device)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.perturbed, self.weight

    @contextmanager
    def only(self, rows: Tensor) -> Iterator[None]:
        """Within the block, the mean is over these rows alone."""
        self.upstream.zero_()[rows] = 1 / len(rows)
        try:
            yield
        finally:
            self.upstream.fill_(1 / len(self.upstream))


@lru_cache(maxsize=1)
def _weight(preset: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    return make_weight(PRESETS[preset], device, dtype)


@lru_cache(maxsize=1)
def _views(preset: str, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return make_views(_weight(preset, device, dtype), rows)


def make_pair(preset: str, rows: int, device: torch.device, dtype: torch.dtype, backward: bool) -> Pair:
    """Seeded inputs; those of the previous call are kept, so cases that share them should follow each other."""
    return Pair(*_views(preset, rows, device, dtype), _weight(preset, device, dtype), backward)


class Result(NamedTuple):
    """What a contestant of a suite with hidden states returns.

    Attributes:
        value: A number per row, or one for all: divergences, their mean over the rows that count, a loss.
        gradients: Of the one for all, in the leaves' order; None for a leaf that gets none, () without backward.
    """

    value: Tensor
    gradients: tuple[Tensor | None, ...]


class Inputs(Protocol):
    """What `differentiated` has to know of a suite's inputs."""

    backward: bool
    upstream: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]: ...


def differentiated(inputs: Inputs, forward: Callable[[], Tensor]) -> Callable[[], Result]:
    """The call that computes the value and, if the inputs ask for it, the gradients."""

    def call() -> Result:
        if not inputs.backward:
            with torch.no_grad():
                return Result(forward(), ())
        value = forward()
        upstream = inputs.upstream if value.dim() else None
        return Result(value.detach(), torch.autograd.grad(value, inputs.leaves, upstream, allow_unused=True))

    return call


class Truth:
    """KL of a sample of rows, and the gradient of its mean over them, in float64.

    Attributes:
        rows: `[S]` indices of the sample.
        kl: `[S]` in nats, float64.
    """

    def __init__(self, pair: Pair) -> None:
        count, device = len(pair.hidden), pair.hidden.device
        self.rows = torch.linspace(0, count - 1, min(SAMPLE, count), device=device).round().long()
        self._weight = pair.weight.detach()
        self._hidden = [h.detach()[self.rows].double() for h in (pair.hidden, pair.perturbed)]
        logits = [torch.cat([h @ w.T for _, w in self._tiles()], -1).requires_grad_() for h in self._hidden]
        kl = [reference.kl(p, q) for p, q in zip(*logits, strict=True)]  # row by row: the formula holds many copies
        self.kl = torch.stack(kl).detach().clamp_min(0)
        if pair.backward:
            self._slopes = torch.autograd.grad(torch.stack(kl).mean(), logits)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self._weight), COLUMNS):
            columns = slice(start, min(start + COLUMNS, len(self._weight)))
            yield columns, self._weight[columns].double()

    def gradient_error(self, gradients: tuple[Tensor | None, ...]) -> float:
        """Largest error of the gradients of the sample's mean, each as a norm over the norm of the true one.

        A view whose hidden states get no gradient is one that the contestant leaves out of the weight's too.
        """
        views = [view for view in range(2) if gradients[view] is not None]
        errors = []
        for view in views:
            got = gradients[view]
            assert got is not None
            truth = torch.zeros_like(self._hidden[view])
            for columns, weight in self._tiles():
                truth.addmm_(self._slopes[view][:, columns], weight)
            errors.append(float((got[self.rows].double() - truth).norm() / truth.norm()))
        if gradients[2] is not None:
            wrong = size = 0.0
            for columns, _ in self._tiles():
                truth = torch.stack([self._slopes[view][:, columns].T @ self._hidden[view] for view in views]).sum(0)
                wrong += float((gradients[2][columns].double() - truth).square().sum())
                size += float(truth.square().sum())
            errors.append((wrong / size) ** 0.5)
        return max(errors)
