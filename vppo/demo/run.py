"""`vppo demo`: build, warm up, train with VPPO, look at what the model looks at."""

from __future__ import annotations

import io
import json
import os
import platform
import resource
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from vppo.checkpoints import last_complete_checkpoint
from vppo.errors import InputError
from vppo.files import make_folder, write_atomic, writing
from vppo.folders import enter, read_object
from vppo.locks import claimed

PROMPTS, ROLLOUTS = 16, 8
HELD_OUT = 512
LEARNING_RATE = 1.5e-4
SAVE_EVERY = 10
THREADS = 1  # two threads of a contended two-core machine are slower than one on matrices this small
PACKAGES = ("torch", "transformers", "trl", "accelerate", "vppo-kernels")


@dataclass(frozen=True)
class DemoOptions:
    """What `vppo demo` was asked for.

    Attributes:
        out: Folder of the run.
        algorithm: One of `vppo.algorithms.COMMANDS`.
        divergence: What training measures dependency by: "kl", "k3" or "jsd".
        perturbation: "patch", "noise", "blur" or "grey".
        steps: Training steps of 16 prompts x 8 rollouts.
        seed: Of weights, data order, warm-up, sampling and perturbation.
        resume: Go on with the run in `out`.
        device: "cpu", "cuda", ...
    """

    out: Path = Path("runs/demo")
    algorithm: str = "vppo"
    divergence: str = "kl"
    perturbation: str = "patch"
    steps: int = 180
    seed: int = 0
    resume: bool = False
    device: str = "cpu"

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it resumes."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "resume")}


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Run the whole demo; every file of it is under `options.out`.

    Args:
        options: What to run.

    Returns:
        The contents of `summary.json`.

    Raises:
        InputError: `out` holds another run, or the device is not there, or the disk is full.
        SystemExit: With code 143, after SIGTERM while it trains; a checkpoint is saved then.
    """
    from vppo.loading import check_device

    check_device(options.device)
    with claimed(options.out, "--out"):
        return _run(options)


def _run(options: DemoOptions) -> dict[str, Any]:
    console, out = Console(), options.out
    _claim(options)
    if (out / "report.html").exists():  # the last thing that is written
        summary = _finished(out)
        _show(console, summary, out)
        return summary

    from vppo.progress import quieten

    quieten()
    import torch

    torch.set_num_threads(THREADS)

    from vppo.demo.baseline import beside
    from vppo.demo.batches import answer, correct
    from vppo.demo.digits import strips
    from vppo.demo.head_products import HeadProducts
    from vppo.demo.report import write_report
    from vppo.progress import read_lines

    held_out = list(strips("held-out", HELD_OUT, seed=0))
    _save_held_out(out / "held_out.parquet", held_out)
    warm = _warm_up(console, options, held_out)
    model, processor = _train(console, options)

    console.print(f"reading {HELD_OUT} held-out strips and scoring every token ...")
    responses = answer(model, processor, held_out)
    verdicts = correct(processor, held_out, responses)
    scored = _score(options, model, processor, held_out, responses, verdicts)
    digits, other = _dependency_by_place(scored)
    timings, metrics = read_lines(out / "timings.jsonl"), read_lines(out / "metrics.jsonl")
    products = HeadProducts.of(metrics)
    seconds_train = sum(row["step_time"] for row in timings)
    summary = {
        **options.identity(),
        "accuracy_before": warm["accuracy"],
        "accuracy_after": sum(verdicts) / HELD_OUT,
        "held_out": HELD_OUT,
        "dependency_digits": digits,
        "dependency_other": other,
        "head_products": {
            name: round(count) for name, count in {**asdict(products), "left_out": products.left_out}.items()
        },
        "warmup_steps": warm["steps"],
        "seconds_warmup": warm["seconds"],
        "seconds_train": seconds_train,
        "seconds_per_step": seconds_train / max(len(timings), 1),
        "peak_rss_mib": _peak_rss_mib(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {THREADS} torch thread",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    baseline = beside(options.algorithm, options.steps)
    write_report(out, summary=summary, metrics=metrics, responses=scored, baseline=baseline)
    _show(console, summary, out)
    return summary


def _finished(out: Path) -> dict[str, Any]:
    """The summary of a run that has its report."""
    from vppo.demo.report import REQUIRED

    again = f"remove {out / 'report.html'}, and the same command writes both anew"
    summary = read_object(out / "summary.json", remedy=again)
    kinds = {name: str if name in ("algorithm", "divergence") else int | float for name in REQUIRED}
    missing = [name for name, kind in kinds.items() if not isinstance(summary.get(name), kind)]
    if missing:
        raise InputError(f"{out / 'summary.json'}: has no {', '.join(missing)}; {again}")
    return summary


def _claim(options: DemoOptions) -> None:
    """Make the folder this run's, or find that it is another's."""
    identity = options.identity()
    before = enter(options.out, identity, what="run of `vppo demo`", known_by={"algorithm", "steps", "seed"})
    if before is None:
        return
    if not options.resume:
        raise InputError(
            f"--out: {options.out} already holds a run: go on with --resume, remove it, or choose another folder"
        )
    for name, value in identity.items():
        if before.get(name) != value:
            raise InputError(
                f"--{name}: got {value!r}, but the run in {options.out} was started with {before.get(name)!r}"
            )


def save_whole(folder: Path, model: Any, processor: Any, extra: dict[str, Any] | None = None) -> None:
    """Save model and processor so that the folder is either whole or not there."""
    for left in folder.parent.glob(f".{folder.name}.*.part"):  # by a crash
        shutil.rmtree(left, ignore_errors=True)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.part")
    with writing(folder, "make room, and go on with --resume"):
        make_folder(folder.parent)
        part.mkdir()  # fails on whatever stands there, a planted link too
        try:
            model.save_pretrained(part)
            processor.save_pretrained(part)
            if extra is not None:
                write_atomic(part / "warmup.json", json.dumps(extra))
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def load_saved(folder: Path, device: str, remedy: str | None = None) -> tuple[Any, Any]:
    """Model and processor of a folder that `save_whole` wrote; `remedy` ends the message where it is broken.

    Raises:
        InputError: The folder is broken.
    """
    from safetensors import SafetensorError
    from transformers import Qwen2_5_VLForConditionalGeneration

    from vppo.loading import load_processor

    try:
        model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
        processor = load_processor(str(folder))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded ({error}); {remedy or _anew(folder)}") from error
    return model.to(device), processor


def _anew(folder: Path) -> str:
    """What to do about a folder of ours that is broken."""
    return f"remove {folder}, and the same command with --resume makes it anew"


def _save_held_out(path: Path, held_out: Sequence[Any]) -> None:
    """The strips that the report is about, as a dataset that `vppo analyze` takes."""
    from vppo.demo.digits import as_dataset

    content = io.BytesIO()
    as_dataset(list(held_out)).to_parquet(content)
    write_atomic(path, content.getvalue())


def _warm_up(console: Console, options: DemoOptions, held_out: Sequence[Any]) -> dict[str, Any]:
    """The warm model in `warmup/`, made if it is not there, and its accuracy."""
    from vppo.demo.batches import answer, correct
    from vppo.demo.model import build_model, build_processor
    from vppo.demo.warmup import MAX_STEPS, warm_up

    folder = options.out / "warmup"
    if not folder.exists():
        processor = build_processor()
        model: Any = build_model(processor, options.seed)
        model.to(options.device)
        started = time.perf_counter()
        columns = (
            TextColumn("warm-up "),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=MAX_STEPS, loss=float("nan"))
            steps = warm_up(
                model, processor, options.seed, lambda step, loss: bar.update(task, completed=step, loss=loss)
            )
            bar.update(task, total=steps)
        seconds = time.perf_counter() - started
        verdicts = correct(processor, held_out, answer(model, processor, held_out))
        warm = {"steps": steps, "seconds": seconds, "accuracy": sum(verdicts) / len(held_out)}
        save_whole(folder, model, processor, warm)
    warm = read_object(folder / "warmup.json", remedy=_anew(folder))
    missing = [name for name in ("steps", "seconds", "accuracy") if not isinstance(warm.get(name), int | float)]
    if missing:
        raise InputError(f"{folder / 'warmup.json'}: has no number {', '.join(missing)}; {_anew(folder)}")
    return warm


def _train(console: Console, options: DemoOptions) -> tuple[Any, Any]:
    """The trained model in `model/`, made from the warm one or from the last checkpoint if it is not there."""
    folder = options.out / "model"
    if not folder.exists():
        from transformers import PrinterCallback

        from vppo.config import VPPOConfig
        from vppo.demo.batches import MAX_NEW_TOKENS, forbidden_tokens
        from vppo.demo.digits import as_dataset, strips
        from vppo.demo.head_products import CountingTrainer
        from vppo.preemption import EXIT_CODE, StopOnSigterm
        from vppo.progress import TrainingProgress, say
        from vppo.rewards import accuracy_reward

        checkpoints = options.out / "checkpoints"
        model, processor = load_saved(options.out / "warmup", options.device)
        args = VPPOConfig(
            output_dir=str(checkpoints),
            algorithm=options.algorithm,
            divergence=options.divergence,
            perturbation=options.perturbation,
            seed=options.seed,
            max_steps=options.steps,
            per_device_train_batch_size=PROMPTS * ROLLOUTS,
            num_generations=ROLLOUTS,
            max_completion_length=MAX_NEW_TOKENS,
            generation_kwargs={"suppress_tokens": forbidden_tokens(processor)},
            learning_rate=LEARNING_RATE,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=options.device == "cpu",
            logging_steps=1,
            save_steps=SAVE_EVERY,
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
        )
        stop = StopOnSigterm()
        trainer = CountingTrainer(
            model=model,
            reward_funcs=accuracy_reward,
            args=args,
            train_dataset=as_dataset(list(strips("train", PROMPTS * options.steps, seed=options.seed + 1))),
            processing_class=processor,
            callbacks=[TrainingProgress(options.out / "metrics.jsonl", console), stop],
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = last_complete_checkpoint(checkpoints)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.stopped:
            say(console, f"Ended by SIGTERM; checkpoint-{trainer.state.global_step} is saved. Go on with --resume")
            raise SystemExit(EXIT_CODE)
        save_whole(folder, trainer.model, processor)
    return load_saved(folder, options.device)


def _score(
    options: DemoOptions,
    model: Any,
    processor: Any,
    held_out: Sequence[Any],
    responses: Sequence[list[int]],
    verdicts: Sequence[bool],
) -> list[Any]:
    """Exact dependency of every response token, whatever training measured it by."""
    from vppo.demo.model import PATCH
    from vppo.demo.scored import score_responses
    from vppo.perturbations import Perturbation

    rows = [
        {**strip.row, "response_ids": ids, "correct": verdict}
        for strip, ids, verdict in zip(held_out, responses, verdicts, strict=True)
    ]
    perturbation = Perturbation(options.perturbation, patch_size=PATCH)
    return score_responses(model, processor, rows, divergence="kl", perturbation=perturbation, seed=options.seed)


def _dependency_by_place(scored: Sequence[Any]) -> tuple[float, float]:
    """Mean dependency in nats at the digits read from the image, and at all other response tokens."""
    from vppo.demo.digits import read_places

    read: list[float] = []
    other: list[float] = []
    for response in scored:
        places, position = read_places(response.text), 0
        for token, value in zip(response.tokens, response.dependency.tolist(), strict=True):
            (read if position in places else other).append(value)
            position += len(token)
    return sum(read) / max(len(read), 1), sum(other) / max(len(other), 1)


def _peak_rss_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _show(console: Console, summary: dict[str, Any], out: Path) -> None:
    from vppo.demo.baseline import beside
    from vppo.progress import say

    title = f"{summary['algorithm']} on handwritten digits, seed {summary['seed']}"
    table = Table(title=Text(title, "table.title"), title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row(
        f"accuracy on {summary['held_out']} held-out strips",
        f"{summary['accuracy_before']:.1%}",
        f"{summary['accuracy_after']:.1%}",
    )
    if baseline := beside(summary["algorithm"], summary["steps"]):
        low, high = min(baseline.accuracy), max(baseline.accuracy)
        table.add_row(f"of DAPO, all tokens, {len(baseline.seeds)} seeds", "", f"{100 * low:.1f} to {high:.1%}")
    table.add_section()
    table.add_row("dependency at the digits read from the image", "", f"{summary['dependency_digits']:.3f} nats")
    table.add_row("dependency at all other tokens", "", f"{summary['dependency_other']:.4f} nats")
    if (products := summary.get("head_products")) and products["tokens"]:
        made = products["forward"] + products["backward"]
        table.add_section()
        table.add_row("tokens that carried gradient", "", f"{products['active'] / products['tokens']:.1%}")
        table.add_row("products of the head in training, of all", "", f"{made / (made + products['left_out']):.1%}")
        table.add_row(
            "products to measure dependency, besides", "", f"{products['scoring'] / (made + products['left_out']):.1%}"
        )
    table.add_section()
    table.add_row("warm-up", "", f"{summary['seconds_warmup']:.0f} s")
    table.add_row(
        f"{summary['steps']} steps of {PROMPTS} prompts x {ROLLOUTS} rollouts", "", f"{summary['seconds_train']:.0f} s"
    )
    console.print(table)
    say(console, f"Report: {out / 'report.html'}")
