import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vppo.cli import main
from vppo.errors import InputError

runner = CliRunner()


def test_help_is_quick_and_complete() -> None:
    start = time.monotonic()
    shown = subprocess.run([sys.executable, "-m", "vppo", "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 3  # 0.1 s measured on a quiet machine; importing torch alone takes longer
    assert all(word in shown.stdout for word in ("demo", "train", "--version"))


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, vppo.cli; print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_version() -> None:
    from importlib.metadata import version

    assert runner.invoke(main, ["--version"]).output == f"vppo-kernels {version('vppo-kernels')}\n"


def test_every_option_of_demo_is_explained() -> None:
    shown = runner.invoke(main, ["demo", "--help"], terminal_width=200).output
    for option, default in [
        ("--algorithm", "vppo"),
        ("--divergence", "kl"),
        ("--perturbation", "patch"),
        ("--steps", "180"),
        ("--seed", "0"),
        ("--out", "runs/demo"),
        ("--device", "cpu"),
    ]:
        text = shown.split(f"  {option} ", 1)[1].split("\n  --", 1)[0]
        assert f"default: {default}" in text, option
        assert len(text.split()) > 5, option
    assert "--resume" in shown


@pytest.fixture
def demo_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the demo, and lists what it was asked."""
    calls: list[Any] = []

    @dataclass
    class DemoOptions:
        out: Path
        algorithm: str
        divergence: str
        perturbation: str
        steps: int
        seed: int
        resume: bool
        device: str

    stand_in = types.ModuleType("vppo.demo.run")
    vars(stand_in).update(DemoOptions=DemoOptions, run_demo=calls.append)
    monkeypatch.setitem(sys.modules, "vppo.demo.run", stand_in)
    return calls


def test_demo_options_arrive(demo_calls: list[Any]) -> None:
    words = "--algorithm tgf --divergence k3 --perturbation blur --steps 7 --seed 3 --out x --resume --device cuda"
    assert runner.invoke(main, ["demo", *words.split()]).exit_code == 0
    assert vars(demo_calls[0]) == {
        "algorithm": "tgf",
        "divergence": "k3",
        "perturbation": "blur",
        "steps": 7,
        "seed": 3,
        "out": Path("x"),
        "resume": True,
        "device": "cuda",
    }


@pytest.mark.parametrize(
    ("words", "named"),
    [("--algorithm ppo", "ppo"), ("--steps 0", "--steps"), ("--seed x", "--seed"), ("--nonsense 1", "--nonsense")],
)
def test_bad_demo_options_are_named(demo_calls: list[Any], words: str, named: str) -> None:
    result = runner.invoke(main, ["demo", *words.split()])
    assert result.exit_code == 2 and named in result.stderr
    assert not demo_calls


def test_train_takes_a_config_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: m\ndataset: d\noutput_dir: o\n")
    seen: list[dict[str, Any]] = []

    def fake_train(config: dict[str, Any]) -> Path:
        seen.append(config)
        return tmp_path

    monkeypatch.setattr("vppo.train.train", fake_train)
    result = runner.invoke(main, ["train", str(config), "--learning-rate", "1e-5", "--use_vllm", "--output_dir=p"])
    assert result.exit_code == 0, result.output
    assert seen == [{"model": "m", "dataset": "d", "output_dir": "p", "learning_rate": 1e-5, "use_vllm": True}]


def test_a_users_mistake_is_one_line(tmp_path: Path) -> None:
    result = runner.invoke(main, ["train", str(tmp_path / "no.yaml")])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and result.stderr.startswith(f"Error: {tmp_path}/no.yaml")
    assert "Traceback" not in result.output


def test_a_mistake_is_red_on_a_terminal(tmp_path: Path) -> None:
    result = runner.invoke(main, ["train", str(tmp_path / "no.yaml")], color=True)
    assert result.stderr.startswith("\x1b[31mError")


def test_a_long_message_becomes_one_line(monkeypatch: pytest.MonkeyPatch, demo_calls: list[Any]) -> None:
    def fail(options: Any) -> None:
        raise InputError("first\n  second")

    monkeypatch.setattr(sys.modules["vppo.demo.run"], "run_demo", fail)
    result = runner.invoke(main, ["demo"])
    assert (result.exit_code, result.stderr) == (2, "Error: first second\n")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, demo_calls: list[Any]) -> None:
    def fail(options: Any) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(sys.modules["vppo.demo.run"], "run_demo", fail)
    result = runner.invoke(main, ["demo"])
    assert isinstance(result.exception, ValueError)
