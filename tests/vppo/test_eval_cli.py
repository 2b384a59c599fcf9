"""`vppo eval` from the command line: what its options arrive as, and what is said where something is missing."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vppo import eval_cli
from vppo.cli import main

runner = CliRunner()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Stands in for the evaluation, and lists what it was asked."""
    found: list[tuple[str, Any]] = []
    stand_in = types.ModuleType("vppo.evaluation.run")
    vars(stand_in).update(
        evaluate=lambda **given: found.append(("evaluate", given)),
        regrade=lambda *given: found.append(("regrade", given)),
    )
    monkeypatch.setitem(sys.modules, "vppo.evaluation.run", stand_in)
    other = types.ModuleType("vppo.evaluation.comparison")
    vars(other).update(compare_evaluations=lambda *given: found.append(("compare", given)))
    monkeypatch.setitem(sys.modules, "vppo.evaluation.comparison", other)
    return found


def test_what_is_not_given_is_left_to_the_protocol(calls: list[tuple[str, Any]]) -> None:
    assert runner.invoke(main, ["eval", "--model", "m", "--out", "o", "--protocol", "papo"]).exit_code == 0
    ((_, given),) = calls
    assert given["benchmarks"] is None and given["data"] == [] and given["protocol"] == "papo"
    assert not {"samples", "temperature", "top_k", "min_pixels", "graders", "instruction"} & set(given)


def test_options_arrive(calls: list[tuple[str, Any]]) -> None:
    words = "--model m --out o --benchmarks geo3k,mmk12 --data a.jsonl --data b --samples 4 --top-k 7 --min-pixels 0 "
    words += (
        "--max-pixels 99 --graders mathruler,math-verify --blind removed --processes 2 --tensor-parallel 4 --limit 9"
    )
    assert runner.invoke(main, ["eval", *words.split(), "--instruction", ""]).exit_code == 0
    ((_, given),) = calls
    expected = {
        "model": "m", "out": Path("o"), "benchmarks": ["geo3k", "mmk12"], "data": ["a.jsonl", "b"], "samples": 4,
        "top_k": 7, "min_pixels": None, "max_pixels": 99, "graders": ("mathruler", "math-verify"), "blind": "removed",
        "processes": 2, "tensor_parallel": 4, "limit": 9, "instruction": "", "judge": "none",
    }  # fmt: skip
    assert {name: given[name] for name in expected} == expected


def test_every_option_is_one_of_the_evaluation(calls: list[tuple[str, Any]]) -> None:
    from vppo.evaluation.options import EvaluationOptions

    runner.invoke(main, ["eval", "--model", "m", "--out", "o"])
    ((_, given),) = calls
    own = {"model", "out", "benchmarks", "data"}
    assert set(given) | set(eval_cli._PRESET) == own | set(EvaluationOptions.__dataclass_fields__)


def test_what_is_missing_is_named(calls: list[tuple[str, Any]]) -> None:
    shown = runner.invoke(main, ["eval"])
    assert shown.exit_code == 2 and "--model and --out missing" in shown.output
    shown = runner.invoke(main, ["eval", "--model", "m"])
    assert shown.exit_code == 2 and "eval: --out missing" in shown.output
    assert runner.invoke(main, ["eval", "compare", "a"]).exit_code == 2 and calls == []


def test_the_other_commands(calls: list[tuple[str, Any]]) -> None:
    assert runner.invoke(main, ["eval", "compare", "a", "b", "--out", "c"]).exit_code == 0
    assert runner.invoke(main, ["eval", "grade", "a", "--graders", "mathruler"]).exit_code == 0
    assert runner.invoke(main, ["eval", "grade", "a"]).exit_code == 0
    assert calls == [
        ("compare", (Path("a"), Path("b"), Path("c"))),
        ("regrade", (Path("a"), ["mathruler"])),
        ("regrade", (Path("a"), None)),
    ]


def test_every_option_is_explained() -> None:
    shown = runner.invoke(main, ["eval", "--help"], terminal_width=200).output
    options = [part for part in shown.split("\n  --")[1:]]
    assert len(options) > 30
    for option in options:
        assert len(option.split()) > 4, option
