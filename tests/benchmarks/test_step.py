"""The suite of training steps at its tiny preset: contestants do the same work, and wrong scores are caught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.contest import Case, Setting
from benchmarks.harness import run_case
from benchmarks.plot import png
from benchmarks.policy import POLICIES, model_of, rollouts_of
from benchmarks.report import CaseResult, Result, case_view
from benchmarks.suites import load_suite

CPU = torch.device("cpu")
SUITE = load_suite("step")


def tiny(backward: bool) -> Case:
    return SUITE.case(Setting("tiny", 8, backward, CPU), [])


@pytest.fixture(scope="module")
def scoring() -> Case:
    return tiny(backward=False)


def test_scoring(scoring: Case) -> None:
    records = {record.name: record for record in run_case(scoring, CPU, 0.0)}
    assert list(records) == ["floor", "rows whole", "ours: prompts shared"]
    for record in records.values():
        assert record.status == "timed" and len(record.seconds) == 3, record.reason
        assert record.role == "floor" or (record.error is not None and record.error <= 1)
    labels = scoring.labels
    assert (labels["prompts"], labels["prompt"], labels["response"]) == (2, 24, 6)
    assert (labels["tokens_whole"], labels["tokens_shared"]) == (8 * 30, 2 * 24 + 8 * 6)
    case_view(CaseResult(labels, list(records.values())))


def test_wrong_scores_are_caught(scoring: Case) -> None:
    ours = scoring.contestants[-1]
    call = ours.prepare()
    assert scoring.judge(ours, call).right
    verdict = scoring.judge(ours, lambda: call() * 1.01)
    assert not verdict.right and verdict.error is not None and verdict.error > 5


def test_everyone_takes_the_same_step() -> None:
    """From the same weights and the same stream: GRPO is TRL's, and sharing prompts does not change VPPO."""
    case = tiny(backward=True)
    calls = {contestant.name: contestant.prepare() for contestant in case.contestants}
    losses = {name: call().item() for name, call in calls.items()}
    assert all(case.judge(c, calls[c.name]).right for c in case.contestants)
    assert losses["GRPO here"] == pytest.approx(losses["GRPO by TRL"], abs=1e-5)
    assert losses["ours: VPPO"] == pytest.approx(losses["VPPO, rows whole"], abs=1e-5)
    assert abs(losses["ours: VPPO"] - losses["GRPO here"]) > 1e-4


@pytest.mark.parametrize("preset", ["tiny", "demo", "prompt-64", "rollouts-2"])
def test_prompts_have_the_tokens_that_their_preset_says(preset: str) -> None:
    policy = POLICIES[preset]
    model = model_of(replace(policy, layers=policy.layers and 1), CPU)
    batch, clean, perturbed = rollouts_of(policy, model, 2 * policy.rollouts)
    down, across = policy.cells
    images = (batch.prompt_ids == model.config.image_token_id).sum(1)
    assert images.tolist() == [down * across] * len(batch)
    assert set(batch.prompt_lengths) == ({policy.prompt} if policy.prompt else {batch.prompt_ids.shape[1]})
    assert set(batch.response_lengths) == {policy.response}
    assert len(set(clean.keys)) == 2 and perturbed.pixels is not None and len(perturbed.pixels) == 2


def test_curves(scoring: Case, tmp_path: Path) -> None:
    """Presets that differ in a number make curves instead of bars."""
    records = run_case(scoring, CPU, 0.0)
    names = [f"{name}-{number}" for name in ("prompt", "rollouts") for number in (2, 8)]
    cases = [CaseResult({**scoring.labels, "preset": name}, records) for name in names]
    where = {"device": "a machine", "threads": 2}
    result = Result("step", "cpu", names, "2026-01-01T00:00:00", "", where, {"torch": "2", "commit": None}, cases)
    path = tmp_path / "curves.png"
    path.write_bytes(png(result))
    with Image.open(path) as picture:
        assert picture.width > picture.height
