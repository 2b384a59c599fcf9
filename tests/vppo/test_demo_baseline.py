"""What a run of the demo is set beside: the stored runs of DAPO, and how they are stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.demo_baseline import baseline_of
from vppo.demo.baseline import Baseline, beside, dump, load
from vppo.demo.run import DemoOptions


def finished(folder: Path, seed: int, rewards: list[float], algorithm: str = "dapo") -> Path:
    """A folder with what a finished run leaves."""
    folder.mkdir()
    summary = {
        "algorithm": algorithm,
        "seed": seed,
        "accuracy_after": 0.5 + seed / 10,
        "machine": "x86_64",
        "versions": {"torch": "2.13.0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [json.dumps({"step": step + 1, "reward": reward}) for step, reward in enumerate(rewards)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_the_stored_runs_are_whole() -> None:
    stored = load()
    assert len(stored.seeds) == len(set(stored.seeds)) == len(stored.accuracy) == len(stored.rewards) >= 3
    assert all(len(rewards) == DemoOptions(Path()).steps for rewards in stored.rewards)
    assert all(0 <= value <= 1 for row in (stored.accuracy, *stored.rewards) for value in row)
    assert "torch" in stored.about


def test_runs_of_dapo_or_of_another_length_stand_alone() -> None:
    steps = load().steps
    assert beside("vppo", steps) == load()
    assert beside("dapo", steps) is None
    assert beside("vppo", steps - 1) is None


def test_runs_are_read_from_their_folders(tmp_path: Path) -> None:
    folders = [finished(tmp_path / str(seed), seed, [0.25, 0.5 + seed / 4]) for seed in (0, 1)]
    found = baseline_of(folders)
    assert (found.seeds, found.accuracy, found.rewards) == ([0, 1], [0.5, 0.6], [[0.25, 0.5], [0.25, 0.75]])
    assert "x86_64" in found.about and "torch 2.13.0" in found.about
    (tmp_path / "stored.json").write_text(dump(found))
    assert load(tmp_path / "stored.json") == found
    assert isinstance(found, Baseline)


@pytest.mark.parametrize("algorithm, rewards", [("vppo", [0.25, 0.5]), ("dapo", [0.25])])
def test_other_runs_are_refused(tmp_path: Path, algorithm: str, rewards: list[float]) -> None:
    folders = [finished(tmp_path / "0", 0, [0.25, 0.5]), finished(tmp_path / "1", 1, rewards, algorithm)]
    with pytest.raises(ValueError, match=rf"1: got {len(rewards)} steps of {algorithm}, takes 2 of dapo"):
        baseline_of(folders)
