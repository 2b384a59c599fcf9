"""`vppo train` with an evaluation set: what a config says, what it leaves open, and one real run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from test_train import config_file, metrics, run_tiny, tiny_run, weights  # noqa: F401  fixtures among them

from vppo.errors import InputError
from vppo.monitoring.evaluation_options import evaluation_defaults
from vppo.train_config import load_config, make_arguments

Write = Callable[..., Path]


def when(args: Any) -> tuple[str, float | None, bool, int]:
    strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
    return strategy, args.eval_steps, args.eval_on_start, args.per_device_eval_batch_size


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", ("steps", 0.1, True, 8)),
        ("eval_strategy: steps", ("steps", 0.1, False, 8)),
        ("eval_steps: 25", ("steps", 25, False, 8)),
        ("eval_strategy: steps\neval_steps: 25\neval_on_start: true", ("steps", 25, True, 8)),
        ("eval_strategy: epoch", ("epoch", None, False, 8)),
        ("eval_on_start: false", ("steps", 0.1, False, 8)),
        ("num_generations: 6\nper_device_train_batch_size: 6", ("steps", 0.1, True, 12)),
        ("num_generations_eval: 1", ("steps", 0.1, True, 8)),
        ("num_generations_eval: 16", ("steps", 0.1, True, 16)),
        ("per_device_eval_batch_size: 24", ("steps", 0.1, True, 24)),
        ("eval_strategy: no", ("no", None, False, 8)),
        ("eval_strategy: 'no'", ("no", None, False, 8)),
    ],
)
def test_when_is_evaluated(config_file: Write, lines: str, expected: tuple[Any, ...]) -> None:  # noqa: F811
    config = load_config(config_file(f"eval_dataset: some/data\n{lines}\n"))
    script, _, args = make_arguments(config)
    assert when(args) == expected
    assert script.eval_dataset == "some/data" and script.eval_dataset_split == "test"


def test_nothing_is_evaluated_without_a_set(config_file: Write) -> None:  # noqa: F811
    assert when(make_arguments(load_config(config_file()))[2])[0] == "no"
    assert evaluation_defaults({"eval_dataset": None, "eval_strategy": "no"}) == {}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("eval_strategy: steps", "eval_strategy: got 'steps'"),
        ("eval_strategy: epoch", "eval_strategy: got 'epoch'"),
        ("eval_steps: 10", "eval_steps: got 10"),
        ("eval_on_start: true", "eval_on_start: got True"),
        ("do_eval: true", "do_eval: got True"),
    ],
)
def test_an_evaluation_without_a_set_is_refused(config_file: Write, line: str, named: str) -> None:  # noqa: F811
    with pytest.raises(InputError) as caught:
        make_arguments(load_config(config_file(line)))
    assert str(caught.value) == (
        f"config: {named} without eval_dataset; give eval_dataset: a file, a folder or a dataset on the hub"
    )


@pytest.mark.parametrize("key", ["eval_strategy", "save_strategy", "logging_strategy"])
def test_yaml_takes_no_for_false(config_file: Write, key: str) -> None:  # noqa: F811
    assert load_config(config_file(f"{key}: no\n"))[key] == "no"
    assert load_config(config_file(), [f"--{key}", "no"])[key] == "no"
    with pytest.raises(InputError, match=f"{key}: got True"):
        load_config(config_file(f"{key}: yes\n"))


# -- real runs


@pytest.fixture
def folder(tiny_run: Path) -> Path:  # noqa: F811
    """The tiny run's, with a folder of evaluation data: three problems, one of them without picture."""
    (tiny_run / "held").mkdir(exist_ok=True)
    for name in ("1.png", "6.png"):
        shutil.copy(tiny_run / name, tiny_run / "held")
    rows = [
        '{"problem": "1+1?", "answer": "2", "images": ["1.png"]}',
        '{"problem": "4+1?", "answer": "5", "images": []}',
        '{"problem": "6+1?", "answer": "7", "images": ["6.png"]}',
    ]
    (tiny_run / "held" / "test-0.jsonl").write_text("\n".join(rows) + "\n")
    (tiny_run / "held" / "train-0.jsonl").write_text('{"problem": "", "answer": "", "images": []}\n')
    return tiny_run


def test_a_run_with_evaluations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step and after every tenth of the run, which is every step of two; with several rewards."""
    run = run_tiny(
        folder, monkeypatch, "--output_dir=evaluated", "--eval_dataset=held", "--log_completions",
        "--reward=[letters_reward:letters, format, accuracy]", "--reward_weights=[1.0, 0.5, 2.0]", "--save_steps=1",
    )  # fmt: skip
    lines = metrics(run)
    assert [(line["step"], "eval_reward" in line) for line in lines] == [
        (0, True), (1, False), (1, True), (2, False), (2, True),
    ]  # fmt: skip
    held = [line for line in lines if "eval_reward" in line]
    assert all(line["eval_vppo/dependency_mean"] > 0 for line in held)
    assert all(line["eval_vppo/scored_fraction"] == pytest.approx(2 / 3) for line in held)
    names = {f"eval_rewards/{name}/mean" for name in ("letters", "format_reward", "accuracy_reward")}
    assert names <= held[0].keys() and not any("runtime" in name or "second" in name for name in held[0])
    table = pd.read_parquet(run / "completions" / "eval_completions_00002.parquet")
    assert len(table) == 3 * 4 and table["dependency"].isna().sum() == 4
    weighted = table["letters"] + 0.5 * table["format_reward"] + 2 * table["accuracy_reward"]
    assert held[-1]["eval_reward"] == pytest.approx(weighted.mean(), rel=1e-6)
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["eval_dataset"] == "held" and resolved["reward"][0] == f"{folder}/letters_reward.py:letters"
    assert when(make_arguments(load_config(run / "config.yaml"))[2]) == ("steps", 0.1, True, 8)

    # from its first checkpoint on, all comes out the same; there is no second evaluation before the first step
    whole, after = (run / "metrics.jsonl").read_bytes(), weights(run / "model")
    for path in sorted((run / "checkpoint-2").iterdir()):
        path.unlink()
    again = run_tiny(
        folder, monkeypatch, "--output_dir=evaluated", "--eval_dataset=held", "--log_completions", "--resume",
        "--reward=[letters_reward:letters, format, accuracy]", "--reward_weights=[1.0, 0.5, 2.0]", "--save_steps=1",
    )  # fmt: skip
    assert (again / "metrics.jsonl").read_bytes() == whole
    assert all((weight == after[name]).all() for name, weight in weights(again / "model").items())


def test_evaluation_data_is_checked_before_any_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "broken.jsonl").write_text('{"problem": "1+1?", "answer": "2", "images": ["no.png"]}\n')
    with pytest.raises(InputError, match=r"broken.jsonl, row 1, column 'images': cannot read .*no.png"):
        run_tiny(folder, monkeypatch, "--output_dir=refused", "--eval_dataset=broken.jsonl")
    with pytest.raises(InputError, match=r"train-0.jsonl, row 1"):
        run_tiny(folder, monkeypatch, "--output_dir=refused", "--eval_dataset=held", "--eval_dataset_split=train")
    assert not Path("refused", "config.yaml").exists()


def test_the_best_model_needs_a_set_to_be_chosen_by(config_file: Write) -> None:  # noqa: F811
    with pytest.raises(InputError, match="load_best_model_at_end: got true without eval_dataset"):
        make_arguments(load_config(config_file("load_best_model_at_end: true")))
