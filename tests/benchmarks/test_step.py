"""The suite of training steps at its tiny preset: contestants do the same work, and wrong scores are caught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.contest import Case, Setting
from benchmarks.harness import run_case
from benchmarks.plot import png
from benchmarks.policy import POLICIES, model_of, rollouts_of
from benchmarks.report import CaseResult, Result, case_view
from benchmarks.suites import load_suite
from vppo.errors import InputError

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


def test_another_number_of_tokens_is_caught() -> None:
    case = tiny(backward=True)
    ours = case.contestants[-1]
    step: Any = ours.prepare()
    assert case.judge(ours, step).right and case.judge(ours, step).right
    assert step.tokens == case.labels["tokens_step"] < case.labels["tokens_step_whole"]
    prompts, rows, prompt, response = 2, 8, 24, 6
    shared = prompts * (prompt - 1) + rows * response
    assert step.tokens == rows * (prompt + response - 1) + 2 * shared, "sampling, the perturbed view, the training pass"
    step.trainer._passes._ways = []  # rows pass whole from here on
    verdict = case.judge(ours, step)
    assert not verdict.right and "tokens passed instead of" in verdict.reason


def test_a_group_split_over_processes_passes_its_prompt_in_each() -> None:
    case = SUITE.case(Setting("tiny-fsdp2", 4, True, CPU), [])
    processes, rows, prompt, response, passes = 2, 4, 24, 6, 3
    assert case.labels["tokens_step"] == passes * (processes * (prompt - 1) + rows * response)


@pytest.mark.slow
def test_two_processes_take_the_step_of_one() -> None:
    """With FSDP2, the same responses and each a prompt of its own."""
    losses = []
    for preset in ("tiny-given", "tiny-fsdp2"):
        case = SUITE.case(Setting(preset, 8, True, CPU), [])
        assert [contestant.name for contestant in case.contestants] == ["GRPO by TRL", "ours: VPPO"]
        calls: list[Any] = [contestant.prepare() for contestant in case.contestants]
        for contestant, call in zip(case.contestants, calls, strict=True):
            verdict = case.judge(contestant, call)
            assert verdict.right, verdict.reason
        losses.append([call().item() for call in calls])
        assert abs(losses[-1][1]) > 1e-3
        assert calls[1].tokens == case.labels["tokens_step"] < calls[0].tokens * 2
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    workers = calls[1]._workers
    del calls, call
    for worker in workers:
        worker.join(10)
        assert worker.exitcode is not None


def test_a_policy_in_processes_is_the_cpus() -> None:
    with pytest.raises(InputError, match="--preset tiny-fsdp2: shards over processes of a CPU, not of cuda"):
        SUITE.case(Setting("tiny-fsdp2", 8, True, torch.device("cuda")), [])


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
