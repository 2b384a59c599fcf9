"""Gradients of a function of the log-probabilities of sampled tokens, held against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.contest import Role
from benchmarks.peers import plain
from benchmarks.rollout import Rollouts, tiles

PLAIN_ROWS = 512  # active rows on which the textbook formula shows what error its dtype leaves

# log-probabilities of some rows, and which rows these are, to the scalar that is differentiated
Objective = Callable[[Tensor, Tensor], Tensor]


class Truth:
    """Gradients of an objective of the log-probabilities of some rows, in float64."""

    def __init__(self, rollouts: Rollouts, rows: Tensor, objective: Objective) -> None:
        self.rows = rows
        self._weight = rollouts.weight
        self._hidden = rollouts.hidden.detach().flatten(0, 1)[rows].double()
        self._targets = rollouts.targets.flatten()[rows]
        logprobs = rollouts.exact.flatten()[rows].requires_grad_()
        value = objective(logprobs, rows)
        self.value = value.detach()
        (self._upstream,) = torch.autograd.grad(value, logprobs)
        self._normaliser = torch.full_like(self._upstream, -torch.inf)
        for _, tile in tiles(self._weight):
            self._normaliser = torch.logaddexp(self._normaliser, (self._hidden @ tile.T).logsumexp(-1))
        self._grad_hidden = torch.zeros_like(self._hidden)
        for slopes, _, tile in self._slopes():
            self._grad_hidden.addmm_(slopes, tile)

    def _slopes(self) -> Iterator[tuple[Tensor, slice, Tensor]]:
        """The logits' gradient `[rows, columns]`, tile by tile."""
        for columns, tile in tiles(self._weight):
            slopes = (self._hidden @ tile.T).sub_(self._normaliser.unsqueeze(1)).exp_().neg_()
            here = ((self._targets >= columns.start) & (self._targets < columns.stop)).nonzero().squeeze(-1)
            slopes[here, self._targets[here] - columns.start] += 1
            yield slopes.mul_(self._upstream.unsqueeze(1)), columns, tile

    def gradient_error(self, grad_hidden: Tensor, grad_weight: Tensor) -> float:
        """The larger error of the two gradients, each as a norm over the norm of the true one.

        Args:
            grad_hidden: Of these rows, `[rows, D]`.
            grad_weight: `[V, D]`.
        """
        of_hidden = (grad_hidden.double() - self._grad_hidden).norm() / self._grad_hidden.norm()
        wrong = size = 0.0
        for slopes, columns, _ in self._slopes():
            truth = slopes.T @ self._hidden
            wrong += float((grad_weight[columns].double() - truth).square().sum())
            size += float(truth.square().sum())
        return max(float(of_hidden), (wrong / size) ** 0.5)


class GradientJudge:
    """Holds gradients of an objective against float64 on all active rows, and the textbook formula on some of them.

    Attributes:
        truth: Of all active rows.
        plain: Of the rows that the textbook formula was given.
        plain_value: What it made of them.
        plain_error: The error of its gradients.
    """

    def __init__(self, rollouts: Rollouts, objective: Objective) -> None:
        active = rollouts.active
        self.truth = Truth(rollouts, active, objective)
        some = torch.linspace(0, len(active) - 1, min(PLAIN_ROWS, len(active)), device=active.device).round().long()
        self.plain = self.truth if len(some) == len(active) else Truth(rollouts, active[some], objective)
        rows = self.plain.rows
        hidden = rollouts.hidden.detach().flatten(0, 1)[rows].requires_grad_()
        weight = rollouts.weight.detach().requires_grad_()
        value = objective(plain.logprobs(hidden, weight, rollouts.targets.flatten()[rows]), rows)
        self.plain_value = value.detach()
        self.plain_error = self.plain.gradient_error(*torch.autograd.grad(value, [hidden, weight]))

    def __call__(self, role: Role, gradients: tuple[Tensor | None, ...]) -> tuple[float, str]:
        """Error as a multiple of the bound, and what is wrong ("" if nothing is)."""
        grad_hidden, grad_weight = gradients
        assert grad_hidden is not None and grad_weight is not None
        flat = grad_hidden.flatten(0, 1)
        elsewhere = torch.ones(len(flat), dtype=torch.bool, device=flat.device).index_fill_(0, self.truth.rows, False)
        error = self.truth.gradient_error(flat[self.truth.rows], grad_weight)
        if bool((flat[elsewhere] != 0).any()):
            return math.inf, "a gradient in rows that have none"
        return gate.judge_gradient(role, error, self.plain_error)
