"""The command line end to end at a size of seconds, and the gate in front of every timing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vppo.cli
from benchmarks.cli import app
from benchmarks.contest import Case, Contestant, Verdict
from benchmarks.harness import run_case
from benchmarks.report import Result
from benchmarks.suites import load_suite, suite_names

CPU = torch.device("cpu")
runner = CliRunner()


def invoke(*arguments: str, code: int = 0) -> str:
    done = runner.invoke(app, list(arguments), terminal_width=200)
    assert done.exit_code == code, done.output
    return done.output


def test_list_names_suites_peers_and_presets() -> None:
    shown = invoke("list")
    assert all(name in shown for name in (*suite_names(), "trl", "liger", "plain", "7b", "152,064 x 3,584"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of the divergence suite."""
    folder = tmp_path_factory.mktemp("results")
    shown = invoke(
        "run", "divergence", "--preset", "tiny", "--rows", "16", "--peers", "plain,trl,liger", "--seconds", "0.1",
        "--out", str(folder),
    )  # fmt: skip
    assert all(name in shown for name in ("floor", "ours: torch", "x floor", "MiB", "skipped"))
    (path,) = folder.glob("*.json")
    return path


def test_a_result_tells_everything(stored: Path) -> None:
    result = json.loads(stored.read_text())
    assert {"suite", "device", "date", "command", "machine", "versions", "cases"} <= result.keys()
    assert {"cpu", "cores", "threads", "device"} <= result["machine"].keys()
    assert {"python", "torch", "trl", "vppo-kernels", "commit"} <= result["versions"].keys()
    assert [case["labels"]["backward"] for case in result["cases"]] == [False, True]
    for case in result["cases"]:
        records = {record["name"]: record for record in case["records"]}
        assert records["liger"]["status"] == "skipped" and "GPU" in records["liger"]["reason"]
        for name in ("floor", "plain", "trl", "ours: torch"):
            assert records[name]["status"] == "timed" and len(records[name]["seconds"]) >= 3
            assert min(records[name]["seconds"]) > 0
        assert records["ours: torch"]["error"] < 1 < records["plain"]["error"]
        assert records["ours: torch"]["workspace"] > 0
    assert stored.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_compare_and_plot(stored: Path) -> None:
    assert "ours: torch" in invoke("compare", str(stored), str(stored))
    picture = stored.with_suffix(".png")
    picture.unlink()
    invoke("plot", str(stored))
    assert picture.exists()
    loaded = Result.load(stored)
    assert loaded.suite == "divergence" and len(loaded.cases) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "speed"), "SUITE: got 'speed', takes one of"),
        (("run", "divergence", "--preset", "70b"), "--preset: got '70b'"),
        (("run", "divergence", "--peers", "them"), "--peers: got 'them'"),
        (("plot", "/nowhere.json"), "nowhere.json"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments: tuple[str, ...], words: str) -> None:
    assert words in invoke(*arguments, code=2)


def contest(*contestants: tuple[str, Any, Verdict]) -> dict[str, Any]:
    """Records by name of contestants given as (name, what prepares them, verdict)."""
    verdicts = {name: verdict for name, _, verdict in contestants}
    case = Case(
        {},
        [Contestant(name, "ours", prepare) for name, prepare, _ in contestants],
        lambda contestant, call: (call(), verdicts[contestant.name])[1],
    )
    return {record.name: record for record in run_case(case, CPU, 0.0)}


def test_what_is_wrong_is_not_timed_and_what_raises_is_skipped() -> None:
    calls: list[str] = []

    def breaks() -> Any:
        raise MemoryError("too large\nfor this machine")

    records = contest(
        ("right", lambda: lambda: calls.append("right"), Verdict(True, 0.5)),
        ("wrong", lambda: lambda: calls.append("wrong"), Verdict(False, 7.0, reason="error 7 x the bound")),
        ("breaks", breaks, Verdict(True)),
        ("breaks when called", lambda: breaks, Verdict(True)),
    )
    assert records["right"].status == "timed" and len(records["right"].seconds) == 3
    assert records["wrong"].status == "wrong" and not records["wrong"].seconds and calls.count("wrong") == 1
    for name in ("breaks", "breaks when called"):
        assert records[name].status == "skipped" and records[name].reason == "MemoryError: too large"


def test_our_own_gate_catches_one_bad_row() -> None:
    from benchmarks.gate import judge_divergence

    truth = torch.logspace(-4, 0, 20, dtype=torch.float64)
    assert judge_divergence("ours", truth.float(), truth)[1] == ""
    spoiled = truth.float()
    spoiled[3] *= 1.01
    multiple, reason = judge_divergence("ours", spoiled, truth)
    assert multiple > 1 and "the bound" in reason
    assert judge_divergence("peer", spoiled, truth)[1] == "", "peers have not promised it"
    assert judge_divergence("peer", 2 * truth.float(), truth)[1]
    assert "negative" in judge_divergence("ours", truth.float() - 1.0, truth)[1]


def test_vppo_bench_is_the_same_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # the benchmarks are found from anywhere
    assert runner.invoke(vppo.cli.main, ["bench", "--help"]).exit_code == 0
    assert "compare" in capfd.readouterr().out
    assert runner.invoke(vppo.cli.main, ["bench", "plot", "nowhere.json"]).exit_code == 2
    assert "nowhere.json" in capfd.readouterr().err
    monkeypatch.setattr(vppo.cli, "__file__", "/elsewhere/vppo/cli.py")
    missing = runner.invoke(vppo.cli.main, ["bench", "list"])
    assert missing.exit_code == 2 and "checkout" in missing.output


def test_every_suite_has_sizes_for_a_cpu() -> None:
    for name in suite_names():
        suite = load_suite(name)
        assert suite.name == name and suite.presets(CPU) and suite.modes
        assert all(suite.rows(preset, CPU) for preset in ("tiny", *suite.presets(CPU)))
