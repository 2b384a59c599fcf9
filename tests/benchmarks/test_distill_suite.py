"""The suite of two heads: its inputs are what is claimed, and what fails the gate is another divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.contest import Contestant, Setting
from benchmarks.lesson import PAIRINGS, divergence, make_lesson
from benchmarks.pair import Result
from benchmarks.peers import peers
from benchmarks.report import CaseResult
from benchmarks.suites import load_suite
from benchmarks.suites.distill import Judge

CPU = torch.device("cpu")


def case_of(preset: str, backward: bool, names: list[str]) -> Any:
    return load_suite("distill").case(Setting(preset, 64, backward, CPU), names)


def contestant(case: Any, name: str) -> Contestant:
    return next(each for each in case.contestants if each.name == name)


def test_the_teacher_is_wider_and_as_far_away_as_was_drawn() -> None:
    lesson = make_lesson("tiny", 200, CPU, torch.float32, False)
    assert lesson.student.shape == (200, 256) and lesson.teacher.shape == (200, 384)
    student, teacher = (h.double() @ w.double().T for h, w in (lesson.tensors[:2], lesson.tensors[2:]))
    kl = divergence(student, teacher, 0.0)
    assert kl.min() >= 1e-4 and kl.max() <= 5.0
    assert torch.histc(kl.log10(), bins=4, min=-4, max=0.7).min() >= 20
    jsd = divergence(student, teacher, 0.5)
    assert (jsd > 0).all() and (jsd < kl.clamp_max(0.7)).all()


@pytest.mark.parametrize("preset", ["tiny", "tiny-jsd"])
def test_ours_are_off_by_the_rounding_of_logits_and_trls_by_more(preset: str) -> None:
    case = case_of(preset, False, ["trl", "plain"])
    errors = {}
    for name in ("trl", "plain", "ours: torch", "ours: native"):
        each = contestant(case, name)
        verdict = case.judge(each, each.prepare())
        assert verdict.right, verdict.reason
        errors[name] = verdict.error
    for name in ("ours: torch", "ours: native"):
        assert errors[name] == pytest.approx(case.judge.truth.rounding, rel=0.1)
        if preset == "tiny":  # TRL's JSD does not subtract normalisers
            assert errors["trl"] > 3 * errors[name] < errors["plain"]


def test_exact_products_keep_the_bound_that_the_default_misses() -> None:
    case, errors = case_of("tiny", False, []), {}
    for name in ("ours: native", "ours: native, exact"):
        each = contestant(case, name)
        errors[name] = case.judge(each, each.prepare()).error
    assert errors["ours: native, exact"] < 0.5 and errors["ours: native"] > 1


def test_another_divergence_or_another_gradient_is_wrong() -> None:
    case = case_of("tiny", True, [])
    judge: Any = case.judge
    assert isinstance(judge, Judge)
    ours = contestant(case, "ours: torch")
    call = ours.prepare()
    assert judge(ours, call).right
    value, gradients = call()
    for wrong in (
        Result(value * 1.001, gradients),
        Result(value - 1.0, gradients),
        Result(value, (2 * gradients[0], gradients[1])),
        Result(value, (gradients[0], torch.zeros_like(gradients[1]))),
    ):
        assert not judge(ours, lambda wrong=wrong: wrong).right


def test_liger_needs_a_gpu_and_the_table_names_both_heads() -> None:
    assert {"plain", "trl", "liger"} == set(peers("distill"))
    case = case_of("tiny", False, ["liger"])
    with pytest.raises(NotImplementedError, match="GPU"):
        contestant(case, "liger").prepare()
    assert CaseResult(case.labels, []).sizes == "8,192 x (256 and 384), KL(teacher || student), float32"
    assert PAIRINGS["7b-from-32b"].teacher_width == 5120 and PAIRINGS["cpu-jsd"].beta == 0.5
