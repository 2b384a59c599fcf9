"""Faults in the middle of training: what is left is whole, what is said is a line, and a resumed run ends the same."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer.testing
import yaml
from support import faultruns
from support.faultruns import STEPS, before, ending, prepare, save_points

import vppo.files
import vppo.progress
from vppo import manifest
from vppo.checkpoints import fault, last_complete_checkpoint
from vppo.cli import main
from vppo.train import train

FILES = (
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "manifest.json",
)
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda content: None,
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "one bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return prepare(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def straight(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    return train({**config, "output_dir": str(tmp_path_factory.mktemp("straight") / "run")})


@pytest.fixture
def interrupted(straight: Path, tmp_path: Path) -> Path:
    """The same run, killed between the last checkpoint and the trained model; files may be replaced, not changed."""
    run = tmp_path / "run"
    shutil.copytree(straight, run, ignore=shutil.ignore_patterns("model", "*.jsonl"))
    shutil.copy(straight / "metrics.jsonl", run)
    return run


def damage(file: Path, how: str) -> None:
    content = DAMAGES[how](file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)


def command(config: dict[str, Any], run: Path, *words: str) -> Any:
    """`vppo train` as a user sees it: exit code and what was said."""
    path = run.parent / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "output_dir": str(run)}))
    return typer.testing.CliRunner().invoke(main, ["train", str(path), *words])


def check_one_line(result: Any, *parts: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(lines) == 1, (result.exit_code, result.stderr, result.exception)
    assert "Traceback" not in result.output and all(part in lines[0] for part in parts), lines[0]


# -- damaged checkpoints


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(
    interrupted: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = interrupted / f"checkpoint-{STEPS}"
    assert last_complete_checkpoint(interrupted) == newest and not caplog.text
    damage(newest / name, how)
    if (name, how) == ("manifest.json", "deleted"):  # as from before there were any: what can be seen is whole
        assert last_complete_checkpoint(interrupted) == newest
        return
    assert last_complete_checkpoint(interrupted) == interrupted / f"checkpoint-{STEPS - 1}"
    assert f"{newest} is passed over: its {name} " in caplog.text or f"it has no {name}" in caplog.text


@pytest.mark.parametrize("how", ["deleted", "empty", "cut"])
@pytest.mark.parametrize("name", [name for name in FILES if name not in ("manifest.json", "config.json")])
def test_a_damaged_checkpoint_without_manifest_is_passed_over(interrupted: Path, name: str, how: str) -> None:
    newest = interrupted / f"checkpoint-{STEPS}"
    (newest / "manifest.json").unlink()
    damage(newest / name, how)
    if (name, how) == ("model.safetensors", "deleted"):
        assert fault(newest) == "it has no weights"
    assert last_complete_checkpoint(interrupted) == interrupted / f"checkpoint-{STEPS - 1}"


@pytest.mark.parametrize(("name", "how"), [("optimizer.pt", "cut"), ("rng_state.pth", "deleted")])
def test_resuming_past_a_damaged_checkpoint_ends_the_same(
    config: dict[str, Any], straight: Path, interrupted: Path, name: str, how: str
) -> None:
    damage(interrupted / f"checkpoint-{STEPS}" / name, how)
    train({**config, "output_dir": str(interrupted), "resume": True})
    assert ending(interrupted) == ending(straight)
    assert fault(interrupted / f"checkpoint-{STEPS}") is None


def test_a_checkpoint_in_ones_home_is_found(
    config: dict[str, Any], interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(interrupted.parent))
    result = command(config, interrupted, "--resume=~/run/checkpoint-1", "--seed=3")
    check_one_line(result, "seed: got 3, but the run in ")  # which is asked after the checkpoint was found whole


def test_a_damaged_checkpoint_that_is_named_is_refused(config: dict[str, Any], interrupted: Path) -> None:
    newest = interrupted / f"checkpoint-{STEPS}"
    damage(newest / "optimizer.pt", "empty")
    result = command(config, interrupted, "--resume", str(newest))
    check_one_line(result, f"resume: {newest} is not a complete checkpoint (its optimizer.pt has 0 bytes instead of")


def test_large_files_are_known_by_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "END", 1000)
    (tmp_path / "small").write_bytes(bytes(2000))
    (tmp_path / "large").write_bytes(bytes(5000))
    manifest.finish(tmp_path)
    assert manifest.fault(tmp_path) is None
    for name, place, seen in (
        ("small", 1000, True),
        ("large", 999, True),
        ("large", 4000, True),
        ("large", 2500, False),
    ):
        content = bytearray((tmp_path / name).read_bytes())
        content[place] = 1
        (tmp_path / name).write_bytes(content)
        assert manifest.fault(tmp_path) == (f"its {name} has other contents than were saved" if seen else None)
        content[place] = 0
        (tmp_path / name).write_bytes(content)


# -- killed while saving


@pytest.mark.slow
def test_killed_anywhere_in_a_save_and_resumed_it_ends_the_same(
    config: dict[str, Any], straight: Path, tmp_path: Path
) -> None:
    """SIGKILL at every point; only two checkpoints are kept, so that a save too much removed would show."""
    settings = {**config, "output_dir": str(tmp_path / "run"), "save_total_limit": 1}
    command = [sys.executable, faultruns.__file__, json.dumps(settings)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # as in `straight`: two would sum in another order
    script = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert script.returncode == 0, script.stderr[-4000:]
    assert script.stdout.count("killed ") == len(save_points()), script.stdout
    assert ending(tmp_path / "run") == ending(straight)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert not [path for path in (tmp_path / "run").rglob("*.part")]


# -- full disks


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torch_full() -> None:
    torch.serialization.save(torch.zeros(1 << 16), "/dev/full")


WRITES: dict[str, tuple[Any, str, int, str]] = {
    "options.json": (vppo.files.os, "fsync", 1, "options.json"),
    "config.yaml": (vppo.files.os, "fsync", 2, "config.yaml"),
    "weights": (transformers.PreTrainedModel, "save_pretrained", 2, "checkpoint-2"),
    "optimizer": (torch, "save", 6, "checkpoint-2"),
    "state": (transformers.TrainerState, "save_to_json", 2, "checkpoint-2"),
    "manifest": (manifest, "finish", 2, "checkpoint-2"),
    "model": (transformers.PreTrainedModel, "save_pretrained", STEPS + 1, "model"),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_is_a_line_and_the_run_goes_on_from_what_was_whole(
    config: dict[str, Any], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    module, name, call, named = WRITES[write]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        before(module, name, torch_full if write == "optimizer" else full, patch.setattr, call)
        reason = "inline_container" if write == "optimizer" else "No space left on device"
        check_one_line(command(config, run, "--resume"), f"{run / named}: ", reason)
    whole = last_complete_checkpoint(run)
    assert (whole is not None) == (write not in ("options.json", "config.yaml"))
    train({**config, "output_dir": str(run), "resume": True})
    assert ending(run) == ending(straight)


@pytest.mark.parametrize(("name", "call"), [("metrics.jsonl", 5), ("timings.jsonl", 4)])
def test_a_disk_that_takes_half_a_line(
    config: dict[str, Any],
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    call: int,
) -> None:
    run = tmp_path / "run"
    file, aside = run / name, run / "aside"
    with monkeypatch.context() as patch:
        full_file = lambda: (file.rename(aside), file.symlink_to("/dev/full"))  # noqa: E731
        before(vppo.progress, "_append", full_file, patch.setattr, call)
        check_one_line(command(config, run), f"{file}: No space left on device")
    aside.replace(file)
    with file.open("a") as lines:
        lines.write('{"step": ')
    train({**config, "output_dir": str(run), "resume": True})
    assert f"{file}, line {(call + 1) // 2}: was cut short and is dropped" in caplog.text
    assert ending(run) == ending(straight)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many MiB, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(size: int) -> Path:
        if sys.platform != "linux" or libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}m".encode()):
            pytest.skip(f"no disk can be mounted here ({os.strerror(ctypes.get_errno())})")
        return folder

    yield mount
    libc.umount2(os.fsencode(folder), 2)  # MNT_DETACH


def test_a_disk_that_is_really_full(
    config: dict[str, Any], straight: Path, small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    """A checkpoint has 17 MiB: the second does not fit, and leaves room for what is to be said."""
    run = small_disk(30) / "run"
    check_one_line(command(config, run), f"{run / 'checkpoint-2'}: cannot be written: ", "MiB are left on the disk")
    assert last_complete_checkpoint(run) == run / "checkpoint-1"
    elsewhere = Path(shutil.copytree(run, tmp_path / "elsewhere"))
    train({**config, "output_dir": str(elsewhere), "resume": True})
    assert ending(elsewhere) == ending(straight)


def test_a_path_that_is_too_long_is_a_line(config: dict[str, Any], tmp_path: Path) -> None:
    check_one_line(command(config, tmp_path / "run", f"--output_dir={tmp_path / ('x' * 300)}"), "File name too long")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


# -- SIGTERM


def test_sigterm_saves_a_checkpoint_and_the_run_goes_on(
    config: dict[str, Any], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, earlier = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:  # in the middle of the second step, twice as launchers do
        told = lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]  # noqa: E731
        before(transformers.Trainer, "training_step", told, patch.setattr, 2)
        result = command(config, run, "--save_steps=100")
    assert result.exit_code == 143 and "Traceback" not in result.output, result.output
    said = " ".join(result.output.split())
    assert "Ended by SIGTERM after step 2; checkpoint-2 is saved. Go on with --resume true" in said
    assert signal.getsignal(signal.SIGTERM) is earlier
    assert last_complete_checkpoint(run) == run / "checkpoint-2" and not (run / "model").exists()
    train({**config, "output_dir": str(run), "resume": True})
    assert ending(run) == ending(straight)


@pytest.mark.parametrize(
    ("more", "saved"),
    [
        ({"save_strategy": "no"}, None),
        ({"num_iterations": 2, "save_steps": 2}, 2),  # the first of two updates from the same rollouts ends nowhere
    ],
    ids=["nothing saved", "two updates"],
)
def test_sigterm_where_a_checkpoint_is_not_wanted_or_not_possible(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], saved: int | None
) -> None:
    run = tmp_path / "run"
    before(transformers.Trainer, "training_step", lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch.setattr)
    result = command({**config, **more}, run)
    assert result.exit_code == 143
    assert ("save_strategy is 'no', so nothing is saved" in result.output) == (saved is None)
    assert last_complete_checkpoint(run) == (run / f"checkpoint-{saved}" if saved else None)


def test_sigterm_saves_also_where_the_best_alone_is_saved(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer in letters has no format: the second evaluation is as good as the first, and so no new best one."""
    run = tmp_path / "run"
    best = {"save_strategy": "best", "metric_for_best_model": "reward", "eval_strategy": "steps", "eval_steps": 1}
    data = {"eval_dataset": config["dataset"], "eval_dataset_split": config.get("dataset_split", "train")}
    before(transformers.Trainer, "training_step", lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch.setattr, 2)
    result = command({**config, **best, **data, "reward": "format"}, run)
    assert result.exit_code == 143 and "checkpoint-2 is saved" in " ".join(result.output.split()), result.output
    assert last_complete_checkpoint(run) == run / "checkpoint-2"


