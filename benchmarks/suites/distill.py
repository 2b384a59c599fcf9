"""Divergence of a student from a wider teacher under a head of its own, without and with the student's gradients."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.contest import Call, Case, Contestant, Setting, Suite, Verdict
from benchmarks.floor import head_products
from benchmarks.lesson import PAIRINGS, Lesson, Truth, make_lesson, only
from benchmarks.pair import differentiated
from benchmarks.peers import peers, plain
from benchmarks.suites.divergence import backend_names
from vppo_kernels import linear_divergence, tensor_cores


class Distill(Suite):
    name = "distill"
    summary = "divergence of a student from its teacher, two heads, and the student's gradient"
    known = PAIRINGS

    def presets(self, device: torch.device) -> list[str]:
        return ["1.5b-from-7b", "7b-from-32b"] if device.type == "cuda" else ["cpu", "cpu-jsd"]

    def rows(self, preset: str, device: torch.device) -> list[int]:
        return [4096, 16384] if device.type == "cuda" else [128 if preset.startswith("tiny") else 512]

    def case(self, setting: Setting, peers: list[str]) -> Case:
        dtype = torch.bfloat16 if setting.device.type == "cuda" else torch.float32
        lesson = make_lesson(setting.preset, setting.rows, setting.device, dtype, setting.backward)
        vocab, width = lesson.student_weight.shape
        labels = {
            "preset": setting.preset,
            "rows": setting.rows,
            "vocab": vocab,
            "width": width,
            "teacher_width": lesson.teacher.shape[1],
            "divergence": "KL(teacher || student)" if lesson.beta == 0 else f"JSD, beta {lesson.beta}",
            "dtype": str(dtype).removeprefix("torch."),
            "backward": setting.backward,
        }
        return Case(labels, contestants(lesson, peers), Judge(lesson))


def contestants(lesson: Lesson, names: list[str]) -> list[Contestant]:
    """The floor, the named peers, and every backend of ours that takes these inputs."""

    def floor() -> Call:
        student, weight, teacher, teacher_weight = (tensor.detach() for tensor in lesson.tensors)
        own = head_products(student, weight, lesson.backward)
        theirs = head_products(teacher, teacher_weight, False)
        return lambda: (own(), theirs())

    def peer(module: ModuleType) -> Call:
        return differentiated(lesson, module.distill(lesson))

    known, device = peers("distill"), lesson.student.device
    cut = tensor_cores.multiply(lesson.student, lesson.teacher, lesson.student_weight)
    available = backend_names(device)
    exact = [x for x in available if x == ("triton" if device.type == "cuda" else "native")]
    return [
        Contestant("floor", "floor", floor, "matrix products alone, the teacher's forward only"),
        *(Contestant(name, "peer", partial(peer, known[name]), known[name].NOTES["distill"]) for name in names),
        *(Contestant(f"ours: {x}", "ours", partial(ours, lesson, x), cut=cut) for x in available),
        *(Contestant(f"ours: {x}, exact", "ours", partial(ours, lesson, x, "exact")) for x in exact),
    ]


def ours(lesson: Lesson, backend: str, precision: str = "default") -> Call:
    student, weight, teacher, teacher_weight = lesson.tensors
    options: dict[str, Any] = {"kind": "reverse_kl"} if lesson.beta == 0 else {"kind": "jsd", "beta": lesson.beta}

    def forward() -> Tensor:
        return linear_divergence(
            student, teacher, weight, weight_other=teacher_weight, precision=precision, backend=backend, **options
        ).divergence

    return differentiated(lesson, forward)


ROUNDING = 1.5  # times what the rounding of logits alone makes: other tiles sum in another order


class Judge:
    """Holds results against float64 on a sample of rows; gradients are those of the mean over the sample.

    Our own backends keep the bound, or else what the rounding of float32 logits leaves to the exact formula.
    """

    def __init__(self, lesson: Lesson) -> None:
        self.lesson, self.truth = lesson, Truth(lesson)
        self.allowed = max(1.0, ROUNDING * self.truth.rounding)
        self.plain_error = self._plain_gradient_error() if lesson.backward else 0.0

    def _plain_gradient_error(self) -> float:
        """What the textbook formula in the inputs' dtype makes of the sample alone."""
        rows, (student, weight, teacher, teacher_weight) = self.truth.rows, self.lesson.tensors
        sample = Lesson((student[rows], weight, teacher[rows], teacher_weight), self.lesson.beta, backward=True)
        of_hidden, of_weight = differentiated(sample, plain.distill(sample))().gradients
        assert of_hidden is not None
        whole = torch.zeros_like(student).index_copy_(0, rows, of_hidden)
        return self.truth.gradient_error((whole, of_weight))

    def __call__(self, contestant: Contestant, call: Call) -> Verdict:
        result: Any = only(self.lesson, self.truth.rows, call)
        if contestant.role == "floor":
            return Verdict(right=True)
        value: Tensor = result.value
        got, truth = (value[self.truth.rows], self.truth.values) if value.dim() else (value, self.truth.values.mean())
        error, reason = gate.judge_divergence(contestant.role, got, truth, contestant.cut, self.allowed)
        gradient_error = None
        if result.gradients:
            relative = self.truth.gradient_error(result.gradients)
            gradient_error, gradient_reason = gate.judge_gradient(contestant.role, relative, self.plain_error)
            reason = "; ".join(part for part in (reason, gradient_reason) if part)
        return Verdict(not reason, error, gradient_error, reason)


SUITE = Distill()
