"""The first hour on a GPU, rehearsed on a CPU at sizes of seconds: nothing in it may fail for a reason of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import first_hour


@pytest.mark.parametrize("name", ["ceilings", "tiles", "fused", "profile", "memory_checker"])
def test_a_step_writes_its_json(tmp_path: Path, name: str) -> None:
    done = CliRunner().invoke(first_hour.app, ["step", name, "--device", "cpu", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"machine", "versions"} < found.keys()
    if name == "ceilings":
        assert found["copy_bytes_per_second"] > 0 and all(line["teraflops"] > 0 for line in found["products"])
    if name == "fused":
        assert {"native", "triton_fused"} & {line["backend"] for line in found["sweeps"]}
        assert all(line["seconds"] > 0 and line["off"] < 1 for line in found["sweeps"])
    if name == "tiles":
        calls = {line["call"] for line in found["tiles"]}
        assert "product" in calls and all(line["seconds"] > 0 for line in found["tiles"])


def test_a_step_that_is_none() -> None:
    done = CliRunner().invoke(first_hour.app, ["step", "tile"])
    assert done.exit_code == 2 and "takes one of" in done.output


def test_what_fails_or_lasts_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(device: str, out: Path) -> list[tuple[str, list[str], float]]:
        def python(code: str) -> list[str]:
            return [sys.executable, "-c", code]

        return [
            ("right", python("pass"), 60),
            ("wrong", python("raise SystemExit(3)"), 60),
            ("long", python("import time; time.sleep(60)"), 0.5),
            ("last", python("pass"), 60),
        ]

    monkeypatch.setattr(first_hour, "steps", steps)
    arguments: list[Any] = ["run", "--device", "cpu", "--out", str(tmp_path)]
    done = CliRunner().invoke(first_hour.app, arguments)
    stored = json.loads((tmp_path / "steps.json").read_text())
    assert done.exit_code == 1
    assert [step["status"] for step in stored] == ["ok", "exit status 3", "stopped after 0 s", "ok"]
    done = CliRunner().invoke(first_hour.app, [*arguments, "--minutes", "0"])
    assert {step["status"] for step in json.loads((tmp_path / "steps.json").read_text())} == {"out of time"}


def test_the_order_and_the_time_of_a_gpu(tmp_path: Path) -> None:
    listed = first_hour.steps("cuda", tmp_path)
    names = [name for name, _, _ in listed]
    assert names[:4] == ["ceilings", "tests", "tiles", "fused"] and all(name.startswith("peers") for name in names[-3:])
    for _, command, _ in listed:
        if "benchmarks" in command and "run" in command:
            assert "--time-wrong" in command
