"""The supervised warm-up: repeatable, on the response alone, and it stops at a given skill."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vppo.demo import warmup
from vppo.demo.digits import read_places
from vppo.demo.model import build_model, build_processor
from vppo.demo.warmup import warm_up


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "BATCH", 8)
    monkeypatch.setattr(warmup, "MISMATCHED", 4)
    monkeypatch.setattr(warmup, "MAX_STEPS", 12)


def run(processor: Any, seed: int) -> tuple[Any, int, list[tuple[int, float]]]:
    model = build_model(processor, seed=0)
    seen: list[tuple[int, float]] = []
    steps = warm_up(model, processor, seed, lambda step, loss: seen.append((step, loss)))
    return model, steps, seen


def test_the_seed_is_the_result(processor: Any) -> None:
    first, _, losses = run(processor, 1)
    torch.rand(7)  # what the process draws elsewhere must not matter
    again, _, same_losses = run(processor, 1)
    assert losses == same_losses
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert run(processor, 2)[2] != losses


def test_it_learns_and_reports_every_step(processor: Any) -> None:
    _, steps, seen = run(processor, 0)
    assert steps == 12 and [step for step, _ in seen] == list(range(1, 13))
    assert seen[-1][1] < 0.9 * seen[0][1]


def test_it_ends_at_the_target(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "TARGET_LOSS", 100.0)
    _, steps, seen = run(processor, 0)
    assert steps == len(seen) == 10  # the mean of ten steps is what counts


def test_what_counts_is_the_response_and_for_a_strange_image_what_is_computed(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    model = build_model(processor, seed=0)
    monkeypatch.setattr(warmup, "MAX_STEPS", 1)

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    model.register_forward_pre_hook(keep, with_kwargs=True)
    warm_up(model, processor, 0)
    patches = seen[0]["pixel_values"].unflatten(0, (8, -1))
    for row, (ids, labels) in enumerate(zip(seen[0]["input_ids"], seen[0]["labels"], strict=True)):
        text, learned = (processor.tokenizer.decode(x) for x in (ids, labels[labels != -100]))
        response = text.split("assistant\n")[1].split("<|endoftext|>")[0]
        if row < 4:
            assert learned == response and learned[0].isdigit()
        else:
            assert torch.equal(patches[row], patches[row - 4])
            places = read_places(response)
            assert len(places) == 3
            assert learned == "".join(c for place, c in enumerate(response) if place not in places)
