"""A small study from the command line to its page, stopped and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vppo.demo.model import build_model, build_processor
from vppo.demo.run import save_whole
from vppo.errors import InputError
from vppo.study.one_run import WIDTH, kept_share
from vppo.study.options import StudyOptions
from vppo.study.run import run_study
from vppo.study.task import GUESS, LOOK, WORDS

WARM = {
    "steps": 400,
    "learned": True,
    "read_loss": 0.05,
    "computed_loss": 0.06,
    "sampled": 0.1,
    "reads": 0.3,
    "adds": 0.3,
    "greedy": 0.2,
}


def warmed(out: Path, seeds: int) -> Path:
    """A folder with warm policies that have learned nothing, in place of a minute for each."""
    processor = build_processor([*WORDS, LOOK, GUESS])
    for seed in range(seeds):
        folder = StudyOptions(out, ("dapo",)).warm_folder(seed)
        save_whole(folder, build_model(processor, seed, WIDTH), processor, {"seed": seed, "seconds": 60.0, **WARM})
    return out


def small(out: Path, **given: Any) -> StudyOptions:
    options = StudyOptions(out, **{"arms": ("dapo", "tgf"), "seeds": 2, "steps": 2, "held_out": 4, **given})
    (out / "options.json").write_text(json.dumps(options.identity))
    return options


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = warmed(tmp_path_factory.mktemp("study"), 2)
    return out, run_study(small(out))


def test_two_arms_and_two_seeds(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    assert json.loads((out / "study.json").read_text()) == summary
    assert [(run["arm"], run["seed"]) for run in summary["runs"]] == [
        ("dapo", 0), ("tgf", 0), ("dapo", 1), ("tgf", 1)
    ]  # fmt: skip
    for run in summary["runs"]:
        assert len(run["rewards"]) == 2 and 0 <= run["sampled"] <= 1 and run["drift"] >= 0
        products = run["products"]
        assert products["tokens"] >= products["active"] >= 0
        # no rollout of an untrained policy is right: there is no signal, and nothing but the forward is multiplied
        assert products["backward"] == 3 * products["active"]
    assert summary["arms"]["tgf"]["sampled_difference"]["mean"] == 0
    assert {"machine", "versions", "date", "command"} <= summary.keys()


def test_steps_without_a_signal_say_nothing_of_what_was_kept() -> None:
    """No token of theirs was scored, so none was kept for all that."""
    assert kept_share([{"vppo/kept_fraction": 0.05}, {"reward": 1.0}, {"vppo/kept_fraction": 0.07}]) == pytest.approx(
        0.06
    )
    assert kept_share([{"reward": 0.5}]) == 1.0  # DAPO filters nothing


def test_the_task_in_which_one_may_guess(tmp_path: Path) -> None:
    out = warmed(tmp_path / "guess", 1)
    summary = run_study(small(out, arms=("dapo",), seeds=1, steps=1, task="guess"))
    assert 0 <= summary["arms"]["dapo"]["guess_rate"]["mean"] <= 1
    assert "guesses" in (out / "results.md").read_text()


def test_a_finished_study_does_nothing_anew(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    times = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    again = run_study(small(out))
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == times
    assert again["runs"] == summary["runs"]


def test_other_options_are_refused(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    for given, message in (
        ({"steps": 3}, "--steps: got 3, but the study in .* was begun with 2"),
        ({"held_out": 5}, "--held-out: got 5"),
        ({"task": "guess"}, "--task: got 'guess'"),
    ):
        options = StudyOptions(out, ("dapo",), **{"steps": 2, "held_out": 4, **given})  # type: ignore[arg-type]
        with pytest.raises(InputError, match=message):
            run_study(options)


def test_policies_of_another_warm_up_are_not_mixed_in(finished: tuple[Path, dict[str, Any]]) -> None:
    """A folder of an earlier version, whose warm-ups stopped elsewhere or did not record where."""
    out, _ = finished
    marker = out / "options.json"
    whole = marker.read_text()
    try:
        for earlier, got in (({"warm_target": 0.06}, "the warm_target 0.06"), ({"warm_target": None}, "a warm_target")):
            known = {name: value for name, value in {**json.loads(whole), **earlier}.items() if value is not None}
            marker.write_text(json.dumps(known))
            with pytest.raises(
                InputError, match=rf"--out: .*by another version, with {got}.*; this one has 0\.01: choose"
            ):
                run_study(StudyOptions(out, ("dapo",), steps=2, held_out=4))
    finally:
        marker.write_text(whole)


def test_a_broken_run_is_named(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    file = out / "runs" / "tgf-1.json"
    whole = file.read_text()
    try:
        for broken in ("{", "{}"):
            file.write_text(broken)
            with pytest.raises(InputError, match=r"tgf-1\.json: is no .*; remove .* and the same command"):
                run_study(small(out))
    finally:
        file.write_text(whole)


def test_a_broken_warm_policy_is_named(tmp_path: Path) -> None:
    out = warmed(tmp_path, 1)
    (out / "warm" / "seed-0" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"seed-0.*remove .*seed-0, and the same command"):
        run_study(small(out, arms=("dapo",), seeds=1))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text(json.dumps({"algorithm": "vppo", "steps": 1, "seed": 0}))
    with pytest.raises(InputError, match="no run of `vppo study`"):
        run_study(StudyOptions(tmp_path, ("dapo",)))


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_killed_it_goes_on_with_what_is_there(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = warmed(tmp_path / "study", 2)
    options = small(out)
    command = [sys.executable, "-m", "vppo", "study", "--out", str(out), "--arms", "dapo,tgf", "--seeds", "2"]
    command += ["--steps", "2", "--held-out", "4", "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    first = options.run_file("dapo", 0)
    wait(lambda: first.exists() or process.poll() is not None)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait(lambda: all(map(gone, workers)))  # nothing computes on
    written = {path.name: path.stat().st_mtime_ns for path in first.parent.glob("*.json")}
    assert 1 <= len(written) < 4
    summary = run_study(options)
    assert all((first.parent / name).stat().st_mtime_ns == stamp for name, stamp in written.items())
    assert [timeless(run) for run in summary["runs"]] == [timeless(run) for run in finished[1]["runs"]]


def timeless(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "seconds"}


def test_bad_options_of_the_command_are_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vppo", "study", "--out", str(tmp_path / "new"), "--arms", "dapo,ppo"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert "--arms: got ppo, takes some of dapo,tgf" in found.stderr
    assert not (tmp_path / "new").exists()
