"""The study's warm-up: when it stops, and what it learns from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vppo.demo.model import build_model, build_processor
from vppo.study import warmup
from vppo.study.task import GUESS, LOOK, WORDS
from vppo.study.warmup import DECAY_STEPS, WARM_STEPS, WarmStep, learned, learning_rate_factor, warm_up


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor([*WORDS, LOOK, GUESS])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BATCH": 8, "MISMATCHED": 4, "WARM_STEPS": 12}.items():
        monkeypatch.setattr(warmup, name, value)


@pytest.mark.parametrize(
    ("read", "computed", "steps", "stops"),
    [
        (0.005, 0.005, 10, True),
        (0.005, 0.005, 9, False),
        (0.005, 0.06, 20, False),  # it reads, and cannot add
        (0.06, 0.005, 20, False),  # it adds, and cannot read
        (0.0099, 0.0099, 10, True),
        (float("nan"), 0.005, 10, False),
        (0.005, float("nan"), 10, False),
    ],
)
def test_both_kinds_of_tokens_have_to_be_learned(read: float, computed: float, steps: int, stops: bool) -> None:
    assert learned([WarmStep(read, computed)] * steps) is stops


def test_only_the_last_ten_steps_count() -> None:
    bad, good = WarmStep(3.0, 3.0), WarmStep(0.008, 0.008)
    assert learned([bad] * 30 + [good] * 10)
    assert not learned([good] * 30 + [bad])


def test_the_learning_rate_rises_and_falls_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "WARM_STEPS", WARM_STEPS)
    factors = [learning_rate_factor(step) for step in range(WARM_STEPS + 1)]
    top = factors.index(1.0)
    assert factors[0] > 0 and factors[-1] == 0
    assert factors[: top + 1] == sorted(factors[: top + 1]) and factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[WARM_STEPS - DECAY_STEPS] == 1.0


def test_it_stops_when_both_are_learned(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "WARM_TARGET", 100.0)
    assert len(warm_up(build_model(processor, 0, 64), processor, "narrated", 0)) == 10


def test_the_seed_is_the_result(processor: Any) -> None:
    def run(seed: int) -> tuple[list[WarmStep], Any]:
        model = build_model(processor, 0, 64)
        torch.rand(3)  # what the process draws elsewhere must not matter
        return warm_up(model, processor, "narrated", seed), model

    (first, model), (again, same) = run(1), run(1)
    assert first == again and len(first) == 12
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert run(2)[0] != first
    assert first[-1].read < first[0].read and first[-1].computed < first[0].computed


def test_rows_with_a_strange_image_do_not_teach_reading(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every row mismatched, no read token has a loss, so that its mean is NaN, and no gradient breaks."""
    monkeypatch.setattr(warmup, "MISMATCHED", 8)
    monkeypatch.setattr(warmup, "WARM_STEPS", 1)
    model = build_model(processor, 0, 64)
    (step,) = warm_up(model, processor, "narrated", 0)
    assert step.read != step.read and step.computed > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())
