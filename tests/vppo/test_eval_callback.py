"""Benchmarks while a model trains: when, with which numbers, and without a trace in the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import families
from support.datafiles import picture
from support.runs import FAMILY, rows, trainer

from vppo.data import DataOptions
from vppo.errors import InputError
from vppo.evaluation.benchmarks import Benchmark, load_benchmarks
from vppo.evaluation.callback import BenchmarkCallback
from vppo.train import load_config, train

OPTIONS = DataOptions(system_prompt="", instruction="")


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    picture(folder / "a.png", size=(56, 28))
    lines = [{"problem": f"{i}?", "answer": str(i), "images": ["a.png"][: i % 3]} for i in range(6)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "sums.jsonl"


def trained(path: Path, benchmarks: list[Benchmark]) -> tuple[Any, list[torch.Tensor]]:
    run = trainer(path, rows(4), max_steps=3, logging_steps=1)
    if benchmarks:
        run.add_callback(BenchmarkCallback(run, benchmarks, steps=2, limit=4, samples=2))
    run.train()
    return run, [parameter.detach().clone() for parameter in run.model.parameters()]


def test_when_and_what(sums: Path, tmp_path: Path) -> None:
    run, with_benchmarks = trained(tmp_path / "a", load_benchmarks([], [sums], OPTIONS))
    logged = [row for row in run.state.log_history if "eval_benchmarks/accuracy" in row]
    assert [row["step"] for row in logged] == [0, 2, 3]  # before, every two steps, and at the end
    for row in logged:
        assert set(row) - {"step", "epoch"} == {
            "eval_benchmarks/accuracy", "eval_benchmarks/sums/accuracy", "eval_benchmarks/sums/tokens",
            "eval_benchmarks/sums/no_box",
        }  # fmt: skip
        assert row["eval_benchmarks/sums/no_box"] == 1.0 and 1 <= row["eval_benchmarks/sums/tokens"] <= 6
    _, without = trained(tmp_path / "b", [])
    assert all(torch.equal(a, b) for a, b in zip(with_benchmarks, without, strict=True))
    assert run.model.training


def test_right_answers_count(sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is made to write the answer to every second question."""
    run = trainer(tmp_path / "run", rows(4))
    callback = BenchmarkCallback(run, load_benchmarks([], [sums], OPTIONS), limit=6)
    write = [families.VOCABULARY[c] for c in r"\boxed{2}"]

    def sampler(model: Any) -> Any:
        assert not model.training
        return lambda prompts, places, keys, sampling: [write if key[0] < 3 else write[:-1] for key in keys]

    monkeypatch.setattr("vppo.evaluation.callback.with_transformers", sampler)
    callback.on_step_end(run.args, type("State", (), {"global_step": 50})(), run.control)  # type: ignore[arg-type]
    (logged,) = run.state.log_history
    assert logged["eval_benchmarks/sums/accuracy"] == pytest.approx(1 / 6)  # of 0, 1 and 2 the last
    assert logged["eval_benchmarks/sums/no_box"] == 0.5


def test_in_a_config(sums: Path, tmp_path: Path) -> None:
    built, processor = families.build(FAMILY)
    built.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    lines = {
        "model": str(tmp_path / "model"), "dataset": str(sums), "output_dir": str(tmp_path / "run"), "max_steps": 2,
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4, "use_cpu": True,
        "save_strategy": "no", "report_to": "none", "learning_rate": 1e-4, "gradient_checkpointing": False,
        "eval_benchmarks": [str(sums)], "eval_benchmarks_steps": 1, "eval_benchmarks_limit": 2,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(lines))
    run = train(load_config(tmp_path / "config.yaml"))
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found if "eval_benchmarks/sums/accuracy" in row] == [0, 1, 2]
    with pytest.raises(InputError, match=r"eval_benchmarks: got 'geo3k'.*takes a list"):
        load_config(tmp_path / "config.yaml", ["--eval_benchmarks=geo3k"])


def test_what_cannot_be_evaluated_while_it_trains(sums: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", rows(4))
    sets = load_benchmarks([], [sums], OPTIONS)
    with pytest.raises(InputError, match="eval_benchmarks_limit: got 0, takes a whole number from 1"):
        BenchmarkCallback(run, sets, limit=0)
    for plugin in ({"fsdp_plugin": object(), "deepspeed_plugin": None},
                   {"fsdp_plugin": None, "deepspeed_plugin": type("Plugin", (), {"zero_stage": 3})}):  # fmt: skip
        state = type("State", (), plugin)
        sharded = type("Trainer", (), {"accelerator": type("Accelerator", (), {"state": state})})
        with pytest.raises(InputError, match="takes a model that is whole in each process"):
            BenchmarkCallback(sharded, sets)