def test_sigterm_outside_of_training_is_a_line(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import vppo.train

    before(vppo.train, "load_processor", lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch.setattr)
    result = command(config, tmp_path / "run")
    assert result.exit_code == 143 and "Error: ended by SIGTERM" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


# -- another run in the same folder, and the same run done otherwise


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed=3"], "seed: got 3, but the run in "),
        (["--learning_rate=2e-3"], "learning_rate: got 0.002, but the run in "),
        (
            ["--dataset={folder}/other.jsonl"],
            "dataset: {folder}/other.jsonl has other problems, answers or images than ",
        ),
        (["--keep_ratio=0.5"], "keep_ratio: got 0.5, but the run in "),
        (["--model={folder}"], "model: got '{folder}', but the run in "),
        (["--reward=accuracy"], "reward: got 'accuracy', but the run in "),
        (["--use_peft"], "use_peft: got True, but the run in "),
        (["--max_steps=6", "--lr_scheduler_type=linear"], "max_steps: got 6, but the run in "),
    ],
)
def test_a_run_is_gone_on_with_as_it_was_started(
    config: dict[str, Any], interrupted: Path, words: list[str], expected: str
) -> None:
    folder = Path(config["dataset"]).parent
    (folder / "other.jsonl").write_text((folder / "train.jsonl").read_text().replace("3+1?", "3+2?"))
    before = (interrupted / "metrics.jsonl").read_text()
    result = command(config, interrupted, "--resume", *(word.format(folder=folder) for word in words))
    check_one_line(result, expected.format(folder=folder), "was started with")
    assert (interrupted / "metrics.jsonl").read_text() == before


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (rewrite("train.jsonl", lambda rows: rows.replace(b"3+1?", b"3+2?")), "dataset: {}/train.jsonl has other prob"),
        (lambda folder: shutil.copy(folder / "4.png", folder / "3.png"), "dataset: {}/train.jsonl has other problems"),
        (rewrite("start/config.json", lambda text: text + b" "), "model: {}/start has other weights or settings than"),
        (rewrite("start/model.safetensors", DAMAGES["one bit"]), "model: {}/start has other weights or settings than"),
    ],
    ids=["row", "picture", "config", "weights"],
)
def test_other_contents_under_the_same_name_are_refused(
    config: dict[str, Any], interrupted: Path, tmp_path: Path, change: Callable[[Path], Any], expected: str
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(Path(config["dataset"]).parent, moved)
    here = {"dataset": str(moved / "train.jsonl"), "model": str(moved / "start")}
    record = json.loads((interrupted / "options.json").read_text())
    (interrupted / "options.json").unlink()
    (interrupted / "options.json").write_text(json.dumps({**record, "config": {**record["config"], **here}}))
    change(moved)
    result = command({**config, **here}, interrupted, "--resume")
    check_one_line(result, expected.format(moved), f"than when the run in {interrupted} was started")


def test_the_same_contents_under_another_name_go_on(
    config: dict[str, Any], straight: Path, interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(interrupted / f"checkpoint-{STEPS}")
    moved = tmp_path / "moved"
    shutil.copytree(Path(config["dataset"]).parent, moved)
    (moved / "train.jsonl").rename(moved / "problems.jsonl")
    here = {"dataset": str(moved / "problems.jsonl"), "model": str(moved / "start")}
    train({**config, **here, "output_dir": str(interrupted), "resume": True})
    assert ending(interrupted) == ending(straight)
    said = capsys.readouterr().out
    for key, name in here.items():
        assert f"{key}: {name} holds what {config[key]} held when this run was started" in " ".join(said.split())


def test_names_decide_where_no_contents_were_kept(config: dict[str, Any], interrupted: Path, tmp_path: Path) -> None:
    """As in records from before they were."""
    record = json.loads((interrupted / "options.json").read_text())
    del record["model_files"]
    (interrupted / "options.json").unlink()
    (interrupted / "options.json").write_text(json.dumps(record))
    shutil.copytree(config["model"], tmp_path / "moved")
    result = command(config, interrupted, "--resume", f"--model={tmp_path / 'moved'}")
    check_one_line(result, f"model: got '{tmp_path / 'moved'}', but the run in ", "was started with")


def test_what_changes_nothing_in_training_may_change(config: dict[str, Any], straight: Path, interrupted: Path) -> None:
    shutil.rmtree(interrupted / f"checkpoint-{STEPS}")
    more = {"save_steps": 2, "save_total_limit": 3, "log_completions": False, "run_name": "x", "scoring_memory": 2.0}
    more |= {"sampler_guard": "warn", "sampler_tolerance": 1.0}  # as the guard's own message says
    relative = {"dataset": os.path.relpath(config["dataset"]), "max_steps": STEPS}
    train({**config, **more, **relative, "output_dir": str(interrupted), "resume": True})
    assert ending(interrupted) == ending(straight)


def test_a_constant_rate_lets_a_run_be_made_longer(config: dict[str, Any], interrupted: Path) -> None:
    train({**config, "max_steps": STEPS + 1, "output_dir": str(interrupted), "resume": True})
    assert ending(interrupted)[0].count("\n") == STEPS + 1


def test_a_rate_that_has_no_effect_is_said(
    config: dict[str, Any], straight: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A new run that begins with a checkpoint of another one begins with its optimizer, too."""
    begun = {**config, "resume": str(straight / "checkpoint-1"), "max_steps": 2}
    same, other = (
        train({**begun, "learning_rate": rate, "output_dir": str(tmp_path / f"{rate}")}) for rate in (1e-3, 0.1)
    )
    assert ending(same) == ending(other)
    said = [line for line in caplog.messages if "learning_rate: got" in line]
    assert len(said) == 1 and "got 0.1, which has no effect" in said[0] and "is 0.001" in said[0]


@pytest.mark.parametrize("broken", ["", "{", "[1]", "[" * 100_000, '{"config": 1, "processes": 1, "rows": "x"}'])
def test_a_broken_record_is_a_line(config: dict[str, Any], interrupted: Path, broken: str) -> None:
    (interrupted / "options.json").unlink()
    (interrupted / "options.json").write_text(broken)
    check_one_line(command(config, interrupted, "--resume"), str(interrupted))


def test_a_run_without_a_record_is_gone_on_with(
    config: dict[str, Any], straight: Path, interrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As from before there was one."""
    (interrupted / "options.json").unlink()
    train({**config, "output_dir": str(interrupted), "resume": True})
    assert f"{interrupted} does not say what its run was started with" in caplog.text
    assert ending(interrupted) == ending(straight)


def test_a_broken_line_of_the_metrics_is_named_before_anything_is_loaded(
    config: dict[str, Any], interrupted: Path
) -> None:
    lines = (interrupted / "metrics.jsonl").read_text()
    (interrupted / "metrics.jsonl").write_text("{\n" + lines)
    result = command(config, interrupted, "--resume", "--model=no/model")
    check_one_line(result, f"{interrupted / 'metrics.jsonl'}, line 1: is no step of a run: '{{'; remove that line")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["README.md", "thesis.tex"], "holds other files, of which README.md would be overwritten"),
        (["config.yaml"], "holds other files, of which config.yaml would be overwritten"),
        (["options.json"], "is no JSON"),
        (["config.json", "model"], "holds a model, of which model would be overwritten"),
    ],
)
def test_files_of_others_are_not_overwritten(
    config: dict[str, Any], tmp_path: Path, names: list[str], expected: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in names:
        (run / name).write_text("years of work")
    for words in ([], ["--resume"]):
        check_one_line(command(config, run, *words), expected)
    assert {path.name: path.read_text() for path in run.iterdir()} == dict.fromkeys(names, "years of work")


def test_the_folder_of_another_command_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "options.json").write_text(json.dumps({"algorithm": "vppo", "steps": 5, "seed": 0}))
    (run / "warmup").mkdir()
    check_one_line(command(config, run), f"output_dir: {run} holds a run of `vppo demo`, no run of `vppo train`")


def test_two_runs_in_one_folder(config: dict[str, Any], tmp_path: Path) -> None:
    from vppo.locks import claimed

    with claimed(tmp_path / "run", "output_dir"):
        check_one_line(command(config, tmp_path / "run"), f"output_dir: {tmp_path / 'run'} is in use by process")
        assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_log_that_lies_in_the_folder_is_no_hindrance(config: dict[str, Any], straight: Path, tmp_path: Path) -> None:
    """As a cluster's scheduler writes it; and a run that failed before its first step is begun anew."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "slurm-1.out").write_text("log")
    with pytest.MonkeyPatch.context() as patch:
        before(transformers.Trainer, "training_step", lambda: 1 / 0, patch.setattr)
        with pytest.raises(ZeroDivisionError):
            train({**config, "output_dir": str(run), "seed": 5})
    train({**config, "output_dir": str(run)})
    assert ending(run) == ending(straight)
