"""The demo as a whole, made small: its files, its numbers, its refusals, and that no SIGKILL changes what it ends with.

Run as a script, this file is a demo that kills itself at given points; see `killed_and_resumed`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vppo.rewards
from vppo import analyze
from vppo.demo import run, warmup
from vppo.demo.run import DemoOptions, run_demo
from vppo.demo.scored import ScoredResponse
from vppo.errors import InputError
from vppo.locks import claimed
from vppo.progress import read_lines

STEPS = 5
KILL_POINTS = ("warm-up", "step 3", "checkpoint", "model", "evaluation")


def accuracy_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """The share of digits: a model that was hardly warmed up earns no other reward."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in texts]


def shrink(put: Callable[[Any, str, Any], None]) -> None:
    """A demo of seconds."""
    put(warmup, "MAX_STEPS", 3)
    put(warmup, "BATCH", 8)
    put(warmup, "MISMATCHED", 2)
    put(run, "PROMPTS", 2)
    put(run, "ROLLOUTS", 4)
    put(run, "HELD_OUT", 8)
    put(run, "SAVE_EVERY", 2)
    put(vppo.rewards, "accuracy_reward", accuracy_reward)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    shrink(monkeypatch.setattr)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A whole small run and its summary."""
    out = tmp_path_factory.mktemp("demo") / "straight"
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        yield out, run_demo(DemoOptions(out=out, steps=STEPS))


def test_all_files_are_there(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (out / "report.html").stat().st_size > 10_000
    assert len(list(out.rglob("*.png"))) >= 3
    assert (out / "model/model.safetensors").exists() and any((out / "checkpoints").glob("checkpoint-*"))
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("*.part"))


def test_the_summary_has_what_is_promised(finished: tuple[Path, dict[str, Any]]) -> None:
    _, summary = finished
    assert (summary["algorithm"], summary["divergence"], summary["seed"], summary["steps"]) == ("vppo", "kl", 0, STEPS)
    assert summary["held_out"] == 8 and 0 <= summary["accuracy_before"] <= 1 and 0 <= summary["accuracy_after"] <= 1
    assert summary["dependency_digits"] >= 0 and summary["dependency_other"] > 0
    products = summary["head_products"]
    assert products["tokens"] >= products["active"] >= 0
    assert products["left_out"] == 4 * products["tokens"] - products["forward"] - products["backward"]
    assert summary["seconds_warmup"] > 0
    assert summary["seconds_per_step"] == pytest.approx(summary["seconds_train"] / STEPS)
    assert 100 < summary["peak_rss_mib"] < 100_000
    assert summary["versions"].keys() >= {"python", "torch", "transformers", "trl", "vppo-kernels"}


def test_a_line_of_metrics_a_step(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    rows = read_lines(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row.keys() >= {"reward", "loss", "grad_norm", "vppo/dependency_mean", "vppo/kept_fraction"}
        assert row["vppo/dependency_mean"] > 0 and 0.4 <= row["vppo/kept_fraction"] < 0.6
        assert not any("seconds" in key or "time" in key for key in row)
    timings = read_lines(out / "timings.jsonl")
    assert [row["step"] for row in timings] == list(range(1, STEPS + 1))
    assert all(row["step_time"] > row["vppo/seconds_scoring"] > 0 for row in timings)


def test_training_changed_the_model(finished: tuple[Path, dict[str, Any]]) -> None:
    from safetensors.torch import load_file

    out, _ = finished
    before, after = (load_file(out / name / "model.safetensors") for name in ("warmup", "model"))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert any("visual" in name for name in changed) and any("lm_head" in name for name in changed)


def test_the_saved_model_answers_as_the_summary_says(finished: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForImageTextToText

    from vppo.demo.batches import answer, correct
    from vppo.demo.digits import strips
    from vppo.loading import load_processor

    out, summary = finished
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    processor = load_processor(str(out / "model"))
    held_out = list(strips("held-out", 8, seed=0))
    verdicts = correct(processor, held_out, answer(model, processor, held_out))
    assert np.mean(verdicts) == summary["accuracy_after"]


@pytest.mark.parametrize("name", ["warmup", "model"])
def test_what_it_leaves_can_be_analysed(finished: tuple[Path, dict[str, Any]], name: str) -> None:
    """The model before and after training, on the strips of the report."""
    from vppo.data import Problems
    from vppo.demo.digits import strips

    out, _ = finished
    for problem, strip in zip(Problems(out / "held_out.parquet"), strips("held-out", 8, seed=0), strict=True):
        assert (problem.prompt, problem.answer) == (strip.prompt, strip.answer)
        assert np.array_equal(np.asarray(problem.images[0]), np.asarray(strip.image))
    found = analyze(out / name, out / "held_out.parquet", limit=3, max_tokens=8, temperature=0, device="cpu")
    assert len(found.trajectories) == 3 and set(found.trajectories["question"]) == {"Sum?"}
    assert found.summary["problems"] == 8 and (found.tokens["kl"] > 0).all()


def test_an_occupied_folder_is_refused(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(InputError, match=r"already holds a run.*--resume"):
        run_demo(DemoOptions(out=out, steps=STEPS))
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        run_demo(DemoOptions(out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_is_resumed_with_its_own_options_only(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    with pytest.raises(InputError, match=r"--seed: got 1, .* was started with 0"):
        run_demo(DemoOptions(out=out, steps=STEPS, seed=1, resume=True))


def test_resuming_a_finished_run_gives_its_summary(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    before = (out / "metrics.jsonl").stat().st_mtime_ns
    assert run_demo(DemoOptions(out=out, steps=STEPS, resume=True)) == summary
    assert (out / "metrics.jsonl").stat().st_mtime_ns == before


BROKEN: list[tuple[str, str, str]] = [
    ("options.json", "{", r"options.json: is no JSON .*; choose another --out, or remove that folder"),
    ("options.json", "", r"options.json: is no JSON"),
    ("options.json", "[1]", r"options.json: got a list, takes an object"),
    ("options.json", "[" * 100_000, r"options.json: is no JSON of ours \(nested too deeply\)"),
    ("options.json", '{"model": "m"}', r"--out: .* holds a run of `vppo demo`, no run of `vppo demo`"),
    ("summary.json", "null", r"summary.json: got a NoneType, .*remove .*report.html, and the same command writes both"),
    ("summary.json", '{"algorithm": "vppo"}', r"summary.json: has no divergence, seed, .*remove .*report.html"),
    (
        "warmup/warmup.json",
        "",
        r"warmup.json: is no JSON .*; remove .*warmup, and the same command with",
    ),
    ("warmup/warmup.json", '{"steps": 3}', r"warmup.json: has no number seconds, accuracy; remove .*warmup"),
    ("model/model.safetensors", "no weights", r"model: cannot be loaded .*; remove .*model, and the same command"),
    ("metrics.jsonl", '{"step": 1}\n{"st', r"metrics.jsonl, line 2: is no step of a run: '{\"st'; remove that"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[f"{n} {c[:20]}" for n, c, _ in BROKEN])
def test_a_broken_file_is_named_on_resuming(
    finished: tuple[Path, dict[str, Any]], small: None, tmp_path: Path, name: str, content: str, message: str
) -> None:
    out = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (out / name).write_text(content)
    if name not in ("options.json", "summary.json"):
        (out / "report.html").unlink()  # what is read again only where something is left to do
    with pytest.raises(InputError, match=message):
        run_demo(DemoOptions(out=out, steps=STEPS, resume=True))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="run is a file; takes a new or empty folder"):
        run_demo(DemoOptions(out=tmp_path / "run"))


def test_a_folder_of_markup_is_printed_as_it_is(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(finished[0], tmp_path / "[red]" / "[/x]:smile:"))
    run_demo(DemoOptions(out=out, steps=STEPS, resume=True))
    assert f"Report: {out / 'report.html'}\n" in capsys.readouterr().out


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError, match="--device: 'abacus'"):
        run_demo(DemoOptions(out=out, device="abacus"))
    assert not out.exists(), "the next try, with a device that exists, must find the folder free"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (r"3+5=8,8+1=\boxed{9}", {0, 2, 8}),
        (r"9+9=18,18+7=\boxed{25}", {0, 2, 10}),
        (r"nothing like it: 3", set()),
    ],
)
def test_the_digits_read_from_the_image_are_told_from_computed_ones(text: str, read: set[int]) -> None:
    picture = Image.new("RGB", (1, 1))
    characters = [c for c in text.replace("\\boxed{", "@")]
    tokens = ["\\boxed{" if c == "@" else c for c in characters] + ["<|im_end|>"]
    dependency = np.array([100.0 + i if i in read else i for i in range(len(tokens))], dtype=np.float32)
    kept = np.zeros(len(tokens), dtype=bool)
    response = ScoredResponse(picture, picture, "Sum?", "9", True, tokens, dependency, kept)
    digits, other = run._dependency_by_place([response])
    assert digits == pytest.approx(dependency[sorted(read)].mean() if read else 0.0)
    assert other == pytest.approx(np.delete(dependency, sorted(read)).mean())


@pytest.mark.parametrize("algorithm", ["dapo", "grpo", "tas", "tgf"])
def test_other_algorithms(tmp_path: Path, small: None, algorithm: str) -> None:
    summary = run_demo(DemoOptions(out=tmp_path / "run", algorithm=algorithm, steps=1))
    assert summary["algorithm"] == algorithm and summary["dependency_other"] > 0
    (row,) = read_lines(tmp_path / "run/metrics.jsonl")
    assert ("vppo/dependency_mean" in row) == (algorithm in ("tas", "tgf"))
    assert (tmp_path / "run/report.html").exists()


def test_other_divergences_and_perturbations(tmp_path: Path, small: None) -> None:
    rows = []
    for divergence, perturbation in [("kl", "patch"), ("k3", "noise"), ("jsd", "blur"), ("kl", "grey")]:
        out = tmp_path / perturbation
        run_demo(DemoOptions(out=out, divergence=divergence, perturbation=perturbation, steps=1))
        rows += read_lines(out / "metrics.jsonl")
    assert len({row["reward"] for row in rows}) == 1, "the rollouts are the same, only what is made of them differs"
    assert len({row["vppo/dependency_mean"] for row in rows}) == 4


def test_sigterm_while_it_trains(
    finished: tuple[Path, dict[str, Any]], small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from support import faultruns  # not for the script that this file also is

    out = tmp_path / "run"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("model", "checkpoints", "*.jsonl", "*.html"))
    options = DemoOptions(out=out, steps=STEPS, resume=True)
    with pytest.MonkeyPatch.context() as patch:
        tell = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        faultruns.before(transformers.Trainer, "training_step", tell, patch.setattr, 3)
        with pytest.raises(SystemExit) as caught:
            run_demo(options)
    assert caught.value.code == 143
    assert "Ended by SIGTERM; checkpoint-3 is saved. Go on with --resume" in capsys.readouterr().out
    run_demo(options)
    assert (out / "metrics.jsonl").read_bytes() == (finished[0] / "metrics.jsonl").read_bytes()


def test_two_demos_in_one_folder(tmp_path: Path) -> None:
    with claimed(tmp_path / "run", "--out"), pytest.raises(InputError, match=r"--out: .*run is in use by process"):
        run_demo(DemoOptions(out=tmp_path / "run"))


@pytest.mark.slow
def test_killed_anywhere_and_resumed_it_ends_the_same(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    straight, summary = finished
    command = [sys.executable, __file__, str(tmp_path / "run")]
    script = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert script.returncode == 0, script.stderr[-4000:]
    assert script.stdout.count("killed at ") == len(KILL_POINTS), script.stdout
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    again = json.loads((tmp_path / "run/summary.json").read_text())
    numbers = ("accuracy_before", "accuracy_after", "dependency_digits", "dependency_other", "warmup_steps")
    assert {name: again[name] for name in numbers} == {name: summary[name] for name in numbers}
    weights = [(out / "model/model.safetensors").read_bytes() for out in (straight, tmp_path / "run")]
    assert weights[0] == weights[1]


def killed_and_resumed(out: Path) -> None:
    """One run that dies at every kill point in turn and is resumed each time, each in a process of its own."""
    import vppo.demo.digits
    import vppo.demo.report
    import vppo.demo.scored
    import vppo.trainer  # imported once, here: the children are forks  # noqa: F401

    for point in (*KILL_POINTS, None):
        child = os.fork()
        if child == 0:
            shrink(setattr)
            _die_at(point)
            run_demo(DemoOptions(out=out, steps=STEPS, resume=point != KILL_POINTS[0]))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if point is None:
            assert status == 0
        else:
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
            print("killed at", point, flush=True)


def _die_at(point: str | None) -> None:
    import transformers

    import vppo.demo.scored
    import vppo.progress

    def die(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if point == "warm-up":
        vppo.demo.batches.answer = die  # between the warm-up's last step and its first file
    elif point == "step 3":  # after its line was written, past the checkpoint of step 2
        log = vppo.progress.TrainingProgress.on_log

        def log_and_die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            log(self, args, state, control, **kwargs)
            if state.global_step == 3:
                die()

        vppo.progress.TrainingProgress.on_log = log_and_die  # type: ignore[method-assign]
    elif point == "checkpoint":  # with the weights written and the state not
        transformers.TrainerState.save_to_json = die  # type: ignore[method-assign]
    elif point == "model":  # after the last step, which has no more to do
        run.save_whole = die
    elif point == "evaluation":
        vppo.demo.scored.score_responses = die  # type: ignore[assignment]


if __name__ == "__main__":
    killed_and_resumed(Path(sys.argv[1]))
