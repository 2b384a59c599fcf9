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
    assert all(word in shown.stdout for word in ("demo", "train", "analyze", "--version"))


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
        ("--divergence", "(the algorithm's own, mostly kl)"),
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


@pytest.mark.parametrize(
    ("words", "divergence"), [("", "kl"), ("--algorithm vepo", "jsd"), ("--algorithm vepo --divergence k3", "k3")]
)
def test_a_demo_measures_what_its_algorithm_does(demo_calls: list[Any], words: str, divergence: str) -> None:
    assert runner.invoke(main, ["demo", *words.split()]).exit_code == 0
    assert demo_calls[0].divergence == divergence


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


@pytest.fixture
def analyze_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for the analysis, and lists what it was asked."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("vppo.analysis.run.analyze", lambda **options: calls.append(options))
    monkeypatch.setattr("vppo.progress.quieten", lambda: None)
    return calls


def test_analyze_without_options_is_analyze_without_options(analyze_calls: list[dict[str, Any]]) -> None:
    from vppo.analysis.options import AnalysisOptions

    assert runner.invoke(main, ["analyze", "--model", "m", "--data", "d", "--out", "o"]).exit_code == 0
    (asked,) = analyze_calls
    assert [asked.pop(name) for name in ("model", "data", "out", "responses")] == ["m", "d", Path("o"), ()]
    assert AnalysisOptions(**asked) == AnalysisOptions()


def test_every_option_of_analyze_arrives(analyze_calls: list[dict[str, Any]]) -> None:
    from vppo.analysis.options import AnalysisOptions

    values = {
        "limit": 3, "samples": 2, "perturbation": "noise", "patch_size": 7, "patch_probability": 0.25, "noise_std": 9.0,
        "blur_radius": 2.0, "draws": 4, "divergence": "jsd", "keep_ratio": 0.2, "max_tokens": 5, "temperature": 0.5,
        "seed": 6, "memory": 2.5, "split": "test", "system_prompt": "", "instruction": "Think.", "min_pixels": 784,
        "max_pixels": 7840, "device": "cuda:1", "dtype": "bfloat16", "attn_implementation": "eager",
        "revision": "v2", "sampler": "vllm", "problem_key": "question", "answer_key": "key", "image_key": "picture",
        "image_dir": "/", "image_pixel_limit": 1000,
    }  # fmt: skip
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    given = [
        "--model",
        "m",
        "--data",
        "d",
        "--out",
        "o",
        "--responses",
        "a.jsonl",
        "--responses",
        "b.jsonl",
        "--trust-remote-code",
        "--trust-image-paths",
    ]
    result = runner.invoke(main, ["analyze", *given, *words])
    assert result.exit_code == 0, result.output
    (asked,) = analyze_calls
    assert asked.pop("responses") == [Path("a.jsonl"), Path("b.jsonl")]
    assert [asked.pop(name) for name in ("model", "data", "out")] == ["m", "d", Path("o")]
    assert vars(AnalysisOptions(**asked)) == {**values, "trust_remote_code": True, "trust_image_paths": True}


def test_every_option_of_analyze_is_explained() -> None:
    from dataclasses import fields

    from vppo.analysis.options import AnalysisOptions

    shown = runner.invoke(main, ["analyze", "--help"], terminal_width=200).output
    for name in ("model", "data", "out", "responses", *(field.name for field in fields(AnalysisOptions))):
        text = shown.split(f"  --{name.replace('_', '-')} ", 1)[1].split("\n  --", 1)[0]
        assert len(text.split()) > 4, name


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", "--model"),
        ("--model m --data d", "--out"),
        ("--model m --data d --out o --draws 0", "--draws"),
        ("--model m --data d --out o --divergence k2", "k2"),
    ],
)
def test_bad_analyze_options_are_named(analyze_calls: list[dict[str, Any]], words: str, named: str) -> None:
    result = runner.invoke(main, ["analyze", *words.split()])
    assert result.exit_code == 2 and named in result.stderr
    assert not analyze_calls


def test_a_mistake_in_an_analysis_is_one_line(tmp_path: Path) -> None:
    result = runner.invoke(main, ["analyze", "--model", f"{tmp_path}/no", "--data", "d", "--out", f"{tmp_path}/o"])
    assert (result.exit_code, result.stderr) == (2, f"Error: model: {tmp_path}/no: no such folder\n")
