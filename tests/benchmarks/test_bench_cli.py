"""The command line from end to end, on a head small enough for a test."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import benchmarks.inputs
from benchmarks import cli
from vppo.cli import main as vppo

runner = CliRunner()
RUN = ["run", "divergence", "--preset", "small", "--rows", "5", "9", "--peers", "plain", "--seconds", "0"]


@pytest.fixture(autouse=True, scope="module")
def small_head() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmarks.inputs.PRESETS, "small", benchmarks.inputs.Shape(1024, 64))
        yield


def call(*arguments: str, program: str = cli.PROGRAM) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments), program)
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run."""
    folder, shown = tmp_path_factory.mktemp("results"), StringIO()
    with redirect_stdout(shown):
        assert call(*RUN, "--out", str(folder)) == 0
    (path,) = folder.glob("*.json")
    printed = shown.getvalue()
    assert "small, 5 rows, forward + backward" in printed and "small, 9 rows, forward" in printed
    assert "plain: holds all logits" in printed and "ours: torch" in printed
    return path


def test_run_stores_all_that_it_promises(stored: Path) -> None:
    assert stored.name.startswith("divergence-cpu-small-20")
    assert stored.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result: dict[str, Any] = json.loads(stored.read_text())
    assert result["command"] == f"{cli.PROGRAM} {' '.join(RUN)} --out {stored.parent}"
    assert set(result["machine"]) == {"cpu", "cores", "threads", "device"} and all(result["machine"].values())
    assert {"python", "torch", "triton", "trl", "liger", "vppo-kernels", "commit"} <= set(result["versions"])
    assert result["date"].endswith("+00:00")
    assert [(c["labels"]["rows"], c["labels"]["backward"]) for c in result["cases"]] == [
        (5, False),
        (5, True),
        (9, False),
        (9, True),
    ]
    for case in result["cases"]:
        assert [record["name"] for record in case["records"]] == ["floor", "plain", "ours: torch"]
        for record in case["records"]:
            assert record["status"] == "timed" and len(record["seconds"]) == 3
            assert record["min_seconds"] <= record["median_seconds"] and record["over_floor"] > 0
            assert record["workspace"] > 0
            assert (record["error"] is None) == (record["role"] == "floor")
            judged = case["labels"]["backward"] and record["role"] != "floor"
            assert (record["gradient_error"] is not None) == judged


def test_compare_and_plot(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copy(stored, tmp_path / "other.json"))
    assert call("compare", str(stored), str(other)) == 0
    shown = capsys.readouterr().out
    assert shown.count("1.000") == 12 and "small, 9 rows, forward" in shown
    assert call("plot", str(other)) == 0
    assert other.with_suffix(".png").read_bytes() == stored.with_suffix(".png").read_bytes()


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("divergence", "plain", "compiled", "trl", "liger", "32b", "152,064 x 5,120"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "speed"], "SUITE: got 'speed', takes one of ['divergence'"),
        (["run", "divergence", "--preset", "70b"], "--preset: got '70b', takes one of ['tiny'"),
        (["run", "divergence", "--peers", "plain,numpy"], "--peers: got 'numpy'"),
        (["plot", "nothing.json"], "nothing.json is not a benchmark result"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 2
    assert message in capsys.readouterr().err


def test_vppo_bench_forwards_to_the_checkout() -> None:
    shown = runner.invoke(vppo, ["bench", "list"])
    assert shown.exit_code == 0 and "divergence" in shown.output
    assert "vppo bench run" in runner.invoke(vppo, ["bench", "run", "--help"]).output


def test_vppo_bench_says_that_it_needs_a_checkout(tmp_path: Path) -> None:
    shutil.copytree(Path(cli.__file__).parent.parent / "vppo", tmp_path / "vppo")
    done = subprocess.run([sys.executable, "-m", "vppo", "bench", "list"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "vppo bench needs a checkout" in done.stderr
