"""The progress callback: what a terminal shows, and the lines that are kept."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from vppo.errors import InputError
from vppo.progress import TrainingProgress, keep_lines, read_lines, say

ARGS: Any = None
CONTROL: Any = None


def state(step: int, **fields: Any) -> Any:
    return SimpleNamespace(**{"global_step": step, "max_steps": 10, "is_world_process_zero": True, **fields})


def run(folder: Path, steps: range, start: int = 0, console: Console | None = None, **fields: Any) -> None:
    """A training that begins after `start` steps, logs these steps and ends."""
    progress = TrainingProgress(folder / "metrics.jsonl", console or Console(file=io.StringIO()))
    progress.on_train_begin(ARGS, state(start, **fields), CONTROL)
    for step in steps:
        logs = {"reward": step / 10, "step_time": 0.5, "vppo/seconds_scoring": 0.1}
        progress.on_log(ARGS, state(step, **fields), CONTROL, logs=logs)
    progress.on_log(ARGS, state(steps.stop, **fields), CONTROL, logs={"train_runtime": 9.0, "train_loss": 0.1})
    progress.on_train_end(ARGS, state(steps.stop, **fields), CONTROL)


def test_a_line_a_step_and_timings_apart(tmp_path: Path) -> None:
    run(tmp_path / "new", range(1, 4))
    assert read_lines(tmp_path / "new/metrics.jsonl") == [{"step": n, "reward": n / 10} for n in (1, 2, 3)]
    assert read_lines(tmp_path / "new/timings.jsonl") == [
        {"step": n, "step_time": 0.5, "vppo/seconds_scoring": 0.1} for n in (1, 2, 3)
    ]


def test_a_resumed_run_replaces_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, range(1, 8))
    straight = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "timings.jsonl")}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "rew')  # SIGKILL in the middle of a line
    run(tmp_path, range(5, 8), start=4)
    assert straight == {name: (tmp_path / name).read_bytes() for name in straight}


def test_a_run_from_the_beginning_leaves_nothing_of_the_last(tmp_path: Path) -> None:
    run(tmp_path, range(1, 8))
    run(tmp_path, range(1, 2))
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1]


def test_half_a_line_is_not_dropped_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    assert [row["step"] for row in read_lines(path, cut_short=True)] == [1, 2]
    keep_lines(path, 2)
    assert f'{path}, line 3: was cut short and is dropped: \'{{"step": 3, "rew\'' in caplog.text
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    keep_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n' and not caplog.text


@pytest.mark.parametrize(
    "broken", [b"{", b"", b"null", b'{"reward": 1}', b"\xff\xfe", b"[" * 100_000, b'{"step": "2"}']
)
def test_a_broken_line_is_named(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + broken + b'\n{"step": 3}\n')
    for reading in (read_lines, lambda file: read_lines(file, cut_short=True), lambda file: keep_lines(file, 3)):
        with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: is no step of a run: .*; remove that line"):
            reading(path)
    assert path.read_bytes().count(b"\n") == 3


def test_keep_lines_of_no_file(tmp_path: Path) -> None:
    keep_lines(tmp_path / "none.jsonl", 3)
    assert read_lines(tmp_path / "none.jsonl") == []
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    run(tmp_path, range(1, 4), is_world_process_zero=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_lines_are_json_whatever_is_logged(tmp_path: Path, value: Any) -> None:
    progress = TrainingProgress(tmp_path / "metrics.jsonl", Console(file=io.StringIO()))
    progress.on_train_begin(ARGS, state(0), CONTROL)
    progress.on_log(ARGS, state(1), CONTROL, logs={"loss": value, "grad_norm": np.float32(2.0)})
    progress.on_train_end(ARGS, state(1), CONTROL)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": None, "grad_norm": 2.0}


def test_the_bar_shows_what_is_logged(tmp_path: Path) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=160)
    progress = TrainingProgress(tmp_path / "metrics.jsonl", console)
    progress.on_train_begin(ARGS, state(0), CONTROL)
    logs = {
        "reward": 0.25,
        "rewards/accuracy_reward/mean": 0.125,
        "vppo/dependency_mean": 0.375,
        "vppo/kept_fraction": 0.4375,
    }
    progress.on_log(ARGS, state(5), CONTROL, logs=logs)
    progress.on_train_end(ARGS, state(5), CONTROL)
    last = shown.getvalue()
    for text in ("5/10", "reward 0.250", "accuracy 0.125", "dependency 0.375", "kept 0.438"):
        assert text in last, last


def test_the_bar_of_a_baseline_has_no_dependency(tmp_path: Path) -> None:
    shown = io.StringIO()
    run(tmp_path, range(1, 3), console=Console(file=shown, force_terminal=True, width=160))
    assert "reward 0.200" in shown.getvalue() and "nan" not in shown.getvalue()


@pytest.mark.parametrize("name", ["runs/[/x]", "runs/[red]", "runs/:smile:", "runs/" + 100 * "long "])
def test_a_folder_of_any_name_is_said_as_it_is(name: str) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    say(terminal, f"Report: {name}")
    assert terminal.file.getvalue() == f"Report: {name}\n"


def test_evaluations_have_a_line_and_a_bar_of_their_own(tmp_path: Path) -> None:
    shown = io.StringIO()
    progress = TrainingProgress(tmp_path / "metrics.jsonl", Console(file=shown, force_terminal=True, width=80))
    progress.on_train_begin(ARGS, state(0), CONTROL)
    progress.on_log(ARGS, state(2), CONTROL, logs={"reward": 0.25})
    for _ in range(3):
        progress.on_prediction_step(ARGS, state(2), CONTROL, eval_dataloader=range(3))
    progress._progress.refresh()
    assert "evaluating" in shown.getvalue() and "3/3" in shown.getvalue()
    logs = {"eval_reward": 0.5, "eval_vppo/dependency_mean": 1.5, "eval_runtime": 3.0, "eval_samples_per_second": 2.0}
    progress.on_log(ARGS, state(2), CONTROL, logs=logs)
    progress.on_evaluate(ARGS, state(2), CONTROL, metrics=logs)
    shown.truncate(0)
    progress.on_train_end(ARGS, state(2), CONTROL)
    last = shown.getvalue()
    assert "reward 0.250" in last and "evaluating" not in last
    assert "evaluated at step 2: reward 0.500  accuracy -  dependency 1.500" in last
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 2, "reward": 0.25},
        {"step": 2, "eval_reward": 0.5, "eval_vppo/dependency_mean": 1.5},
    ]
    assert read_lines(tmp_path / "timings.jsonl")[1] == {"step": 2, "eval_runtime": 3.0, "eval_samples_per_second": 2.0}
