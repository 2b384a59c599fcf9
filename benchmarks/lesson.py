"""A student and its wider teacher, each under its own head, and what float64 says about some of their rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.inputs import PRESETS, Shape, make_views, make_weight
from benchmarks.pair import COLUMNS, SAMPLE
from vppo_kernels.reference import divergence_bound

NOISE = 0.003  # nats: how far the teacher's own columns move a logit; a KL of half its square, below all that are drawn


class Pairing(NamedTuple):
    """Heads of student and teacher with the same vocabulary, and the divergence by which one learns from the other.

    `beta` is TRL's and GKD's: 0 for KL(teacher || student), between 0 and 1 for their generalised JSD.
    """

    student: Shape
    teacher_width: int
    beta: float = 0.0


SIZES = {
    "tiny": Pairing(PRESETS["tiny"], 384),
    "cpu": Pairing(PRESETS["cpu"], 2_560),
    "1.5b-from-7b": Pairing(PRESETS["cpu"], 3_584),
    "7b-from-32b": Pairing(PRESETS["7b"], 5_120),
}
PAIRINGS = SIZES | {f"{name}-jsd": pairing._replace(beta=0.5) for name, pairing in SIZES.items()}


class Lesson:
    """The inputs of a case.

    The teacher's head has the student's columns and more; its hidden states are those of `make_views`' clean view, and
    small noise in the other columns. So the divergences are the ones that are drawn there.

    Attributes:
        student, student_weight: `[N, D]` and `[V, D]`; leaves that ask for gradients if wanted.
        teacher, teacher_weight: `[N, E]` and `[V, E]`.
        beta: See `Pairing`.
        upstream: `[N]` float32 gradient of a mean over rows.
    """

    def __init__(self, tensors: tuple[Tensor, Tensor, Tensor, Tensor], beta: float, backward: bool) -> None:
        self.student, self.student_weight, self.teacher, self.teacher_weight = (t.detach() for t in tensors)
        self.beta, self.backward = beta, backward
        for leaf in self.leaves:
            leaf.requires_grad_(backward)
        self.upstream = torch.full((len(self.student),), 1 / len(self.student), device=self.student.device)

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.student, self.student_weight

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student, self.student_weight, self.teacher, self.teacher_weight


@lru_cache(maxsize=1)
def _tensors(
    student: Shape, width: int, rows: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = make_weight(student, device, dtype)
    clean, moved = make_views(weight, rows)
    generator = torch.Generator(device).manual_seed(2)
    more = width - student.width
    columns = torch.randn(student.vocab, more, generator=generator, device=device).div_(more**0.5).to(dtype)
    noise = torch.randn(rows, more, generator=generator, device=device).mul_(NOISE).to(dtype)
    return moved, weight, torch.cat([clean, noise], 1), torch.cat([weight, columns], 1)


def make_lesson(preset: str, rows: int, device: torch.device, dtype: torch.dtype, backward: bool) -> Lesson:
    """Seeded inputs; those of the previous call are kept, so cases that share them should follow each other."""
    student, width, beta = PAIRINGS[preset]
    return Lesson(_tensors(student, width, rows, device, dtype), beta, backward)


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """`[...]` from logits `[..., V]` of both, in their dtype; the textbook formulae (GKD, Eq. 1)."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0:
        return (q.exp() * (q - p)).sum(-1)
    m = torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))
    return (beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)).sum(-1)


class Truth:
    """Divergences of a sample of rows, and the gradient of their mean, in float64.

    Attributes:
        rows: `[S]` indices of the sample.
        values: `[S]` in nats, float64.
        rounding: The largest error, as a multiple of the bound, of the float64 formula on float32 logits: what their
            rounding alone makes. Two views under one head are rounded alike, and most of it cancels; under two heads
            nothing does.
    """

    def __init__(self, lesson: Lesson) -> None:
        count, device = len(lesson.student), lesson.student.device
        self.rows = torch.linspace(0, count - 1, min(SAMPLE, count), device=device).round().long()
        self._weight = lesson.student_weight.detach()
        self._hidden = lesson.student.detach()[self.rows].double()
        z = _logits(self._hidden, self._weight).requires_grad_(lesson.backward)
        teacher = _logits(lesson.teacher[self.rows].double(), lesson.teacher_weight)
        values = _row_by_row(z, teacher, lesson.beta)
        self.values = values.detach().clamp_min(0)
        given = lesson.student.detach()[self.rows], self._weight, lesson.teacher[self.rows], lesson.teacher_weight
        student, weight, teacher, teacher_weight = (tensor.float() for tensor in given)
        rounded = _row_by_row(student @ weight.T, teacher @ teacher_weight.T, lesson.beta)
        self.rounding = float(((rounded - self.values).abs() / divergence_bound(self.values)).max())
        if lesson.backward:
            (self._slopes,) = torch.autograd.grad(values.mean(), z)

    def gradient_error(self, gradients: tuple[Tensor | None, ...]) -> float:
        """The larger error of the two gradients of the sample's mean, each as a norm over the norm of the true one."""
        grad_hidden, grad_weight = gradients
        assert grad_hidden is not None and grad_weight is not None
        truth, wrong, size = torch.zeros_like(self._hidden), 0.0, 0.0
        for start in range(0, len(self._weight), COLUMNS):
            columns = slice(start, min(start + COLUMNS, len(self._weight)))
            slopes = self._slopes[:, columns]
            truth.addmm_(slopes, self._weight[columns].double())
            exact = slopes.T @ self._hidden
            wrong += float((grad_weight[columns].double() - exact).square().sum())
            size += float(exact.square().sum())
        of_hidden = float((grad_hidden[self.rows].double() - truth).norm() / truth.norm())
        return max(of_hidden, (wrong / size) ** 0.5)


def _row_by_row(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """In float64, of which the formula holds many copies."""
    return torch.stack([divergence(p.double(), q.double(), beta) for p, q in zip(student, teacher, strict=True)])


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([hidden @ part.double().T for part in weight.detach().split(COLUMNS)], -1)


def only(lesson: Lesson, rows: Tensor, call: Callable[[], object]) -> object:
    """What the call returns where the mean is over these rows alone."""
    lesson.upstream.zero_()[rows] = 1 / len(rows)
    try:
        return call()
    finally:
        lesson.upstream.fill_(1 / len(lesson.upstream))
