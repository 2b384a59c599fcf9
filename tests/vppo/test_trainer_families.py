"""The trainer on every family: it trains, and its dependency is the one of two ordinary forwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import families
from support.runs import (
    fix_rollouts,
    generation_batch,
    group_advantages,
    listen,
    plain_dependency,
    plain_views,
    response,
    rows,
    trainer,
)

from vppo import analyze
from vppo.processors import placeholder_tokens
from vppo_kernels import reference

NAMES = [f.name for f in families.FAMILIES]
SIZES = ((56, 28), (30, 60))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", NAMES)
def test_two_steps(family: str, checkpointing: bool, tmp_path: Path) -> None:
    run = trainer(tmp_path, rows(4, SIZES), family=family, gradient_checkpointing=checkpointing)
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    run.train()
    for log in run.state.log_history[:2]:
        assert log["vppo/dependency_mean"] > 1e-3
        assert 0.4 <= log["vppo/kept_fraction"] < 0.7
        assert log["grad_norm"] > 0
    assert any(not torch.equal(before[name], weight) for name, weight in run.model.named_parameters())


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("family", NAMES)
def test_dependency_and_advantages(family: str, reuse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of two sizes, responses of four lengths; with `reuse`, TRL leaves hidden states of the clean view."""
    run = trainer(tmp_path, family=family, num_iterations=2 if reuse else 1, temperature=0.7)
    fix_rollouts(run)
    seen = listen(monkeypatch)
    batch = generation_batch(run, rows(2, SIZES))
    assert ("old_per_token_logps" in batch) == reuse
    truth = plain_dependency(run, batch)
    assert truth[batch["completion_mask"].bool()].max() > 1e-2
    torch.testing.assert_close(seen[0].double(), truth, rtol=1e-4, atol=1e-6)

    mask = batch["completion_mask"]
    alpha = reference.trajectory_scale(truth, mask)
    keep = reference.topk_mask(seen[0], mask, 0.4)
    assert alpha.min() == pytest.approx(0.9) and alpha.mean() == pytest.approx(1.0)
    torch.testing.assert_close(
        batch["advantages"].double(), (group_advantages(run, batch) * alpha).unsqueeze(1) * keep, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("family", NAMES)
def test_several_images_in_one_prompt(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, family=family)
    fix_rollouts(run)
    seen = listen(monkeypatch)
    batch = generation_batch(run, rows(2, SIZES, images=(2, 2)))
    assert batch["num_images"] == [2] * 8
    torch.testing.assert_close(seen[0].double(), plain_dependency(run, batch), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", NAMES)
def test_text_only_rows_keep_all_tokens(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, family=family)
    fix_rollouts(run)
    seen = listen(monkeypatch)
    batch = generation_batch(run, rows(3, SIZES, images=(1, 0, 1)))
    assert batch["num_images"] == [1] * 4 + [0] * 4 + [1] * 4
    mask, plain = batch["completion_mask"].bool(), group_advantages(run, batch)
    text, images = slice(4, 8), [0, 1, 2, 3, 8, 9, 10, 11]
    assert (plain[text] != 0).any() and not seen[0][text].any()
    torch.testing.assert_close(
        batch["advantages"][text].double(), plain[text].unsqueeze(1) * mask[text], rtol=1e-4, atol=1e-5
    )
    truth = plain_dependency(run, batch)[images]
    torch.testing.assert_close(seen[0][images].double(), truth, rtol=1e-4, atol=1e-6)
    alpha = reference.trajectory_scale(truth, mask[images])  # statistics of the rows with images alone
    expected = (plain[images] * alpha).unsqueeze(1) * reference.topk_mask(seen[0][images], mask[images], 0.4)
    torch.testing.assert_close(batch["advantages"][images].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", NAMES)
def test_nothing_of_the_perturbed_view_is_left_in_the_batch(family: str, tmp_path: Path) -> None:
    """TRL splits and shuffles only entries that it knows; a second set of pixels would be carried along unsplit."""
    batches = []
    for algorithm in ("vppo", "dapo"):
        run = trainer(tmp_path, family=family, algorithm=algorithm)
        fix_rollouts(run)
        batches.append(generation_batch(run, rows(2, SIZES)))
    shaped, plain = batches
    assert shaped.keys() == {*plain, "prompt"}
    for name, value in plain.items():
        if name != "advantages":
            assert torch.equal(torch.as_tensor(shaped[name]), torch.as_tensor(value)), name
    assert shaped["advantages"].shape == shaped["completion_ids"].shape


@pytest.mark.parametrize("family", NAMES)
def test_sharing_prompts_changes_no_number(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, advantages = listen(monkeypatch), []
    for sharing in ("on", "off"):
        run = trainer(tmp_path, family=family, prefix_sharing=sharing, scoring_memory=1e-4)
        fix_rollouts(run)
        advantages.append(generation_batch(run, rows(2, SIZES))["advantages"])
    assert seen[0].max() > 1e-2
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*advantages, rtol=1e-5, atol=1e-5)


def test_tiles_that_trl_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """InternVL, whose samples have different numbers of tiles: training and analysis score as two plain forwards do."""
    run = trainer(tmp_path, family="internvl")
    fix_rollouts(run)
    seen = listen(monkeypatch)
    batch = generation_batch(run, rows(3, ((56, 28), (28, 84), (28, 28)), images=(1, 2, 1)))
    assert batch["num_tiles"] == [3] * 4 + [8] * 4 + [1] * 4
    torch.testing.assert_close(seen[0].double(), plain_dependency(run, batch), rtol=1e-4, atol=1e-6)

    data = rows(3, ((56, 28), (28, 84), (28, 28)), images=(1, 2, 1))
    given = [{"sample": i, "response": "", "response_ids": response(i, 6)} for i in range(3)]
    found = analyze((run.model, run.processing_class), data, responses=given, seed=7).tokens
    for sample, row in enumerate(data):
        ids = {"response_ids": given[sample]["response_ids"]}
        clean, perturbed = plain_views(copy.deepcopy(run.model), run.processing_class, {**row, **ids}, (7, sample, 0))
        expected = reference.divergence(clean, perturbed, kind="kl").divergence.float().numpy()
        assert found.loc[found["sample"] == sample, "kl"].to_numpy() == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("given", [None, {"suppress_tokens": [families.VOCABULARY["7"]]}], ids=["nothing", "another"])
def test_placeholders_are_not_sampled(family: str, given: dict[str, Any] | None, tmp_path: Path) -> None:
    """A response that holds one ends the next forward: its image is missing."""
    run = trainer(tmp_path, family=family, generation_kwargs=given, max_completion_length=60, temperature=5.0, top_p=1)
    batches: list[dict[str, Any]] = []
    generate = run._generate_and_score_completions
    run._generate_and_score_completions = lambda inputs: batches.append(generate(inputs)) or batches[-1]  # type: ignore
    run.train()
    sampled = {
        token for batch in batches for token in batch["completion_ids"][batch["completion_mask"].bool()].tolist()
    }
    assert len(sampled) > 50 and not sampled & set(placeholder_tokens(run.model.config))
    assert given is None or not sampled & set(given["suppress_tokens"])
