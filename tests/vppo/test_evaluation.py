"""Evaluations: what they measure, over which rows, and that they leave training alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.runs import fix_rollouts, generation_batch, plain_dependency, rows, trainer, varied_reward
from test_trainer_resume import logged

from vppo import VPPOTrainer
from vppo.monitoring.evaluation import KEY, fingerprint, random_numbers

LENGTHS = (6, 3, 5, 1)


def lucky_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Draws from every generator that a reward may use."""
    return [random.random() + float(np.random.rand()) + torch.rand(()).item() for _ in completions]


def all_alike(completions: list[Any], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def by_answer(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float | None]:
    """The answer itself, and nothing for the problem whose answer is 2."""
    return [None if a == "2" else float(a) for a in answer]


def earlier_is_better(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
    """Better at the first step than at any later one."""
    luck = varied_reward(completions)
    return [reward / 10 - trainer_state.global_step for reward in luck]


def evaluated(run: VPPOTrainer) -> list[dict[str, float]]:
    """The numbers of every evaluation, timings aside."""
    clock = ("runtime", "second", "epoch", "step", "num_tokens")
    logs = [log for log in run.state.log_history if "eval_loss" in log]
    return [{name: value for name, value in log.items() if not any(word in name for word in clock)} for log in logs]


def eval_settings(**changes: Any) -> dict[str, Any]:
    return {"per_device_eval_batch_size": 4, "num_generations_eval": 2, "eval_strategy": "steps", **changes}


# -- training beside evaluations


def test_training_is_the_same_with_and_without_evaluations(tmp_path: Path) -> None:
    def run(name: str, **changes: Any) -> VPPOTrainer:
        made = trainer(tmp_path / name, rows(6), reward=lucky_reward, max_steps=3, **changes)
        made.train()
        return made

    plain = run("plain")
    beside = run("beside", eval_data=rows(3), **eval_settings(eval_steps=1, eval_on_start=True, log_completions=True))
    assert len(evaluated(beside)) == 4
    assert logged(plain) == logged(beside)
    assert logged(plain)[0]["reward"] != logged(plain)[1]["reward"]
    weights = dict(beside.model.named_parameters())
    for name, weight in plain.model.named_parameters():
        assert torch.equal(weight, weights[name]), name


def test_evaluations_of_one_model_are_equal(tmp_path: Path) -> None:
    """At every step, and beside training that draws random numbers between them."""
    settings = eval_settings(eval_steps=1, eval_on_start=True, learning_rate=0.0)
    run = trainer(tmp_path, rows(4), eval_data=rows(5, images=(1, 2, 0)), **settings)
    run.train()
    first, second, third = evaluated(run)
    assert first == second == third
    assert first["eval_vppo/dependency_mean"] > 1e-3 and first["eval_reward_std"] > 0


def test_random_numbers_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(()).item()]

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    straight = [draw(), draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = draw()
    inside = []
    for _ in range(2):
        with random_numbers(7, torch.device("cpu")):
            inside.append(draw())
    with pytest.raises(KeyError), random_numbers(7, torch.device("cpu")):
        draw()
        raise KeyError
    assert [first, draw()] == straight
    assert inside[0] == inside[1] and not set(inside[0]) & set(straight[1])


def test_a_fingerprint_is_of_the_problem_alone() -> None:
    data = rows(3, images=(1, 1, 0))
    marks = [fingerprint(row) for row in data]
    assert len(set(marks)) == 3
    assert marks == [fingerprint({**row, "answer": "other", "more": 1}) for row in rows(3, images=(1, 1, 0))]
    same_text = {**data[0], "images": data[1]["images"]}
    assert fingerprint(same_text) not in marks
    assert fingerprint({**data[0], "prompt": data[1]["prompt"]}) not in marks
    inside = [{"role": "user", "content": [{"type": "image", "image": image} for image in data[0]["images"]]}]
    assert fingerprint({"prompt": inside}) == fingerprint({"prompt": inside})
    turned = data[0]["images"][0].transpose(2)
    assert fingerprint({**data[0], "images": [turned]}) not in marks


# -- what is measured


@pytest.mark.parametrize("scope", ["prompt", "rollout"])
def test_dependency_of_an_evaluation(scope: str, tmp_path: Path) -> None:
    """Groups whose rewards are all alike too: by two plain forwards in float64."""
    data = rows(2, images=(1, 2))
    run = trainer(
        tmp_path, eval_data=data, reward=all_alike, perturbation_scope=scope, **eval_settings(eval_strategy="no")
    )
    fix_rollouts(run, LENGTHS)
    inputs = [row for row in data for _ in range(2)]
    run.model.eval()
    batch = run._generate_and_score_completions(inputs)
    assert not batch["advantages"].any()
    expected = plain_dependency(run, batch, problems=[fingerprint(row) for row in inputs])
    assert KEY > 10**9  # no training step has the same seeds
    (measured,) = run._measured
    assert measured.counts == list(LENGTHS)
    mask = batch["completion_mask"].bool()
    assert expected[mask].max() > 1e-3
    torch.testing.assert_close(measured.values.double(), expected[mask], rtol=1e-3, atol=1e-7)
    table = run._completions["eval"].table(0)
    means = (expected.sum(1) / mask.sum(1)).tolist()
    assert table["dependency"].tolist() == pytest.approx(means, rel=1e-3)
    assert table["kept_fraction"].tolist() == pytest.approx([3 / 6, 2 / 3, 2 / 5, 1 / 1])
    assert not run.model.training


def test_metrics_are_over_all_rows(tmp_path: Path) -> None:
    """Five problems in batches of two: the last batch has one, and counts once. Not scored is not zero."""
    data = rows(5, images=(1, 0))
    run = trainer(tmp_path, eval_data=data, reward=[by_answer, all_alike], reward_weights=[1.0, 0.5], **eval_settings())
    found = run.evaluate()
    table = run._completions["eval"].table(0)
    assert len(table) == 10
    assert found["eval_rewards/by_answer/mean"] == (0 + 1 + 3 + 4) / 4
    assert found["eval_rewards/by_answer/std"] == pytest.approx(np.std([0, 0, 1, 1, 3, 3, 4, 4], ddof=1))
    assert found["eval_rewards/all_alike/mean"] == 1
    assert found["eval_reward"] == pytest.approx((0 + 1 + 0 + 3 + 4) / 5 + 0.5)
    assert table["by_answer"].isna().sum() == 2
    texts = [prompt[-1]["content"][-1]["text"] for prompt in table["prompt"]]
    shown = [text in ("How much 0?", "How much 2?", "How much 4?") for text in texts]
    assert table["dependency"].notna().tolist() == shown and sum(shown) == 6
    assert found["eval_vppo/scored_fraction"] == 3 / 5
    tokens = torch.cat([part.values for part in run._measured])
    assert found["eval_vppo/dependency_mean"] == pytest.approx(tokens.mean().item(), rel=1e-5)
    ordered = tokens.sort().values
    assert found["eval_vppo/dependency_q90"] == ordered[(len(ordered) - 1) * 90 // 100].item()
    assert 0.4 <= found["eval_vppo/kept_fraction"] < 1


def test_a_baseline_is_measured_too(tmp_path: Path) -> None:
    """The same model on the same problems: the same dependency as for VPPO, and every token is kept."""
    found = {}
    for algorithm in ("vppo", "dapo"):
        run = trainer(tmp_path, eval_data=rows(2), algorithm=algorithm, **eval_settings())
        found[algorithm] = run.evaluate()
        batch = generation_batch(run, rows(1))
        assert batch["advantages"].dim() == (2 if algorithm == "vppo" else 1)
    name = "eval_vppo/dependency_mean"
    assert found["vppo"][name] == found["dapo"][name] > 1e-3
    assert found["dapo"]["eval_vppo/kept_fraction"] == 1


def test_a_baseline_without_evaluation_needs_no_image_processor(tmp_path: Path) -> None:
    run = trainer(tmp_path, algorithm="grpo")
    assert not run._measures_evaluation


def test_several_sets_have_names_of_their_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_data=rows(1), log_completions=True, reward=by_answer, **eval_settings())
    run.eval_dataset = {"few": run.eval_dataset, "more": run.eval_dataset}
    found = run.evaluate()
    assert found["eval_few_reward"] == found["eval_more_reward"] == 0 and "eval_reward" not in found
    files = {path.name for path in (tmp_path / "completions").iterdir()}
    assert files == {"eval_few_completions_00000.parquet", "eval_more_completions_00000.parquet"}


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """With the weights of its checkpoint, whose names transformers itself would not find in the model."""
    settings = eval_settings(eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=1e-2)
    run = trainer(
        tmp_path, eval_data=rows(1), reward=earlier_is_better, load_best_model_at_end=True,
        metric_for_best_model="eval_reward", **settings,
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint is not None and run.state.best_model_checkpoint.endswith("checkpoint-1")
    best, last = (type(run.model).from_pretrained(tmp_path / f"checkpoint-{step}").state_dict() for step in (1, 2))
    assert any(not torch.equal(best[name], last[name]) for name in best)
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, best[name]), name


# -- completion tables


def test_tables_of_training_and_evaluation_are_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps of one generation, an evaluation between them: TRL would list its rows as the second step's."""
    run = trainer(
        tmp_path, rows(2, images=(1, 0)), eval_data=rows(3, images=(0, 1)), per_device_train_batch_size=4,
        steps_per_generation=2, gradient_accumulation_steps=1, log_completions=True, **eval_settings(eval_steps=1),
    )  # fmt: skip
    run.train()
    folder = tmp_path / "completions"
    tables = {path.stem: pd.read_parquet(path) for path in folder.iterdir()}
    assert set(tables) == {f"{kind}completions_0000{step}" for kind in ("", "eval_") for step in (1, 2)}
    first, second = tables["completions_00001"], tables["completions_00002"]
    assert len(first) == 8
    assert first.drop(columns="step").astype(str).equals(second.drop(columns="step").astype(str))
    assert set(second["step"]) == {2}
    assert [len(tables[f"eval_completions_0000{step}"]) for step in (1, 2)] == [6, 6]
    for table in tables.values():
        images = [sum(part["type"] == "image" for part in prompt[0]["content"]) for prompt in table["prompt"]]
        scored = table["dependency"].notna()
        assert not (scored & (np.array(images) == 0)).any() and scored.any() and not scored.all()
        assert (table["dependency"][scored] > 0).all()
        assert (table["kept_fraction"].notna() == scored).all()
    assert (first["alpha"].notna() == first["dependency"].notna()).all()
    assert "alpha" not in tables["eval_completions_00001"]
    shown = capsys.readouterr().out
    assert shown.count("Step 1 ") == 1 and "Step 1, eval" in shown and shown.count("Step 2 ") == 1


def test_completions_gathered_over_generations(tmp_path: Path) -> None:
    """A table is of the last generation, and has as many rows."""
    run = trainer(tmp_path, rows(4), log_completions=True, max_steps=3, logging_steps=3)
    run.train()
    (path,) = (tmp_path / "completions").iterdir()
    table = pd.read_parquet(path)
    assert path.name == "completions_00003.parquet" and len(table) == 4
    assert len({str(prompt) for prompt in table["prompt"]}) == 1
